"""What lies where, as a table."""

import math

from jax.sharding import NamedSharding

from circflax.sharding._rules import names_of
from circflax.tree import Tree
from circflax.tree._paths import flatten, join, starred
from circflax.tree._plan import bytes_of
from circflax.tree._summary import human_bytes

# Longer names lose their beginning, so that the table fits a terminal.
_NAME = 40


def tabulate(params: Tree, shardings: Tree) -> str:
    """Lists every array with how it is cut up and its bytes on each device.

    Arrays that differ in their layer's number alone share a line.

    Args:
        params: a tree of arrays or `jax.ShapeDtypeStruct`s.
        shardings: a tree like it, as `shard_params` or `shard_adapters` gives it.

    Returns:
        A table of mostly 80 columns, with the sums in its last line.

    Example:
        >>> import circflax as cf, jax, jax.numpy as jnp
        >>> params = {str(i): {"fc1": {"kernel": jnp.zeros((64, 256))}} for i in range(2)}
        >>> mesh = cf.sharding.make_mesh(devices=jax.devices()[:1])
        >>> print(cf.sharding.tabulate(params, cf.sharding.shard_params(params, mesh)))
        array         shape     cut up over  count  per device
        */fc1/kernel  64 x 256  nothing          2      131 kB
        total 131 kB, per device 131 kB
    """
    known = flatten(shardings)
    groups: dict[tuple[str, str, str], list[int]] = {}
    whole = 0
    for path, leaf in flatten(params).items():
        name = starred(join(path))
        name = name if len(name) <= _NAME else "…" + name[1 - _NAME :]
        shape = " x ".join(map(str, leaf.shape)) or "scalar"
        own = math.prod(known[path].shard_shape(leaf.shape)) * leaf.dtype.itemsize
        groups.setdefault((name, shape, _describe(known[path])), []).append(own)
        whole += bytes_of(leaf)
    rows = [("array", "shape", "cut up over", "count", "per device")]
    rows += [(*group, str(len(sizes)), human_bytes(sum(sizes))) for group, sizes in groups.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        padded = [cell.ljust(width) for cell, width in zip(row[:3], widths, strict=False)]
        padded += [cell.rjust(width) for cell, width in zip(row[3:], widths[3:], strict=True)]
        lines.append("  ".join(padded))
    each = sum(map(sum, groups.values()))
    return "\n".join([*lines, f"total {human_bytes(whole)}, per device {human_bytes(each)}"])


def _describe(sharding: NamedSharding) -> str:
    """The mesh's axes that cut up each axis of an array; "-" for an axis that is whole."""
    sizes = sharding.mesh.shape
    cut = [[name for name in names_of(entry) if sizes[name] > 1] for entry in sharding.spec]
    if not any(cut):
        return "nothing"
    return ", ".join("+".join(names) or "-" for names in cut)
