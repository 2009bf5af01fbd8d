"""What every adaptation method provides, and what follows from it."""

import abc
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

Params = Mapping[str, jax.Array]
"""The arrays of one adapter, by their names in the method's formula."""


class Flops(NamedTuple):
    """Floating-point operations of one adapter, without those of its frozen layer.

    A multiplication and an addition count as two operations, a real FFT of length n as
    `2.5 n log2 n`, a complex product with a sum as eight. In the backward pass nothing counts that
    the forward pass has computed before.

    Attributes:
        forward: of the forward pass, for each token.
        backward: of the backward pass, for each token.
        step_forward: of the forward pass, however many tokens there are.
        step_backward: of the backward pass, likewise.
    """

    forward: float
    backward: float
    step_forward: float = 0.0
    step_backward: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Method(abc.ABC):
    """Hyperparameters of one adaptation method, with the method's pure functions.

    An adapter belongs to one linear layer with a kernel of shape `(in_features, out_features)`.
    Methods that add to the layer's output derive from `Additive`; the others change what the
    frozen layer reads (`input`), what it returns (`apply`), or both.
    """

    name: ClassVar[str]
    """The method's name in configurations and adapter files."""

    learning_rate: ClassVar[float]
    """A peak learning rate to begin with, for AdamW and a schedule that ends at 0."""

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
    def apply(
        self, params: Params, x: jax.Array, y: jax.Array, bias: jax.Array | None = None
    ) -> jax.Array:
        """The adapted layer's output.

        Args:
            params: arrays as `init` makes them.
            x: the layer's input, `(..., in_features)`.
            y: the frozen layer's output for `input(params, x)`, `(..., out_features)`.
            bias: the frozen layer's bias, `(out_features,)`, which `y` contains.

        Returns:
            Shape and dtype of `y`.
        """

    @abc.abstractmethod
    def merge(self, params: Params, kernel: jax.Array) -> jax.Array:
        """The kernel of shape `(in_features, out_features)` with the adapter folded in."""

    @abc.abstractmethod
    def unmerge(self, params: Params, kernel: jax.Array) -> jax.Array:
        """The kernel with the adapter taken out again, up to rounding."""

    @abc.abstractmethod
    def flops(self, in_features: int, out_features: int) -> Flops:
        """Floating-point operations of one adapter, by the counting rules of `Flops`."""

    def input(self, params: Params, x: jax.Array) -> jax.Array:
        """What the frozen layer reads in place of its input `x`; mostly `x` itself."""
        return x

    @property
    def changes_bias(self) -> bool:
        """Whether merging changes the layer's bias too."""
        return False

    def merge_bias(self, params: Params, bias: jax.Array) -> jax.Array:
        """The bias of shape `(out_features,)` with the adapter folded in."""
        return bias

    def unmerge_bias(self, params: Params, bias: jax.Array) -> jax.Array:
        """The bias with the adapter taken out again, up to rounding."""
        return bias

    def kernels(self, in_features: int, out_features: int) -> list[tuple[int, int, int]]:
        """Shapes of the block-circulant kernels that an adapter multiplies by, first one first.

        A kernel is `(out_blocks, in_blocks, block)`; a method without circulants has none.
        """
        return []

    def axes(self) -> Mapping[str, tuple[str | None, ...]]:
        """Which axes of an adapter's arrays run along the layer's inputs or outputs.

        For each array one entry an axis: "in" or "out" where a part of the axis belongs to the same
        part of the layer's inputs or outputs, None elsewhere. Of arrays that are not named, no axis
        does.
        """
        return {}

    def learning_rates(self, in_features: int, out_features: int) -> dict[str, float]:
        """Factors on the learning rate for each of the adapter's arrays."""
        return dict.fromkeys(self.shapes(in_features, out_features), 1.0)

    def decayed(self) -> Mapping[str, bool]:
        """Which arrays weight decay may shrink; those not named may be."""
        return {}

    def frozen(self) -> Collection[str]:
        """Arrays of an adapter that are saved with it but never train."""
        return ()

    def training(self, progress: jax.Array) -> Mapping[str, jax.Array]:
        """Factors on updates, by the part of all steps that are done, from 0 to 1.

        Arrays that are not named train from the first step to the last.
        """
        return {}

    def shapes(self, in_features: int, out_features: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the adapter's arrays, without making them."""
        return dict(_shapes(self, in_features, out_features))

    def parameter_count(self, in_features: int, out_features: int) -> int:
        """Number of trainable parameters of one adapter."""
        shapes = self.shapes(in_features, out_features)
        return sum(math.prod(s.shape) for name, s in shapes.items() if name not in self.frozen())


# Every layer of a model asks, and most have the same sizes.
@lru_cache
def _shapes(method: Method, in_features: int, out_features: int) -> Params:
    kernel = jax.ShapeDtypeStruct((in_features, out_features), jnp.float32)

    def init(key: jax.Array, kernel: jax.Array) -> Params:
        return method.init(key, in_features, out_features, kernel)

    return jax.eval_shape(init, jax.random.key(0), kernel)


@dataclass(frozen=True, kw_only=True)
class Additive(Method):
    """A method whose adapters add a linear function of the input to the layer's output.

    A method defines the function and its matrix; applying and merging follow from that.
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

    def apply(
        self, params: Params, x: jax.Array, y: jax.Array, bias: jax.Array | None = None
    ) -> jax.Array:
        return y + self.update(params, x, y.shape[-1]).astype(y.dtype)

    def merge(self, params: Params, kernel: jax.Array) -> jax.Array:
        return kernel + self.delta(params, *kernel.shape)

    def unmerge(self, params: Params, kernel: jax.Array) -> jax.Array:
        return kernel - self.delta(params, *kernel.shape)


def circulant_flops(kernels: Sequence[tuple[int, int, int]]) -> Flops:
    """Operations of products with block-circulant kernels, by transforms, one after the other."""
    forward = backward = step = 0.0
    for out_blocks, in_blocks, block in kernels:
        transform = 2.5 * block * math.log2(block)
        products = 4.0 * out_blocks * in_blocks * block
        forward += (out_blocks + in_blocks) * transform + products
        backward += (out_blocks + in_blocks) * transform + 2 * products
        step += out_blocks * in_blocks * transform
    return Flops(forward, backward, step, step)


def check_size(name: str, size: int | None, *, optional: bool = False) -> None:
    """Raises a ValueError if a size is not a positive whole number, nor None where it may be."""
    if not (optional and size is None) and not (isinstance(size, int) and size > 0):
        raise ValueError(f"`{name}` must be a positive whole number, but is {size!r}.")


def check_seed(name: str, seed: int) -> None:
    """Raises a ValueError if a seed is not a whole number from 0 up."""
    if isinstance(seed, bool) or not (isinstance(seed, int) and 0 <= seed < 2**32):
        raise ValueError(f"`{name}` must be a whole number from 0 to 2^32 - 1, but is {seed!r}.")


def check_number(name: str, value: float) -> None:
    """Raises a ValueError if a value is not a finite number."""
    if not (isinstance(value, int | float) and math.isfinite(value)):
        raise ValueError(f"`{name}` must be a finite number, but is {value!r}.")


def check_flag(name: str, value: bool) -> None:
    """Raises a ValueError if a value is neither true nor false."""
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be true or false, but is {value!r}.")


def divisors(number: int) -> list[int]:
    """The whole numbers that divide a number, smallest first."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises a ValueError with the choices if the value is none of them."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, but is {value!r}.")
