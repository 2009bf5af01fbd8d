"""BOFT: orthogonal butterfly fine-tuning (arXiv 2311.06243), for comparison."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from circflax.methods._method import (
    Flops,
    Method,
    Params,
    check_size,
    divisors,
)


@dataclass(frozen=True, kw_only=True)
class BOFT(Method):
    """The kernel is multiplied by an orthogonal matrix, a product of m sparse ones.

    `W' = R W diag(s)` for a kernel of shape `(in, out)`, with `R = B_m ... B_1` of shape
    `(in, in)`. Each `B_i` is block-diagonal between two permutations that pair up blocks of
    growing distance, as an FFT does; its blocks are `(I - Q)(I + Q)^-1` with the skew-symmetric
    part Q of a trained matrix. R acts on the layer's input, so that it is never made during
    training. `s` scales the output without the bias, as in PEFT.

    A fresh adapter has `r` at 0 and `s` at 1, so that R is the identity.

    Attributes:
        b: size of the blocks, a divisor of the layer's input width; even if there are several
            factors.
        m: number of factors; `b * 2^(m-1)` must divide the input width.

    Source:
        BOFT, sections 4 and 5; PEFT for `s` and for storing whole blocks, of which half the
        entries are redundant.

    Example:
        >>> from circflax import BOFT
        >>> BOFT(b=8, m=2).parameter_count(768, 768)
        13056
    """

    name: ClassVar[str] = "boft"
    learning_rate: ClassVar[float] = 0.003

    b: int = 8
    m: int = 2

    def __post_init__(self) -> None:
        check_size("b", self.b)
        check_size("m", self.m)
        if self.m > 1 and self.b % 2:
            raise ValueError(
                f"BOFT with m={self.m} factors halves its blocks, so that `b` must be even, but it"
                f" is {self.b}."
            )

    def init(
        self, key: jax.Array, in_features: int, out_features: int, kernel: jax.Array | None = None
    ) -> Params:
        step = 2 ** (self.m - 1)
        if in_features % (self.b * step):
            fitting = [b for b in divisors(in_features // step) if self.m == 1 or b % 2 == 0]
            those = ", ".join(map(str, fitting)) if in_features % step == 0 and fitting else "none"
            raise ValueError(
                f"BOFT's b={self.b} with m={self.m} does not fit in_features={in_features}, which"
                f" must be a multiple of b * {step}; block sizes that fit: {those}."
            )
        shape = self.m, in_features // self.b, self.b, self.b
        return {"r": jnp.zeros(shape, jnp.float32), "s": jnp.ones(out_features, jnp.float32)}

    def input(self, params: Params, x: jax.Array) -> jax.Array:
        # Rotations stay float32: rounded to the layer's dtype they would not be orthogonal.
        return self._rotate(params, x).astype(x.dtype)

    def apply(
        self, params: Params, x: jax.Array, y: jax.Array, bias: jax.Array | None = None
    ) -> jax.Array:
        product = y if bias is None else y - bias.astype(y.dtype)
        # Not s * product + bias, which would not be y to the last bit for s = 1.
        return y + ((params["s"] - 1) * product).astype(y.dtype)

    def merge(self, params: Params, kernel: jax.Array) -> jax.Array:
        return self._rotation(params) @ kernel * params["s"]

    def unmerge(self, params: Params, kernel: jax.Array) -> jax.Array:
        return self._rotation(params).T @ (kernel / params["s"])

    def decayed(self) -> dict[str, bool]:
        # Decay would pull the scale away from 1, where the layer is the base's.
        return {"s": False}

    def axes(self) -> Mapping[str, tuple[str | None, ...]]:
        return {"s": ("out",)}

    def flops(self, in_features: int, out_features: int) -> Flops:
        rotation = 2.0 * self.m * self.b * in_features
        # One solution of b equations with b right-hand sides for each block.
        solve = 8 / 3 * self.m * in_features * self.b**2
        return Flops(rotation + 2 * out_features, 2 * rotation + 4 * out_features, solve, 2 * solve)

    def _rotate(self, params: Params, x: jax.Array) -> jax.Array:
        """The rows of `x` times R."""
        blocks = _cayley(params["r"])
        for i in reversed(range(self.m)):
            rows = self._pair(x, i).reshape(*x.shape[:-1], -1, self.b)
            rows = jnp.einsum("...ni,nij->...nj", rows, blocks[i], precision="highest")
            x = self._unpair(rows.reshape(x.shape), i)
        return x

    def _pair(self, x: jax.Array, i: int) -> jax.Array:
        """Brings halves of blocks together that are 2^i halves apart."""
        if i == 0:
            return x
        halves = x.reshape(*x.shape[:-1], -1, 2, 2**i, self.b // 2)
        return halves.swapaxes(-3, -2).reshape(x.shape)

    def _unpair(self, x: jax.Array, i: int) -> jax.Array:
        """The inverse of `_pair`."""
        if i == 0:
            return x
        halves = x.reshape(*x.shape[:-1], -1, 2**i, 2, self.b // 2)
        return halves.swapaxes(-3, -2).reshape(x.shape)

    def _rotation(self, params: Params) -> jax.Array:
        in_features = params["r"].shape[1] * self.b
        return self._rotate(params, jnp.eye(in_features, dtype=params["r"].dtype))


def _cayley(r: jax.Array) -> jax.Array:
    """Orthogonal matrices from any, `(..., b, b)`: Cayley's transform of their skew parts."""
    skew = (r - r.mT) / 2
    identity = jnp.eye(r.shape[-1], dtype=r.dtype)
    # The two factors commute, so that the order of the quotient does not matter.
    return jnp.linalg.solve(identity + skew, identity - skew)
