"""The table of adapters: each method on several shapes, beside its definition in numpy."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from circflax.methods import BCA, C3A, CDVFT, LoRA, Method
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


REFERENCES: dict[str, Callable[[Case, Arrays], np.ndarray]] = {
    "cdvft": _cdvft,
    "c3a": _c3a,
    "bca": _bca,
    "lora": _lora,
}
COUNTS = {"cdvft": _cdvft_count, "c3a": _c3a_count, "bca": _bca_count, "lora": _lora_count}

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
)
