"""LaMDA: a small matrix between two spectral projections (arXiv 2406.12832), for comparison."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from circflax.methods._method import Additive, Flops, Params, check_number, check_size


@dataclass(frozen=True, kw_only=True)
class LaMDA(Additive):
    """The update is a small trained matrix between two projections, one of them frozen.

    `dW = alpha / r * a s b` for a kernel of shape `(in, out)`, with `a` of shape `(in, r)`, `s` of
    shape `(r, r)` and `b` of shape `(r, out)`. `a` and `b` start as the kernel's leading singular
    vectors. `a` never trains. `b` trains at first: its rows freeze one after the other, the
    leading one first, until at `freeze_until` of all steps only `s` trains.

    A fresh adapter has `s` at 0, so that the update is exactly 0.

    Attributes:
        r: rank, at most the smaller of the layer's two widths.
        alpha: numerator of the scale, or None for r.
        freeze_until: part of all steps after which the last row of `b` is frozen; 0 freezes all
            rows from the start.

    Source:
        LaMDA, section 3; `s` starts at 0 so that a fresh adapter changes nothing.

    Example:
        >>> from circflax import LaMDA
        >>> LaMDA(r=32).parameter_count(768, 768), LaMDA(r=32).parameters_after_freezing()
        (25600, 1024)
    """

    name: ClassVar[str] = "lamda"
    learning_rate: ClassVar[float] = 0.01

    r: int = 32
    alpha: float | None = None
    freeze_until: float = 0.3

    def __post_init__(self) -> None:
        check_size("r", self.r)
        if self.alpha is not None:
            check_number("alpha", self.alpha)
        check_number("freeze_until", self.freeze_until)
        if not 0 <= self.freeze_until <= 1:
            raise ValueError(
                f"`freeze_until` must lie between 0 and 1, but is {self.freeze_until!r}."
            )

    def init(
        self, key: jax.Array, in_features: int, out_features: int, kernel: jax.Array | None = None
    ) -> Params:
        if self.r > min(in_features, out_features):
            raise ValueError(
                f"LaMDA's rank r={self.r} exceeds the {min(in_features, out_features)} singular"
                f" vectors of a layer with in_features={in_features} and"
                f" out_features={out_features}."
            )
        if kernel is None:
            raise ValueError("LaMDA starts from the layer's own weights: give `kernel`.")
        left, _, right = jnp.linalg.svd(kernel.astype(jnp.float32), full_matrices=False)
        return {
            "a": left[:, : self.r],
            "s": jnp.zeros((self.r, self.r), jnp.float32),
            "b": right[: self.r],
        }

    def update(self, params: Params, x: jax.Array, out_features: int) -> jax.Array:
        dtype = jnp.result_type(x, 1.0)
        a, s, b = (jnp.asarray(factor, dtype) for factor in self._factors(params))
        return jnp.matmul(jnp.matmul(jnp.matmul(x, a), s), b)

    def delta(self, params: Params, in_features: int, out_features: int) -> jax.Array:
        a, s, b = self._factors(params)
        return jnp.linalg.multi_dot([a, s, b], precision="highest")

    def frozen(self) -> Collection[str]:
        return ("a",)

    def training(self, progress: jax.Array) -> Mapping[str, jax.Array]:
        ends = self.freeze_until * jnp.arange(1, self.r + 1) / self.r
        return {"b": (progress < ends)[:, None].astype(jnp.float32)}

    def parameters_after_freezing(self) -> int:
        """Number of an adapter's parameters that still train at the end."""
        return self.r**2

    def axes(self) -> Mapping[str, tuple[str | None, ...]]:
        return {"a": ("in", None), "b": (None, "out")}

    def flops(self, in_features: int, out_features: int) -> Flops:
        projections = 2.0 * self.r * (in_features + out_features)
        inner = 2.0 * self.r**2
        # While b trains; frozen, its gradient costs 2 r out less.
        gradients = 2.0 * self.r * out_features + inner
        return Flops(projections + inner, projections + inner + gradients)

    def _factors(self, params: Params) -> tuple[jax.Array, jax.Array, jax.Array]:
        # The scale rides on the small factor, where it costs nothing per token.
        scale = (self.r if self.alpha is None else self.alpha) / self.r
        return jax.lax.stop_gradient(params["a"]), scale * params["s"], params["b"]
