"""Stored tensors into arrays: each device's part alone is read, cast and handed over."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Sharding

from circflax.interop._tensors import CheckpointError, LeafPath

Shard = Callable[[Any], Any]
"""From a tree of shapes to the tree of the shardings that arrays of these shapes get."""


def place_leaves(
    shapes: Mapping[LeafPath, jax.ShapeDtypeStruct], shard: Shard | None
) -> dict[LeafPath, jax.ShapeDtypeStruct]:
    """Asks where leaves are to go.

    Args:
        shapes: The leaves' shapes and dtypes by path.
        shard: Says where each goes; None leaves all on the default device.

    Returns:
        The shapes with the shardings.

    Raises:
        CheckpointError: If the answer is not one sharding for each leaf, or one does not fit.
    """
    if shard is None:
        return dict(shapes)
    answer, _ = jax.tree_util.tree_flatten_with_path(shard(unflatten_dict(shapes)))
    shardings = {
        jax.tree_util.keystr(path, simple=True, separator="/"): each for path, each in answer
    }
    names = {path: "/".join(path) for path in shapes}
    if unknown := sorted(shardings.keys() - names.values()):
        raise CheckpointError(f"`shard` places `{unknown[0]}`, which is no parameter of the model.")
    for path, leaf in shapes.items():
        sharding = shardings.get(names[path])
        if not isinstance(sharding, Sharding):
            raise CheckpointError(
                f"`shard` gives the parameter `{names[path]}` no `jax.sharding.Sharding`, but"
                f" `{sharding}`."
            )
        try:
            sharding.shard_shape(leaf.shape)
        except (ValueError, IndexError) as error:
            raise CheckpointError(
                f"`shard` divides the parameter `{names[path]}` of shape {leaf.shape} by"
                f" {sharding}, which does not fit."
            ) from error
    return {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[names[path]])
        for path, leaf in shapes.items()
    }


def read_leaf(stored: np.ndarray, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """Makes an array of a stored leaf.

    Args:
        stored: The leaf in whatever dtype, usually a view of a file: of it, only what the devices
            of this process need is read, and that once.
        leaf: The array's dtype and sharding; without one it goes to the default device.

    Returns:
        The array, which shares no memory with `stored`.
    """
    parts: dict[str, np.ndarray] = {}

    def read(index: tuple[slice, ...]) -> np.ndarray:
        # Devices that hold the same part share one reading of it.
        if (key := str(index)) not in parts:
            parts[key] = np.array(stored[index], leaf.dtype)
        return parts[key]

    if leaf.sharding is None:
        # Bound to no device, so that it can still be used beside arrays of any.
        array = jnp.asarray(read(()))
    else:
        array = jax.make_array_from_callback(leaf.shape, leaf.sharding, read, leaf.dtype)
    # Transfers run on by themselves: host copies of many leaves would wait for theirs.
    return array.block_until_ready()
