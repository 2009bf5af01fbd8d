"""What a GPU needs for the same cases by what its compiler makes of them, without a GPU.

Nothing is executed, and this compiler estimates no times. Each kernel of the optimised program is
taken to need what its arrays take to be read and written, or what its matrix product takes to be
computed, whichever is more, at the data sheet's rates, and a moment to start: a lower bound, by
which programs can be compared whose kernels are of the same kinds.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rich.progress import track

from benchmarks import layers, steps
from benchmarks.compiling import compile_for, programs
from benchmarks.results import Record, Results, by_case, markdown_table
from circflax.costs import peak_memory
from train.plan import hlo

# NVIDIA's data sheet of the H100 SXM: bytes a second, and operations a second of dense products
# by dtype, float32 as TF32.
_BANDWIDTH = {"h100": 3.35e12}
_PRODUCTS = {"h100": {"bf16": 989e12, "f32": 494e12}}
# Seconds from one kernel of a CUDA graph to the next.
_START = 2e-6
# What runs computations whose instructions are kernels of their own, and what is no kernel at all.
_CONTROL = {"while", "call", "conditional"}
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
_PARTIAL_READS = {"slice", "dynamic-slice", "gather"}


class Estimate(NamedTuple):
    """What is expected of one program.

    Attributes:
        seconds: at least.
        kernels: that it runs.
        bytes: that they read and write.
        flops: of matrix products.
        peak: bytes of memory in use at most, by the compiler; what cuFFT takes is not in it.
        compile: seconds that compiling took here.
    """

    seconds: float
    kernels: int
    bytes: int
    flops: int
    peak: int
    compile: float


class Kernel(NamedTuple):
    """One kernel of a program.

    Attributes:
        bytes: read and written.
        flops: of its matrix product, or 0.
        dtype: of the product's operands, or "".
        times: how often it runs.
    """

    bytes: int
    flops: int
    dtype: str
    times: int


def estimate(chip: str, function: Callable[..., Any], arguments: Sequence[Any]) -> Estimate:
    """Compiles a function for one GPU of a kind, from shapes.

    Raises:
        ValueError: if the GPU compiler is not installed.
    """
    compiled, seconds = compile_for(chip, function, arguments)
    kernels = read_kernels(compiled.as_text())
    return Estimate(
        seconds=sum(kernel.times * _seconds(chip, kernel) for kernel in kernels),
        kernels=sum(kernel.times for kernel in kernels),
        bytes=sum(kernel.times * kernel.bytes for kernel in kernels),
        flops=sum(kernel.times * kernel.flops for kernel in kernels),
        peak=peak_memory(compiled),
        compile=seconds,
    )


def _seconds(chip: str, kernel: Kernel) -> float:
    computing = kernel.flops / _PRODUCTS[chip][kernel.dtype] if kernel.flops else 0.0
    return max(kernel.bytes / _BANDWIDTH[chip], computing) + _START


def read_kernels(text: str) -> list[Kernel]:
    """The kernels of an optimised GPU program.

    Args:
        text: As `compiled.as_text()` gives it.

    Returns:
        What they read, write and multiply.
    """
    computations, entry = hlo.parse(text)
    times, _ = hlo.count_runs(computations, entry)
    kernels = []
    # What several instructions run counts once here, and in `times` as often as it runs.
    for name in dict.fromkeys(_running(computations, entry)):
        types = {each.name: each.type for each in computations[name]}
        for each in computations[name]:
            if each.opcode not in _FREE | _CONTROL:
                flops, dtype = _matrix_product(each, types)
                size = _bytes(each, types, computations)
                kernels.append(Kernel(size, flops, dtype, times[name]))
    return kernels


def _running(computations: hlo.Computations, name: str) -> Iterator[str]:
    """The computations whose instructions are kernels of their own."""
    yield name
    for each in computations[name]:
        if each.opcode in _CONTROL:
            for called in each.called:
                yield from _running(computations, called)


def _bytes(
    instruction: hlo.Instruction, types: Mapping[str, str], computations: hlo.Computations
) -> int:
    # What cuBLAS has for itself beside its result is no traffic.
    written = sum(array.bytes for array in hlo.arrays(instruction.type) if array.dtype != "s8")
    fused = computations[instruction.called[0]] if instruction.opcode == "fusion" else ()
    parameters = {
        int(each.rest.partition(")")[0]): each.name for each in fused if each.opcode == "parameter"
    }
    read = 0
    for i, operand in enumerate(instruction.operands):
        readers = [each for each in fused if parameters.get(i) in each.operands]
        partly = (
            each.opcode in _PARTIAL_READS and each.operands[0] == parameters[i] for each in readers
        )
        if readers and all(partly):
            read += sum(_size(each.type) for each in readers)
        else:
            read += _size(types[operand])
    return written + read


def _size(type_: str) -> int:
    return sum(array.bytes for array in hlo.arrays(type_))


def _matrix_product(instruction: hlo.Instruction, types: Mapping[str, str]) -> tuple[int, str]:
    """Operations of a product that cuBLAS computes, and its dtype; none of anything else."""
    if not re.search(r'custom_call_target="__cublas\$(gemm|lt\$matmul)', instruction.rest):
        return 0, ""
    (left,) = hlo.arrays(types[instruction.operands[0]])
    result, *_ = hlo.arrays(instruction.type)
    summed = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.rest)[1]
    length = math.prod(left.shape[int(axis)] for axis in re.findall(r"\d+", summed))
    return 2 * length * math.prod(result.shape), left.dtype


def grid(chip: str, quick: bool) -> list[Record]:
    """The cases: the layers of the suite `gpu`, also with fewer and more tokens, and its steps."""
    cases = layers.gpu_grid(quick)
    if not quick:
        cases = [{**case, "tokens": tokens} for tokens in (4096, 1024, 16384) for case in cases]
        cases += steps.grid(quick, "bfloat16")
    return [{"chip": chip, **case} for case in cases]


def run(results: Results, suite: str, chip: str, quick: bool) -> None:
    """Compiles what is missing."""
    for case in track(list(results.missing(suite, grid(chip, quick))), "compiling for GPU"):
        measured = {}
        for name, program in programs(case, "cuda").items():
            expected = estimate(chip, program.function, program.arguments)
            measured[name] = expected._asdict() | {"chosen": program.chosen}
        results.add(suite, case, measured)


def table(records: Sequence[Record]) -> str:
    """Least times, ratios to LoRA, and what they come from, a table a case."""
    sections = []
    for case, of in by_case(records):
        lora = of.get(layers.LORA) or of["lora"]
        rows = [
            [
                name + ("*" if record["chosen"] else ""),
                f"{1e6 * record['seconds']:,.0f}",
                f"{record['seconds'] / lora['seconds']:.3f}",
                f"{record['kernels']}",
                f"{record['bytes'] / 1e6:,.0f}",
                f"{record['flops'] / 1e9:,.1f}",
                f"{record['peak'] / 1e6:,.1f}",
                f"{record['peak'] / lora['peak']:.4f}",
                f"{record['compile']:.1f}",
            ]
            for name, record in of.items()
        ]
        header = ["at least", "µs", "/ lora", "kernels", "MB moved", "GFLOP", "peak MB", "/ lora"]
        title = ", ".join(f"{key} {value}" for key, value in case.items())
        sections.append(f"{title}\n\n{markdown_table([*header, 'compile s'], rows)}")
    return "\n\n".join(sections)
