"""Ways to divide parameters among eight devices, and a count of what is read for them."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import circflax as cf


def divide(rows: Any, columns: Any) -> Callable[[Any], Any]:
    """Divides the first and the last axis of each leaf by axes of a mesh that divide them."""
    mesh = cf.sharding.make_mesh(2, 2, 2)

    def fitting(size: int, axes: Any) -> Any:
        names = axes if isinstance(axes, tuple) else (axes,)
        return axes if axes and size % math.prod(mesh.shape[name] for name in names) == 0 else None

    def sharding(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        match leaf.shape:
            case ():
                return NamedSharding(mesh, P())
            case (size,):
                return NamedSharding(mesh, P(fitting(size, columns)))
            case (first, *others, last):
                between = [None] * (len(others))
                return NamedSharding(
                    mesh, P(fitting(first, rows), *between, fitting(last, columns))
                )

    return lambda shapes: jax.tree.map(sharding, shapes)


SHARDS = {
    "replicated": divide(None, None),
    "some": divide("tensor", "fsdp"),
    "all": divide(("data", "fsdp"), "tensor"),
    "rules": partial(cf.sharding.shard_params, mesh=cf.sharding.make_mesh(2, 2, 2)),
}


class Counted:
    """An array that counts the bytes that are taken from it."""

    def __init__(self, array: np.ndarray, taken: list[int]) -> None:
        self._array, self._taken = array, taken

    def transpose(self, axes: tuple[int, ...]) -> "Counted":
        return Counted(self._array.transpose(axes), self._taken)

    def __getitem__(self, index: Any) -> np.ndarray:
        part = self._array[index]
        self._taken.append(part.nbytes)
        return part
