"""C3A: circular convolution adaptation (arXiv 2407.19342)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from circflax import ops
from circflax.methods._method import (
    Additive,
    Flops,
    Params,
    check_choice,
    check_size,
    circulant_flops,
    divisors,
)

_INITS = ("zeros", "xavier_uniform", "gaussian", "kaiming_uniform")


@dataclass(frozen=True, kw_only=True)
class C3A(Additive):
    """The update is a block-circulant matrix, given by the first rows of its blocks.

    `dW = C(w) / in_features`, with kernels `w` of shape `(out/b, in/b, b)`. Without the division,
    which the authors' code has and the paper's listing leaves out, the paper's learning rates of
    0.1 and more make no sense.

    Attributes:
        b: block size, a common divisor of the layer's widths (the paper's v4; in its first
            version b counted the blocks of a side), or None for the greatest one.
        init_weights: "zeros" (the update is exactly 0), or the paper's "xavier_uniform",
            "gaussian" or "kaiming_uniform", which start near 0.

    Source:
        C3A v4, equations 1, 3 and 4.

    Example:
        >>> from circflax import C3A
        >>> C3A(b=128).parameter_count(768, 768)
        4608
    """

    name: ClassVar[str] = "c3a"
    learning_rate: ClassVar[float] = 0.3

    b: int | None = None
    init_weights: str = "zeros"

    def __post_init__(self) -> None:
        check_size("b", self.b, optional=True)
        check_choice("init_weights", self.init_weights, _INITS)

    def init(
        self, key: jax.Array, in_features: int, out_features: int, kernel: jax.Array | None = None
    ) -> Params:
        common = math.gcd(in_features, out_features)
        b = self.b or common
        if common % b:
            raise ValueError(
                f"C3A's block size b={b} does not divide both in_features={in_features} and"
                f" out_features={out_features}; those that do are"
                f" {', '.join(map(str, divisors(common)))}."
            )
        shape = (out_features // b, in_features // b, b)
        match self.init_weights:
            case "zeros":
                w = jnp.zeros(shape, jnp.float32)
            case "xavier_uniform":
                bound = math.sqrt(6 / (in_features + out_features))
                w = jax.random.uniform(key, shape, jnp.float32, minval=-bound, maxval=bound)
            case "gaussian":
                w = jax.random.normal(key, shape, jnp.float32)
            case "kaiming_uniform":
                bound = math.sqrt(6 / in_features)
                w = jax.random.uniform(key, shape, jnp.float32, minval=-bound, maxval=bound)
        return {"w": w}

    def update(self, params: Params, x: jax.Array, out_features: int) -> jax.Array:
        return self.updates([params], x, [out_features])[0]

    def updates(
        self, params: Sequence[Params], x: jax.Array, out_features: Sequence[int]
    ) -> Sequence[jax.Array]:
        kernels = [each["w"] / x.shape[-1] for each in params]
        return ops.block_circulant_products(kernels, x, out_features, convention="row")

    def delta(self, params: Params, in_features: int, out_features: int) -> jax.Array:
        return ops.block_circulant_matrix(params["w"] / in_features, convention="row").T

    def kernels(self, in_features: int, out_features: int) -> list[tuple[int, int, int]]:
        return [self.shapes(in_features, out_features)["w"].shape]

    def axes(self) -> Mapping[str, tuple[str | None, ...]]:
        return {"w": ("out", "in", None)}

    def flops(self, in_features: int, out_features: int) -> Flops:
        return circulant_flops(self.kernels(in_features, out_features))
