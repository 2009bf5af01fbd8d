"""FourierFT: a few trained entries of the update's 2-D spectrum (arXiv 2405.03003), to compare."""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from circflax.methods import _frozen
from circflax.methods._method import (
    Additive,
    Flops,
    Params,
    check_choice,
    check_number,
    check_seed,
    check_size,
)

_INITS = ("zeros", "gaussian")


@dataclass(frozen=True, kw_only=True)
class FourierFT(Additive):
    """The update is the inverse 2-D DFT of a matrix with n real entries other than 0.

    `dW = alpha * Re(ifft2(S))`; `S[positions] = c` with n trained coefficients `c`. The positions
    are drawn from the seed, the same for all layers of one shape; they are no part of an adapter's
    arrays or files. The dense update is made once a step and multiplied like a kernel.

    Attributes:
        n: number of coefficients.
        alpha: scale of the update; the inverse DFT divides by the number of the kernel's entries.
        init_weights: "zeros" (the update is exactly 0), or the paper's "gaussian".
        seed: of the positions.

    Source:
        FourierFT, equations 2 to 4.

    Example:
        >>> from circflax import FourierFT
        >>> FourierFT(n=1000).parameter_count(768, 768)
        1000
    """

    name: ClassVar[str] = "fourierft"
    learning_rate: ClassVar[float] = 0.05

    n: int = 1000
    alpha: float = 150.0
    init_weights: str = "zeros"
    seed: int = 2024

    def __post_init__(self) -> None:
        check_size("n", self.n)
        check_number("alpha", self.alpha)
        check_choice("init_weights", self.init_weights, _INITS)
        check_seed("seed", self.seed)

    def init(
        self, key: jax.Array, in_features: int, out_features: int, kernel: jax.Array | None = None
    ) -> Params:
        entries = in_features * out_features
        if self.n > entries:
            raise ValueError(
                f"FourierFT's n={self.n} exceeds the {entries} entries of a layer with"
                f" in_features={in_features} and out_features={out_features}."
            )
        if self.init_weights == "gaussian":
            return {"c": jax.random.normal(key, (self.n,), jnp.float32)}
        return {"c": jnp.zeros(self.n, jnp.float32)}

    def update(self, params: Params, x: jax.Array, out_features: int) -> jax.Array:
        delta = self.delta(params, x.shape[-1], out_features)
        return jnp.matmul(x, delta.astype(jnp.result_type(x, 1.0)))

    def delta(self, params: Params, in_features: int, out_features: int) -> jax.Array:
        shape = in_features, out_features
        rows, columns = _frozen.positions(self.seed, self.n, shape)
        spectrum = jnp.zeros(shape, params["c"].dtype).at[rows, columns].set(params["c"])
        return self.alpha * jnp.fft.ifft2(spectrum).real

    def flops(self, in_features: int, out_features: int) -> Flops:
        entries = in_features * out_features
        # A complex 2-D transform, as the authors' code computes it: twice a real one.
        transform = 5.0 * entries * math.log2(entries)
        return Flops(2.0 * entries, 4.0 * entries, transform, transform)
