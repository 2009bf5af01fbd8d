"""LoRA: low-rank adaptation (arXiv 2106.09685), for comparison."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from circflax.methods._method import (
    Additive,
    Flops,
    Params,
    check_flag,
    check_number,
    check_size,
)


@dataclass(frozen=True, kw_only=True)
class LoRA(Additive):
    """The update is a product of two thin matrices.

    `dW = s * a b` for a kernel of shape `(in, out)`, with factors `a` of shape `(in, r)` and `b`
    of shape `(r, out)`; the scale s is `alpha / r`, or `alpha / sqrt(r)` if rank-stabilised.

    A fresh adapter has `a` drawn uniformly from within `1 / sqrt(in)`, as PEFT draws it, and `b`
    at 0, so that the update is exactly 0. The products are computed in the dtype of the layer's
    input, as the layer's own are.

    Attributes:
        r: rank; above the smaller of the layer's two widths it adds parameters but no matrices.
        alpha: numerator of the scale, or None for r.
        rank_stabilized: whether the scale falls with the root of r instead of r, so that the
            update's size does not shrink with the rank.

    Source:
        LoRA, equation 3; Kalajdzievski (arXiv 2312.03732) for the rank-stabilised scale.

    Example:
        >>> from circflax import LoRA
        >>> LoRA(r=8).parameter_count(768, 768)
        12288
    """

    name: ClassVar[str] = "lora"
    learning_rate: ClassVar[float] = 0.001

    r: int = 8
    alpha: float | None = None
    rank_stabilized: bool = False

    def __post_init__(self) -> None:
        check_size("r", self.r)
        if self.alpha is not None:
            check_number("alpha", self.alpha)
        check_flag("rank_stabilized", self.rank_stabilized)

    def init(
        self, key: jax.Array, in_features: int, out_features: int, kernel: jax.Array | None = None
    ) -> Params:
        bound = 1 / math.sqrt(in_features)
        shape = (in_features, self.r)
        return {
            "a": jax.random.uniform(key, shape, jnp.float32, minval=-bound, maxval=bound),
            "b": jnp.zeros((self.r, out_features), jnp.float32),
        }

    def update(self, params: Params, x: jax.Array, out_features: int) -> jax.Array:
        # The input's dtype, or float32 for whole numbers, which would round the factors away.
        dtype = jnp.result_type(x, 1.0)
        a = jnp.asarray(params["a"], dtype)
        return jnp.matmul(jnp.matmul(x, a), jnp.asarray(self._scaled(params["b"]), dtype))

    def delta(self, params: Params, in_features: int, out_features: int) -> jax.Array:
        return jnp.matmul(params["a"], self._scaled(params["b"]), precision="highest")

    def axes(self) -> Mapping[str, tuple[str | None, ...]]:
        return {"a": ("in", None), "b": (None, "out")}

    def flops(self, in_features: int, out_features: int) -> Flops:
        products = 2.0 * self.r * (in_features + out_features)
        return Flops(products, 2 * products)

    def _scaled(self, b: jax.Array) -> jax.Array:
        # The scale rides on the second factor, where it costs nothing per token.
        alpha = self.r if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.r) if self.rank_stabilized else self.r) * b
