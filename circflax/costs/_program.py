"""What XLA says of a program that it compiled; nothing is executed."""

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.stages import Compiled

_CONSTANT = re.compile(r"= (?:pred|[a-z]+(\d+)\w*)\[([\d,]+)\]\S* constant\(")


@dataclass(frozen=True, kw_only=True)
class Program:
    """One compiled program in numbers.

    Attributes:
        flops: floating-point operations by XLA's own count. It counts the body of a loop once,
            and a transform of length n as 8 n floor(log2 n), real or not.
        peak_memory: bytes in use at most; see `peak_memory`.
        seconds: what tracing and compiling took.
    """

    flops: float
    peak_memory: int
    seconds: float


def compile_program(function: Callable[..., Any], *arguments: Any) -> Program:
    """Compiles a function for the default device and asks XLA what it costs.

    Args:
        function: the function, jitted or not.
        arguments: trees of `jax.ShapeDtypeStruct`s or arrays.

    Returns:
        The program's costs.

    Example:
        >>> import jax
        >>> from circflax.costs import compile_program
        >>> square = jax.ShapeDtypeStruct((64, 64), "float32")
        >>> program = compile_program(lambda x, y: x @ y, square, square)
        >>> program.flops, program.peak_memory
        (524288.0, 49152)
    """
    start = time.perf_counter()
    # A function that is jitted already keeps its donations.
    jitted = function if hasattr(function, "lower") else jax.jit(function)
    compiled = jitted.lower(*arguments).compile()
    seconds = time.perf_counter() - start
    return Program(
        flops=(compiled.cost_analysis() or {}).get("flops", 0.0),
        peak_memory=peak_memory(compiled),
        seconds=seconds,
    )


def peak_memory(compiled: Compiled) -> int:
    """Bytes of memory that a compiled program uses at most.

    Its arguments are included, and the arrays that it closes over as constants.

    Args:
        compiled: as `jax.jit(function).lower(...).compile()` returns it.

    Returns:
        The number of bytes.

    Example:
        >>> import jax, numpy as np
        >>> from circflax.costs import peak_memory
        >>> table = np.sin(np.arange(1024, dtype="float32"))
        >>> x = jax.ShapeDtypeStruct((1024,), "float32")
        >>> peak_memory(jax.jit(lambda x: x * table).lower(x).compile())  # both, and the result
        12288
    """
    stats = compiled.memory_analysis()
    (device, *_) = jax.tree.leaves(compiled.output_shardings)[0].device_set
    if device.platform != "cpu":
        return stats.peak_memory_in_bytes
    # On CPU the peak leaves out temporary arrays, which live in one allocation, and constants.
    arrays = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return arrays + stats.temp_size_in_bytes + _constants(compiled.as_text())


def _constants(program: str) -> int:
    """Bytes of the arrays that a program holds itself."""
    return sum(
        math.prod(map(int, sizes.split(","))) * int(bits or 8) // 8
        for bits, sizes in _CONSTANT.findall(program)
    )
