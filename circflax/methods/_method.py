"""What every adaptation method provides, and what follows from it."""

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

Params = Mapping[str, jax.Array]
"""The trainable arrays of one adapter, by their names in the method's formula."""


@dataclass(frozen=True, kw_only=True)
class Method(abc.ABC):
    """Hyperparameters of one adaptation method, with the method's pure functions.

    An adapter belongs to one linear layer with a kernel of shape `(in_features, out_features)`.
    A method defines what an adapter adds to it; applying, merging and counting follow from that.
    """

    name: ClassVar[str]
    """The method's name in configurations and adapter files."""

    @abc.abstractmethod
    def init(
        self, key: jax.Array, in_features: int, out_features: int, kernel: jax.Array | None = None
    ) -> Params:
        """Makes a fresh adapter.

        Args:
            key: PRNG key, for initialisations that draw.
            in_features: width of the layer's input.
            out_features: width of the layer's output.
            kernel: the layer's own weights, `(in_features, out_features)`, for initialisations
                that start from them.

        Returns:
            The adapter's arrays, float32.

        Raises:
            ValueError: if the hyperparameters do not fit the layer.
        """

    @abc.abstractmethod
    def update(self, params: Params, x: jax.Array, out_features: int) -> jax.Array:
        """What the adapter adds to the layer's output.

        Args:
            params: arrays as `init` makes them.
            x: the layer's input, `(..., in_features)`.
            out_features: width of the layer's output.

        Returns:
            Shape `(..., out_features)`, in the dtype of `x` if that is floating.
        """

    def updates(
        self, params: Sequence[Params], x: jax.Array, out_features: Sequence[int]
    ) -> Sequence[jax.Array] | None:
        """What several adapters of this method add to their layers' outputs, from one input.

        Args:
            params: arrays of each adapter.
            x: the input of all, `(..., in_features)`.
            out_features: width of each layer's output.

        Returns:
            The update of each, or None where computing them together saves nothing.
        """
        return None

    @abc.abstractmethod
    def delta(self, params: Params, in_features: int, out_features: int) -> jax.Array:
        """What the adapter adds to the layer's kernel: dense, `(in_features, out_features)`."""

    def kernels(self, in_features: int, out_features: int) -> list[tuple[int, int, int]]:
        """Shapes of the block-circulant kernels that `update` multiplies by, first one first.

        A kernel is `(out_blocks, in_blocks, block)`; a method without circulants has none.
        """
        return []

    def learning_rates(self, in_features: int, out_features: int) -> dict[str, float]:
        """Factors on the learning rate for each of the adapter's arrays."""
        return dict.fromkeys(self.shapes(in_features, out_features), 1.0)

    def decayed(self) -> Mapping[str, bool]:
        """Which arrays weight decay may shrink; those not named may be."""
        return {}

    def apply(self, params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
        """The adapted layer's output, from its input `x` and the frozen layer's output `y`."""
        return y + self.update(params, x, y.shape[-1]).astype(y.dtype)

    def merge(self, params: Params, kernel: jax.Array) -> jax.Array:
        """The kernel of shape `(in_features, out_features)` with the adapter's part added."""
        return kernel + self.delta(params, *kernel.shape)

    def unmerge(self, params: Params, kernel: jax.Array) -> jax.Array:
        """The kernel with the adapter's part taken out again, up to rounding."""
        return kernel - self.delta(params, *kernel.shape)

    def shapes(self, in_features: int, out_features: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the adapter's arrays, without making them."""
        kernel = jax.ShapeDtypeStruct((in_features, out_features), jnp.float32)

        def init(key: jax.Array, kernel: jax.Array) -> Params:
            return self.init(key, in_features, out_features, kernel)

        return dict(jax.eval_shape(init, jax.random.key(0), kernel))

    def parameter_count(self, in_features: int, out_features: int) -> int:
        """Number of trainable parameters of one adapter."""
        shapes = self.shapes(in_features, out_features)
        return sum(math.prod(shape.shape) for shape in shapes.values())


def check_size(name: str, size: int | None, *, optional: bool = False) -> None:
    """Raises a ValueError if a size is not a positive whole number, nor None where it may be."""
    if not (optional and size is None) and not (isinstance(size, int) and size > 0):
        raise ValueError(f"`{name}` must be a positive whole number, but is {size!r}.")


def check_number(name: str, value: float) -> None:
    """Raises a ValueError if a value is not a finite number."""
    if not (isinstance(value, int | float) and math.isfinite(value)):
        raise ValueError(f"`{name}` must be a finite number, but is {value!r}.")


def check_flag(name: str, value: bool) -> None:
    """Raises a ValueError if a value is neither true nor false."""
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be true or false, but is {value!r}.")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises a ValueError with the choices if the value is none of them."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, but is {value!r}.")
