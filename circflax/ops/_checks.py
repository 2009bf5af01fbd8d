"""What the arguments of every product must be."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

Convention = Literal["column", "row"]
"""Whether a vector is the first column or the first row of its circulant matrix."""


def check_floating(**arrays: jax.Array) -> None:
    """Raises a TypeError that names the first array whose dtype is not real and floating."""
    for name, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"`{name}` must be of a real floating dtype, but is {array.dtype}.")


def check_kernel(kernel: jax.Array, name: str = "kernel") -> None:
    """Raises a ValueError if a block-circulant kernel is not of rank 3."""
    if kernel.ndim != 3:
        raise ValueError(
            f"`{name}` must have shape (out_blocks, in_blocks, block), but its shape is"
            f" {kernel.shape}."
        )


def check_convention(convention: str) -> None:
    """Raises a ValueError if a convention is unknown."""
    if convention not in get_args(Convention):
        raise ValueError(f"`convention` must be 'column' or 'row', but is {convention!r}.")


def check_vector(c: jax.Array, name: str = "c") -> None:
    """Raises a ValueError if an array is not a vector."""
    if c.ndim != 1:
        raise ValueError(f"`{name}` must be a vector of shape (n,), but its shape is {c.shape}.")
