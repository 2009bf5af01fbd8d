"""CDVFT: circulant and diagonal vector fine-tuning (arXiv 2505.00580)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from circflax import ops
from circflax.methods._method import (
    Additive,
    Flops,
    Params,
    check_number,
    check_size,
    circulant_flops,
)


@dataclass(frozen=True, kw_only=True)
class CDVFT(Additive):
    """The update is a product of interleaved diagonal and circulant matrices.

    With `factors = 2m - 1`, `dW = alpha * A_{2m-1} C_{2m-2} ... C_2 A_1` (CDVFT, equation 4): m
    diagonals `a1`, `a3`, ... and m - 1 circulants `c2`, `c4`, ... given by their first columns.
    For non-square layers the first circulant is partitioned into blocks of size `p`; blocks that
    reach beyond the layer see zeros and are cut off. Later factors are square, of the layer's
    output width.

    A fresh adapter has all diagonals at 1 and circulants whose product is 0: the first is 0, so
    that the update is exactly 0, and later ones are the identity.

    Attributes:
        p: block size of the first circulant, or None for the smaller of the layer's two widths
            (for a square layer: one block, as in the paper's experiments).
        factors: number of factors, odd; 3 is the paper's diagonal-circulant-diagonal.
        alpha: scale of the update.
        diagonal_rate: learning rate of the diagonals as a fraction of the adapter's. A circulant
            of block size p trains with 1/p of it, since each of its parameters stands in p
            entries of a row of blocks.

    Source:
        CDVFT, sections 3 and 4; the paper leaves initialisation and rates open.

    Example:
        >>> from circflax import CDVFT
        >>> CDVFT().parameter_count(768, 768)
        2304
    """

    name: ClassVar[str] = "cdvft"
    learning_rate: ClassVar[float] = 0.3

    p: int | None = None
    factors: int = 3
    alpha: float = 1.0
    diagonal_rate: float = 0.02

    def __post_init__(self) -> None:
        check_size("p", self.p, optional=True)
        check_size("factors", self.factors)
        check_number("alpha", self.alpha)
        check_number("diagonal_rate", self.diagonal_rate)
        if self.factors < 3 or self.factors % 2 == 0:
            raise ValueError(
                "CDVFT begins and ends with a diagonal and has a circulant between, so that"
                f" `factors` must be odd and at least 3, but it is {self.factors}."
            )

    def init(
        self, key: jax.Array, in_features: int, out_features: int, kernel: jax.Array | None = None
    ) -> Params:
        p = self._block(in_features, out_features)
        params = {"a1": jnp.ones(in_features, jnp.float32)}
        for i in range(2, self.factors, 2):
            if i == 2:
                blocks = (-(-out_features // p), -(-in_features // p), p)
                params["c2"] = jnp.zeros(blocks, jnp.float32)
            else:
                params[f"c{i}"] = jnp.zeros(out_features, jnp.float32).at[0].set(1.0)
            params[f"a{i + 1}"] = jnp.ones(out_features, jnp.float32)
        return params

    def update(self, params: Params, x: jax.Array, out_features: int) -> jax.Array:
        return ops.circulant_diagonal_product(*self._factors(params), x)

    def delta(self, params: Params, in_features: int, out_features: int) -> jax.Array:
        return ops.circulant_diagonal_matrix(*self._factors(params)).T

    def kernels(self, in_features: int, out_features: int) -> list[tuple[int, int, int]]:
        shapes = self.shapes(in_features, out_features)
        circulants = [shapes[f"c{i}"].shape for i in range(2, self.factors, 2)]
        return [shape if len(shape) == 3 else (1, 1, *shape) for shape in circulants]

    def axes(self) -> Mapping[str, tuple[str | None, ...]]:
        # Later circulants mix all outputs of the first.
        first = "out" if self.factors == 3 else None
        return {"a1": ("in",), "c2": (first, "in", None), f"a{self.factors}": ("out",)}

    def flops(self, in_features: int, out_features: int) -> Flops:
        circulants = circulant_flops(self.kernels(in_features, out_features))
        # A diagonal scales going forward; going back it scales, and is itself summed over tokens.
        diagonals = in_features + out_features * (self.factors - 1) / 2
        return circulants._replace(
            forward=circulants.forward + diagonals, backward=circulants.backward + 3 * diagonals
        )

    def learning_rates(self, in_features: int, out_features: int) -> dict[str, float]:
        shapes = self.shapes(in_features, out_features)
        return {
            name: 1 / shape.shape[-1] if name.startswith("c") else self.diagonal_rate
            for name, shape in shapes.items()
        }

    def decayed(self) -> Mapping[str, bool]:
        # Decay would pull the product to zero through every factor at once.
        return {f"a{i}": False for i in range(1, self.factors + 1, 2)}

    def _block(self, in_features: int, out_features: int) -> int:
        return self.p or min(in_features, out_features)

    def _factors(self, params: Params) -> tuple[list[jax.Array], list[jax.Array]]:
        diagonals = [params[f"a{i}"] for i in range(1, self.factors + 1, 2)]
        # The scale rides on the last diagonal, where it costs nothing per token.
        diagonals[-1] = self.alpha * diagonals[-1]
        return diagonals, [params[f"c{i}"] for i in range(2, self.factors, 2)]
