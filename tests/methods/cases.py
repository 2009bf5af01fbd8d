"""The table of adapters: each method on several shapes, beside its definition in numpy."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from circflax.methods import (
    BCA,
    BOFT,
    C3A,
    CDVFT,
    IA3,
    Additive,
    FourierFT,
    LaMDA,
    LoRA,
    Method,
    VeRA,
    _frozen,
)
from tests.ops.operators import reference_block

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """One adapter: a method on a layer."""

    method: Method
    in_features: int
    out_features: int

    def __str__(self) -> str:
        fields = vars(self.method).items()
        changed = "-".join(f"{k}{v}" for k, v in fields if v != getattr(type(self.method), k))
        return f"{self.method.name}-{changed or 'default'}-{self.in_features}x{self.out_features}"

    def params(self, dtype=np.float64, seed: int = 0) -> Arrays:
        rng = np.random.default_rng(seed)
        shapes = self.method.shapes(self.in_features, self.out_features)
        return {k: rng.standard_normal(s.shape).astype(dtype) for k, s in sorted(shapes.items())}

    def x(self, batch: tuple[int, ...] = (3,), dtype=np.float64) -> np.ndarray:
        rng = np.random.default_rng(1)
        return rng.standard_normal((*batch, self.in_features)).astype(dtype)

    def kernel(self, dtype=np.float64) -> np.ndarray:
        rng = np.random.default_rng(2)
        return rng.standard_normal((self.in_features, self.out_features)).astype(dtype)

    def bias(self, dtype=np.float64) -> np.ndarray:
        return np.random.default_rng(3).standard_normal(self.out_features).astype(dtype)

    def reference_merged(self, params: Arrays) -> tuple[np.ndarray, np.ndarray]:
        """Kernel and bias with the adapter folded in."""
        if isinstance(self.method, Additive):
            return self.kernel() + self.reference_delta(params), self.bias()
        return MERGED[self.method.name](self, params)

    def reference_delta(self, params: Arrays) -> np.ndarray:
        delta = REFERENCES[self.method.name](self, params)
        assert delta.shape == (self.out_features, self.in_features)
        return delta.T

    def reference_count(self) -> int:
        return COUNTS[self.method.name](self.method, self.in_features, self.out_features)


def _cdvft(case: Case, params: Arrays) -> np.ndarray:
    delta = np.diag(params["a1"])
    for i in range(2, case.method.factors, 2):
        c = params[f"c{i}"] if i == 2 else params[f"c{i}"][None, None]
        circulant = reference_block(c, "column")[: case.out_features, : delta.shape[0]]
        delta = np.diag(params[f"a{i + 1}"]) @ circulant @ delta
    return case.method.alpha * delta


def _c3a(case: Case, params: Arrays) -> np.ndarray:
    return reference_block(params["w"], "row") / case.in_features


def _bca(case: Case, params: Arrays) -> np.ndarray:
    matrix = reference_block(params["c"], "column")
    return case.method.scale * matrix[: case.out_features, : case.in_features]


def _lora(case: Case, params: Arrays) -> np.ndarray:
    method = case.method
    alpha = method.r if method.alpha is None else method.alpha
    scale = alpha / (method.r**0.5 if method.rank_stabilized else method.r)
    return scale * params["b"].T @ params["a"].T


def _vera(case: Case, params: Arrays) -> np.ndarray:
    a = _frozen.uniform(0, 0, (case.in_features, case.method.r), (6 / case.in_features) ** 0.5)
    b = _frozen.uniform(0, 1, (case.out_features, case.method.r), (6 / case.method.r) ** 0.5)
    return np.diag(params["b"]) @ b @ np.diag(params["d"]) @ a.T


def _fourierft(case: Case, params: Arrays) -> np.ndarray:
    """The sum of the n waves, one by one."""
    shape = case.in_features, case.out_features
    delta = np.zeros(shape)
    rows, columns = _frozen.positions(case.method.seed, case.method.n, shape)
    i, j = np.indices(shape)
    for u, v, c in zip(rows, columns, params["c"], strict=True):
        delta += c * np.cos(2 * np.pi * (u * i / shape[0] + v * j / shape[1])) / delta.size
    return case.method.alpha * delta.T


def _lamda(case: Case, params: Arrays) -> np.ndarray:
    alpha = case.method.r if case.method.alpha is None else case.method.alpha
    return alpha / case.method.r * (params["a"] @ params["s"] @ params["b"]).T


def _ia3(case: Case, params: Arrays) -> tuple[np.ndarray, np.ndarray]:
    if case.method.feedforward:
        return np.diag(params["l"]) @ case.kernel(), case.bias()
    return case.kernel() @ np.diag(params["l"]), params["l"] * case.bias()


def _boft(case: Case, params: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """Dense factors, each built entry by entry from its blocks and the pairs of halves."""
    b, half = case.method.b, case.method.b // 2
    rotation = np.eye(case.in_features)
    for i in range(case.method.m):
        factor = np.zeros((case.in_features, case.in_features))
        for n, block in enumerate(params["r"][i]):
            skew = (block - block.T) / 2
            orthogonal = (np.eye(b) - skew) @ np.linalg.inv(np.eye(b) + skew)
            rows = n * b + np.arange(b)
            if i > 0:
                # Block n of a group of 2^i blocks joins the halves n and n + 2^i of the group.
                group, place = divmod(n, 2**i)
                first = group * 2**i * b + place * half + np.arange(half)
                rows = np.concatenate([first, first + 2**i * half])
            factor[np.ix_(rows, rows)] = orthogonal
        rotation = factor @ rotation
    return rotation @ case.kernel() @ np.diag(params["s"]), case.bias()


def _cdvft_count(method: CDVFT, in_features: int, out_features: int) -> int:
    p = method.p or min(in_features, out_features)
    later = (method.factors - 3) // 2
    blocks = -(-in_features // p) * -(-out_features // p)
    return in_features + out_features + blocks * p + later * 2 * out_features


def _c3a_count(method: C3A, in_features: int, out_features: int) -> int:
    return in_features * out_features // (method.b or np.gcd(in_features, out_features))


def _bca_count(method: BCA, in_features: int, out_features: int) -> int:
    p = method.p or min(in_features, out_features)
    return -(-in_features // p) * -(-out_features // p) * p


def _lora_count(method: LoRA, in_features: int, out_features: int) -> int:
    return method.r * (in_features + out_features)


def _ia3_count(method: IA3, in_features: int, out_features: int) -> int:
    return in_features if method.feedforward else out_features


REFERENCES: dict[str, Callable[[Case, Arrays], np.ndarray]] = {
    "cdvft": _cdvft,
    "c3a": _c3a,
    "bca": _bca,
    "lora": _lora,
    "vera": _vera,
    "fourierft": _fourierft,
    "lamda": _lamda,
}
MERGED: dict[str, Callable[[Case, Arrays], tuple[np.ndarray, np.ndarray]]] = {
    "ia3": _ia3,
    "boft": _boft,
}
COUNTS: dict[str, Callable[..., int]] = {
    "cdvft": _cdvft_count,
    "c3a": _c3a_count,
    "bca": _bca_count,
    "lora": _lora_count,
    "vera": lambda method, _, out_features: method.r + out_features,
    "fourierft": lambda method, *_: method.n,
    "ia3": _ia3_count,
    "boft": lambda method, in_features, out_features: (
        method.m * in_features * method.b + out_features
    ),
    "lamda": lambda method, _, out_features: method.r * (method.r + out_features),
}

CASES = (
    Case(CDVFT(), 6, 6),
    Case(CDVFT(), 6, 11),
    Case(CDVFT(p=4), 7, 5),
    Case(CDVFT(factors=5, p=3), 7, 5),
    Case(CDVFT(factors=7, alpha=-0.5), 6, 6),
    Case(CDVFT(alpha=3.0, p=2), 6, 4),
    Case(C3A(), 12, 8),
    Case(C3A(b=1), 3, 4),
    Case(C3A(b=3), 6, 9),
    Case(C3A(b=5), 10, 5),
    Case(BCA(), 5, 12),
    Case(BCA(p=4), 7, 5),
    Case(BCA(p=1), 3, 4),
    Case(BCA(p=9), 5, 7),
    Case(BCA(p=3, scale=0.1, init_weights="projection"), 6, 4),
    Case(LoRA(), 6, 4),
    Case(LoRA(r=1), 1, 5),
    Case(LoRA(r=2), 7, 5),
    Case(LoRA(r=3, alpha=-0.5), 5, 12),
    Case(LoRA(r=2, rank_stabilized=True), 6, 6),
    Case(LoRA(r=3, alpha=16.0, rank_stabilized=True), 6, 9),
    Case(VeRA(r=4), 6, 9),
    Case(VeRA(r=12, d_initial=0.5), 7, 5),
    Case(FourierFT(n=5), 6, 6),
    Case(FourierFT(n=1, alpha=-2.0), 1, 5),
    Case(FourierFT(n=35), 7, 5),
    Case(FourierFT(n=9, init_weights="gaussian"), 5, 12),
    Case(IA3(), 6, 9),
    Case(IA3(feedforward=True), 7, 5),
    Case(BOFT(b=2, m=1), 6, 4),
    Case(BOFT(b=3, m=1), 6, 9),
    Case(BOFT(b=1, m=1), 3, 4),
    Case(BOFT(b=4, m=2), 16, 5),
    Case(BOFT(b=2, m=3), 24, 7),
    Case(LaMDA(r=3), 6, 9),
    Case(LaMDA(r=1), 1, 5),
    Case(LaMDA(r=4, alpha=-2.0, freeze_until=0.0), 7, 5),
)
