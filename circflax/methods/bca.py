"""BCA: block circulant adapter (arXiv 2505.00582)."""

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
    check_number,
    check_size,
    circulant_flops,
)

_INITS = ("zeros", "projection")


@dataclass(frozen=True, kw_only=True)
class BCA(Additive):
    """The update is a block-circulant matrix, given by the first columns of its blocks.

    `dW = scale * B(c)`, with kernels `c` of shape `(ceil(out/p), ceil(in/p), p)`; blocks that
    reach beyond the layer see zeros and are cut off.

    The stable-training rule is part of the method: a parameter of `c` stands in p entries of a
    row of blocks and collects p times the gradient of one, so `learning_rates` divides its
    learning rate by p.

    Attributes:
        p: block size, or None for the smaller of the layer's two widths.
        scale: factor on the update.
        init_weights: "zeros" (the update is exactly 0), or "projection": the block-circulant
            matrix nearest to the layer's own weights, as in the authors' code, which goes with
            `scale=0.1` there and does not start at the base model.

    Source:
        BCA, equations of section 3 and its training rule alpha <- alpha / p.

    Example:
        >>> from circflax import BCA
        >>> BCA(p=256).parameter_count(768, 768), BCA(p=256).learning_rates(768, 768)
        (2304, {'c': 0.00390625})
    """

    name: ClassVar[str] = "bca"
    learning_rate: ClassVar[float] = 0.3

    p: int | None = None
    scale: float = 1.0
    init_weights: str = "zeros"

    def __post_init__(self) -> None:
        check_size("p", self.p, optional=True)
        check_number("scale", self.scale)
        check_choice("init_weights", self.init_weights, _INITS)

    def init(
        self, key: jax.Array, in_features: int, out_features: int, kernel: jax.Array | None = None
    ) -> Params:
        p = self.p or min(in_features, out_features)
        if self.init_weights == "zeros":
            shape = (-(-out_features // p), -(-in_features // p), p)
            return {"c": jnp.zeros(shape, jnp.float32)}
        if kernel is None:
            raise ValueError(
                "BCA's init_weights=\"projection\" starts from the layer's own weights: give"
                " `kernel`."
            )
        return {"c": ops.block_circulant_projection(kernel.T.astype(jnp.float32), p)}

    def update(self, params: Params, x: jax.Array, out_features: int) -> jax.Array:
        return self.updates([params], x, [out_features])[0]

    def updates(
        self, params: Sequence[Params], x: jax.Array, out_features: Sequence[int]
    ) -> Sequence[jax.Array]:
        kernels = [self.scale * each["c"] for each in params]
        return ops.block_circulant_products(kernels, x, out_features)

    def delta(self, params: Params, in_features: int, out_features: int) -> jax.Array:
        matrix = ops.block_circulant_matrix(self.scale * params["c"])
        return matrix[:out_features, :in_features].T

    def kernels(self, in_features: int, out_features: int) -> list[tuple[int, int, int]]:
        return [self.shapes(in_features, out_features)["c"].shape]

    def axes(self) -> Mapping[str, tuple[str | None, ...]]:
        return {"c": ("out", "in", None)}

    def flops(self, in_features: int, out_features: int) -> Flops:
        return circulant_flops(self.kernels(in_features, out_features))

    def learning_rates(self, in_features: int, out_features: int) -> dict[str, float]:
        return {"c": 1 / self.shapes(in_features, out_features)["c"].shape[-1]}
