"""(IA)^3: scaling activations by a trained vector (arXiv 2205.05638), for comparison."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from circflax.methods._method import Flops, Method, Params, check_flag


@dataclass(frozen=True, kw_only=True)
class IA3(Method):
    """One trained vector `l` scales the layer's output, or its input.

    `y = l * (x W + bias)` as PEFT has it for keys and values, so that merging changes the bias
    too; or `y = (l * x) W + bias` for the second layer of a feed-forward network. A fresh adapter
    has `l` at 1, which changes nothing.

    Attributes:
        feedforward: whether the vector scales the layer's input instead of its output.

    Source:
        (IA)^3, section 3.3.

    Example:
        >>> from circflax import IA3
        >>> IA3().parameter_count(768, 3072), IA3(feedforward=True).parameter_count(768, 3072)
        (3072, 768)
    """

    name: ClassVar[str] = "ia3"
    learning_rate: ClassVar[float] = 0.01

    feedforward: bool = False

    def __post_init__(self) -> None:
        check_flag("feedforward", self.feedforward)

    def init(
        self, key: jax.Array, in_features: int, out_features: int, kernel: jax.Array | None = None
    ) -> Params:
        return {"l": jnp.ones(in_features if self.feedforward else out_features, jnp.float32)}

    def input(self, params: Params, x: jax.Array) -> jax.Array:
        return _scaled(x, params["l"]) if self.feedforward else x

    def apply(
        self, params: Params, x: jax.Array, y: jax.Array, bias: jax.Array | None = None
    ) -> jax.Array:
        return y if self.feedforward else _scaled(y, params["l"])

    def merge(self, params: Params, kernel: jax.Array) -> jax.Array:
        return kernel * self._factors(params)

    def unmerge(self, params: Params, kernel: jax.Array) -> jax.Array:
        return kernel / self._factors(params)

    @property
    def changes_bias(self) -> bool:
        return not self.feedforward

    def merge_bias(self, params: Params, bias: jax.Array) -> jax.Array:
        return bias * params["l"] if self.changes_bias else bias

    def unmerge_bias(self, params: Params, bias: jax.Array) -> jax.Array:
        return bias / params["l"] if self.changes_bias else bias

    def decayed(self) -> Mapping[str, bool]:
        # Decay would pull the scale away from 1, where the layer is the base's.
        return {"l": False}

    def axes(self) -> Mapping[str, tuple[str | None, ...]]:
        return {"l": ("in" if self.feedforward else "out",)}

    def flops(self, in_features: int, out_features: int) -> Flops:
        width = in_features if self.feedforward else out_features
        return Flops(width, 3.0 * width)

    def _factors(self, params: Params) -> jax.Array:
        """The vector along the kernel's inputs or outputs."""
        return params["l"][:, None] if self.feedforward else params["l"]


def _scaled(array: jax.Array, factors: jax.Array) -> jax.Array:
    return (array * factors).astype(array.dtype)
