"""VeRA: vector-based random matrix adaptation (arXiv 2310.11454), for comparison."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from circflax.methods import _frozen
from circflax.methods._method import (
    Additive,
    Flops,
    Params,
    check_number,
    check_seed,
    check_size,
)


@dataclass(frozen=True, kw_only=True)
class VeRA(Additive):
    """The update is a product of two frozen random matrices, scaled by two trained vectors.

    `dW = A diag(d) B diag(b)` for a kernel of shape `(in, out)`, with A of shape `(in, r)` and B
    of shape `(r, out)`. Both are drawn from the seed, evenly from within `sqrt(6 / in)` and
    `sqrt(6 / r)`, and shared: layers of the same width use the same one, and a narrower layer the
    first rows or columns of a wider one's draw. They are no part of an adapter's arrays or files.

    A fresh adapter has `b` at 0, so that the update is exactly 0, and `d` at `d_initial`.

    Attributes:
        r: rank; the matrices are frozen, so that it may exceed the layer's widths.
        d_initial: first value of `d`.
        seed: of the two matrices.

    Source:
        VeRA, equation 2 and section 3.3.

    Example:
        >>> from circflax import VeRA
        >>> VeRA(r=1024).parameter_count(768, 768)
        1792
    """

    name: ClassVar[str] = "vera"
    learning_rate: ClassVar[float] = 0.01

    r: int = 256
    d_initial: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_size("r", self.r)
        check_number("d_initial", self.d_initial)
        check_seed("seed", self.seed)

    def init(
        self, key: jax.Array, in_features: int, out_features: int, kernel: jax.Array | None = None
    ) -> Params:
        return {
            "d": jnp.full(self.r, self.d_initial, jnp.float32),
            "b": jnp.zeros(out_features, jnp.float32),
        }

    def update(self, params: Params, x: jax.Array, out_features: int) -> jax.Array:
        # The input's dtype, or float32 for whole numbers, which would round the factors away.
        dtype = jnp.result_type(x, 1.0)
        a, b = self._matrices(x.shape[-1], out_features)
        inner = jnp.matmul(x, jnp.asarray(a, dtype)) * jnp.asarray(params["d"], dtype)
        return jnp.matmul(inner, jnp.asarray(b, dtype)) * jnp.asarray(params["b"], dtype)

    def delta(self, params: Params, in_features: int, out_features: int) -> jax.Array:
        a, b = self._matrices(in_features, out_features)
        return jnp.matmul(a * params["d"], b, precision="highest") * params["b"]

    def axes(self) -> Mapping[str, tuple[str | None, ...]]:
        return {"b": ("out",)}

    def flops(self, in_features: int, out_features: int) -> Flops:
        products = 2.0 * self.r * (in_features + out_features)
        vectors = self.r + out_features
        return Flops(products + vectors, products + 3 * vectors)

    def _matrices(self, in_features: int, out_features: int) -> tuple[jax.Array, jax.Array]:
        """A and B; both are drawn row by row, B transposed."""
        a = _frozen.uniform(self.seed, 0, (in_features, self.r), math.sqrt(6 / in_features))
        b = _frozen.uniform(self.seed, 1, (out_features, self.r), math.sqrt(6 / self.r))
        return jnp.asarray(a), jnp.asarray(b).T
