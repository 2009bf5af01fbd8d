"""How a layer's kernel is read as a matrix."""

import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

_ROLES = ("layer", "in", "out")


@dataclass(frozen=True)
class Layout:
    """What each axis of a kernel, and of its layer's input and output, stands for.

    Attributes:
        roles: for each axis of the kernel "layer" (an axis that `nn.scan` or `nn.vmap` added in
            front), "in" (contracted with the input) or "out" (appears in the output).
        x_axes: the input's axes that the "in" axes contract with, counted from the end.
        y_axes: the output's axes that the "out" axes become, counted from the end.
        source: the name of the first layer of its module that reads the very same input, where
            several do, as query, key and value.

    Example:
        >>> Layout.parse("in,out")  # nn.Dense
        Layout(roles=('in', 'out'), x_axes=(-1,), y_axes=(-1,))
        >>> Layout.parse("in,out,out").y_axes  # queries of several heads
        (-2, -1)
    """

    roles: tuple[str, ...]
    x_axes: tuple[int, ...]
    y_axes: tuple[int, ...]
    source: str | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        layers = self.roles.count("layer")
        if (
            not set(self.roles) <= set(_ROLES)
            or self.roles[:layers] != ("layer",) * layers
            or self.roles.count("in") != len(self.x_axes)
            or self.roles.count("out") != len(self.y_axes)
            or not self.x_axes
            or not self.y_axes
        ):
            raise ValueError(
                "a layout names each axis of the kernel 'layer' (in front only), 'in' or 'out',"
                f" with at least one 'in' and one 'out', but it is {','.join(self.roles)!r}."
            )

    @classmethod
    def parse(cls, text: str) -> "Layout":
        """Reads comma-separated roles; inputs and outputs are the trailing axes of x and y."""
        roles = tuple(role.strip() for role in text.split(","))
        x_axes = tuple(range(-roles.count("in"), 0))
        y_axes = tuple(range(-roles.count("out"), 0))
        return cls(roles, x_axes, y_axes)

    def sizes(self, shape: tuple[int, ...], role: str) -> tuple[int, ...]:
        """The sizes of a kernel's axes with one role."""
        return tuple(n for n, r in zip(shape, self.roles, strict=True) if r == role)

    def matrix(self, kernel: jax.Array) -> jax.Array:
        """The kernel as `(*layers, in_features, out_features)`."""
        shape = (
            *self.sizes(kernel.shape, "layer"),
            math.prod(self.sizes(kernel.shape, "in")),
            math.prod(self.sizes(kernel.shape, "out")),
        )
        return kernel.transpose(self._order()).reshape(shape)

    def kernel(self, matrix: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The kernel of a given shape from its matrix: the inverse of `matrix`."""
        order = self._order()
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return matrix.reshape([shape[axis] for axis in order]).transpose(inverse)

    def flat_input(self, x: jax.Array) -> jax.Array:
        """The layer's input as `(..., in_features)`."""
        n = len(self.x_axes)
        x = jnp.moveaxis(x, self.x_axes, range(-n, 0))
        return x.reshape(*x.shape[:-n], -1)

    def input(self, flat: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The layer's input of a given shape from its flat form: the inverse of `flat_input`."""
        return _unflattened(flat, shape, self.x_axes)

    def flat_output(self, y: jax.Array) -> jax.Array:
        """The layer's output as `(..., out_features)`."""
        n = len(self.y_axes)
        y = jnp.moveaxis(y, self.y_axes, range(-n, 0))
        return y.reshape(*y.shape[:-n], -1)

    def output(self, flat: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The layer's output of a given shape from its flat form: the inverse of `flat_output`."""
        return _unflattened(flat, shape, self.y_axes)

    def to_json(self) -> dict[str, Any]:
        """The layout as JSON can hold it."""
        axes = {"x_axes": self.x_axes, "y_axes": self.y_axes}
        return {"roles": ",".join(self.roles), **axes, "source": self.source}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Layout":
        """Reads what `to_json` wrote."""
        axes = tuple(data["x_axes"]), tuple(data["y_axes"])
        return cls(tuple(data["roles"].split(",")), *axes, data.get("source"))

    def _order(self) -> list[int]:
        """The kernel's axes with layers first, inputs next and outputs last."""
        return sorted(range(len(self.roles)), key=lambda axis: _ROLES.index(self.roles[axis]))


def _unflattened(flat: jax.Array, shape: tuple[int, ...], axes: tuple[int, ...]) -> jax.Array:
    """An array of a given shape from one whose last axis holds several of its axes."""
    sizes = [shape[axis] for axis in axes]
    array = flat.reshape(*flat.shape[:-1], *sizes)
    return jnp.moveaxis(array, range(-len(sizes), 0), axes)
