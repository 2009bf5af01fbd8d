"""TPU slices that programs are compiled for, without a TPU."""

import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax


@dataclass(frozen=True)
class Chip:
    """One kind of chip.

    Attributes:
        memory: Bytes of its main memory that a program can have.
        flops: Operations in bfloat16 in a second, at most.
        clock: Cycles in a second.
        bandwidth: Bytes of its main memory read or written in a second.
        interconnect: Bytes that it sends to other chips in a second, over all its links together,
            while it receives as many.
        sides: How many sides a slice of such chips has.
        options: What the compiler has to be told besides the slice.
    """

    memory: int
    flops: float
    clock: float
    bandwidth: float
    interconnect: float
    sides: int
    options: dict[str, Any] = field(default_factory=dict)


# What the TPU compiler needs to start without a TPU; to be set before JAX is imported.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # Nothing is there that could read a program back from JAX's cache.
    "JAX_ENABLE_COMPILATION_CACHE": "false",
}
_GIB = 2**30
# Published figures: https://cloud.google.com/tpu/docs/v5e, and likewise v5p, v6e and v4. Of the
# 16, 95, 32 and 32 GB of memory those that the compiler gives to programs are less. The clock is
# what the operations come to: 4 and 8 matrix units of 128 x 128, 4 of 256 x 256, 8 of 128 x 128.
# Of the interconnect the figures in Gbit/s: 1600, 4800, 3200 and 2400.
CHIPS = {
    "v5e": Chip(int(15.75 * _GIB), 197e12, 1.50e9, 819e9, 200e9, 2),
    "v5p": Chip(int(95.74 * _GIB), 459e12, 1.75e9, 2765e9, 600e9, 3),
    "v6e": Chip(int(31.25 * _GIB), 918e12, 1.75e9, 1600e9, 400e9, 2),
    # Its two cores are one device, as they are where such a chip is.
    "v4": Chip(
        int(30.75 * _GIB), 275e12, 1.05e9, 1228e9, 300e9, 3, {"chip_config_name": "megacore"}
    ),
}


@dataclass(frozen=True)
class Topology:
    """A slice of chips.

    Attributes:
        name: Such as "v5e:4x4".
        chip: Their kind.
        devices: The chips, for a mesh; they only compile.
    """

    name: str
    chip: Chip
    devices: "tuple[jax.Device, ...]"


def find_topology(name: str) -> Topology:
    """Starts the TPU compiler for a slice.

    Args:
        name: Kind of chip and sides of the slice, such as "v5e:4x4"; one chip is "v5e:1x1".

    Returns:
        The slice.

    Raises:
        ValueError: If there is no such kind or shape, or the TPU compiler is not installed.
    """
    chip = CHIPS.get(name.partition(":")[0])
    known = "; ".join(f"{kind}: {', '.join(_examples(each))}" for kind, each in CHIPS.items())
    wrong = ValueError(f"there is no topology `{name}`; there are, among others, {known}.")
    if chip is None or not re.fullmatch(rf"\w+:\d+(x\d+){{{chip.sides - 1}}}", name):
        raise wrong
    from jax.errors import JaxRuntimeError
    from jax.experimental import topologies

    alone = math.prod(map(int, re.findall(r"\d+", name.partition(":")[2]))) == 1
    bounds = {"chips_per_host_bounds": (1, 1, 1)} if alone else {}
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=name, **bounds, **chip.options
        )
    except JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise _missing(error) from None
        raise wrong from None
    except (RuntimeError, ImportError) as error:
        raise _missing(error) from None
    return Topology(name, chip, tuple(found.devices))


def _examples(chip: Chip) -> list[str]:
    one, host, more = "x".join("1" * chip.sides), [2, 2, 1][: chip.sides], [4, 4, 4][: chip.sides]
    return [one, "x".join(map(str, host)), "x".join(map(str, more))]


def _missing(error: Exception) -> ValueError:
    return ValueError(
        "the TPU compiler does not start; `pip install 'circflax[tpu-compiler]'` brings it"
        f" ({str(error).splitlines()[0]})."
    )
