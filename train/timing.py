"""Time of functions, and what it depends on."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax


class Timing(NamedTuple):
    """Wall times of one function, in seconds.

    Attributes:
        median: of the counted runs.
        fastest: of the counted runs.
        runs: how many were counted.
    """

    median: float
    fastest: float
    runs: int


def time_interleaved(
    functions: Mapping[str, Callable[[], Any]], *, rounds: int, budget: float
) -> dict[str, Timing]:
    """Times functions in turn, A B C A B C …, so that a drift of the machine meets all of them.

    Args:
        functions: each runs once and returns when its work is done.
        rounds: runs of each that count; one more comes before, for compiling and warming up.
        budget: seconds for the counted runs of one function: a slow one gets fewer, at least two.

    Returns:
        The times, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            if len(times[name]) >= 2 and sum(times[name]) > budget:
                continue
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {
        name: Timing(statistics.median(runs), min(runs), len(runs)) for name, runs in times.items()
    }


def describe_machine() -> dict[str, str]:
    """What the numbers depend on.

    Returns:
        The device, its cores and the versions of Python and JAX, in words.
    """
    device = jax.devices()[0]
    return {
        "device": device.device_kind if device.platform != "cpu" else _processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
