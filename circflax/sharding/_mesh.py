"""The mesh of devices, and what lies on it in one way only."""

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA, FSDP, TENSOR = AXES = ("data", "fsdp", "tensor")
"""Names of a mesh's axes. Over `data` lie copies of the model that see other rows of a batch; over
`fsdp` other rows as well, and arrays cut up that are made whole where they are used; over `tensor`
arrays cut up that are used in parts."""


class ShardingError(ValueError):
    """Sizes of a mesh, a batch or a rule that do not fit; the message is one sentence."""


def make_mesh(
    data: int | None = None,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Arranges devices in a mesh of the axes `data`, `fsdp` and `tensor`.

    Args:
        data: how many copies of the model there are; None takes all devices that the others leave.
        fsdp: how many devices share one copy, each with its own rows of a batch.
        tensor: how many devices share the work on one row.
        devices: the devices; None is all that the program has.

    Returns:
        The mesh, whose axes are next to each other in hardware as far as possible.

    Raises:
        ShardingError: if the sizes do not multiply to the number of devices.

    Example:
        >>> import circflax as cf, jax
        >>> cf.sharding.make_mesh(devices=jax.devices()[:1]).axis_sizes
        (1, 1, 1)
    """
    devices = jax.devices() if devices is None else list(devices)
    for name, size in (("data", data), ("fsdp", fsdp), ("tensor", tensor)):
        if size is not None and size < 1:
            raise ShardingError(f"the mesh's `{name}` must be at least 1, but is {size}.")
    inner = fsdp * tensor
    if data is None:
        if len(devices) % inner:
            raise ShardingError(
                f"a mesh with `fsdp` {fsdp} × `tensor` {tensor} needs a multiple of {inner}"
                f" devices, but there are {len(devices)}."
            )
        data = len(devices) // inner
    sizes = (data, fsdp, tensor)
    if math.prod(sizes) != len(devices):
        raise ShardingError(
            f"a mesh with `data` {data} × `fsdp` {fsdp} × `tensor` {tensor} needs"
            f" {math.prod(sizes)} devices, but there are {len(devices)}."
        )
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def shard_batch(mesh: Mesh) -> NamedSharding:
    """The rows of a batch, cut up over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec((DATA, FSDP)))
