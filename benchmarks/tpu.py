"""What the TPU compiler expects of the same cases, without a TPU: nothing is executed.

Cycles are the compiler's own estimates, summed over the optimised program; for the library's
kernels, which it does not estimate, the length of their schedule times the steps of their grid, or
what moving their operands takes, whichever is more.
"""

import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.results import Record, Results, markdown_table

_DUMP = Path(tempfile.gettempdir()) / "circflax-tpu-schedules"


class Chip(NamedTuple):
    """One chip that programs are compiled for, alone.

    Attributes:
        topology: the compiler's name for it.
        bounds: how many chips a host has along each axis, or None for the compiler's own.
        clock: cycles in a second.
        bandwidth: bytes of its main memory read or written in a second.
    """

    topology: str
    bounds: tuple[int, int, int] | None
    clock: float
    bandwidth: float


# Clock and bandwidth from Google's published figures: 197 and 459 bf16 TFLOP/s of 4 and 8 matrix
# units of 128 x 128, 819 and 2765 GB/s.
CHIPS = {
    "v5e": Chip("v5e:1x1", (1, 1, 1), 1.50e9, 819e9),
    "v5p": Chip("v5p:2x2x1", None, 1.75e9, 2765e9),
}


def set_environment() -> None:
    """What the TPU compiler needs to start without a TPU; before JAX is imported."""
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        # The schedules of kernels come in text files alone.
        "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={_DUMP} --xla_jf_dump_llo_text=true",
    }


class Estimate(NamedTuple):
    """What the compiler expects of one program.

    Attributes:
        cycles: of the whole program.
        seconds: the cycles by the chip's clock.
        peak: bytes of its memory in use at most.
        bytes: read and written, by the compiler's count.
        compile: seconds that compiling took here.
    """

    cycles: float
    seconds: float
    peak: int
    bytes: float
    compile: float


def estimate(chip: Chip, function: Callable[..., Any], arguments: Sequence[Any]) -> Estimate:
    """Compiles a function for one chip, from shapes.

    Raises:
        ValueError: if the TPU compiler is not installed.
    """
    import jax
    import numpy as np
    from jax.experimental import topologies

    options = {} if chip.bounds is None else {"chips_per_host_bounds": chip.bounds}
    try:
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=chip.topology, **options
        )
    except (RuntimeError, ImportError) as error:
        raise ValueError(
            "the TPU compiler does not start; `pip install 'circflax[tpu-compiler]'` brings it"
            f" ({str(error).splitlines()[0]})."
        ) from None
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("chip",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arguments = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), arguments
    )
    shutil.rmtree(_DUMP, ignore_errors=True)
    _DUMP.mkdir(parents=True)
    lowered = jax.jit(function).lower(*arguments)
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    program = compiled.as_text()
    cycles = _program_cycles(program) + _kernel_cycles(program, chip)
    shutil.rmtree(_DUMP)
    return Estimate(
        cycles=cycles,
        seconds=cycles / chip.clock,
        peak=compiled.memory_analysis().peak_memory_in_bytes,
        bytes=compiled.cost_analysis().get("bytes accessed", 0.0),
        compile=seconds,
    )


def _program_cycles(program: str) -> int:
    """The compiler's estimates of a program's instructions, summed."""
    cycles = map(int, re.findall(r'"estimated_cycles":"(\d+)"', program))
    # Of what runs beside everything else it says that it never ends.
    return sum(count for count in cycles if count < 2**40)


# Bundles of the loops that expand, or sum, one Toeplitz matrix: read in the kernels' schedules.
_BUNDLES_OF_LOOP = 250


def _kernel_cycles(program: str, chip: Chip) -> float:
    """Cycles of the library's own kernels: by their schedules, or by their traffic if more."""
    from circflax.ops import _fused

    bundles = {}
    for path in _DUMP.glob("*schedule-analysis_final_bundles.txt"):
        name = re.fullmatch(r"\d+-(.*)-\d+-schedule-analysis_final_bundles", path.stem)[1]
        bundles[name] = int(re.search(r"total scheduled bundles:\s*(\d+)", path.read_text())[1])
    cycles = 0.0
    for line in program.splitlines():
        if 'custom_call_target="tpu_custom_call"' not in line:
            continue
        name = re.search(r"%([\w.\-]+) = ", line)[1]
        shapes = [
            (kind, tuple(map(int, sizes.split(","))))
            for kind, sizes in re.findall(r"(bf16|f32)\[([\d,]+)\]", line.split("metadata=")[0])
        ]
        widths = [sizes for kind, sizes in shapes if kind == "bf16"]
        tokens = widths[0][0]
        matrices = max(sizes[0] for kind, sizes in shapes if kind == "f32" and sizes[-1] == 256)
        steps = tokens // _fused.tile_size(tokens, *(sizes[1] for sizes in widths))
        traffic = sum({"bf16": 2, "f32": 4}[kind] * math.prod(sizes) for kind, sizes in shapes)
        cycles += max(
            steps * bundles[name] + matrices * _BUNDLES_OF_LOOP,
            traffic / chip.bandwidth * chip.clock,
        )
    return cycles


def grid(quick: bool) -> list[Record]:
    """The cases: single layers, then training steps."""
    from benchmarks import steps

    shapes = [(4096, 768, 768), (4096, 768, 128), (4096, 4096, 4096), (4096, 4096, 1024)]
    layers = [
        {"tokens": tokens, "features": features, "block": block, "dtype": "bfloat16"}
        for tokens, features, block in shapes
    ]
    if quick:
        return [{"chip": "v5e", **layers[0]}]
    step = steps.grid(quick, "bfloat16")[0]
    return [{"chip": chip, **case} for chip in CHIPS for case in (*layers, step)]


def run(results: Results, suite: str, quick: bool) -> None:
    """Compiles what is missing."""
    from rich.progress import track

    for case in track(list(results.missing(suite, grid(quick))), "compiling for TPU"):
        chip = CHIPS[case["chip"]]
        programs = _steps(case) if "model" in case else _layers(case)
        measured = {}
        for name, (function, arguments, chosen) in programs.items():
            measured[name] = estimate(chip, function, arguments)._asdict() | {"chosen": chosen}
        results.add(suite, case, measured)


def _layers(case: Record) -> Mapping[str, tuple]:
    import jax
    import jax.numpy as jnp

    from benchmarks import layers
    from circflax import ops

    tokens, features = case["tokens"], case["features"]
    x = jax.ShapeDtypeStruct((tokens, features), jnp.bfloat16)
    kernel = jax.ShapeDtypeStruct((features, features), jnp.bfloat16)
    product = layers.product_of(case, "tpu")
    chosen = ops.choose_form(product).strategy
    programs = {"frozen": (layers.frozen_gradient, (kernel, x, x), False)}
    for name, update, shapes in layers.updates(case, "tpu"):
        method, _, strategy = name.partition(" ")
        # FFTs take minutes to compile: one is enough to see what they would cost.
        square = case["block"] == features and case["chip"] == "v5e"
        if (strategy == "fft" and not (square and method == "c3a")) or name == "cdvft dft":
            continue
        function = partial(layers.gradient, update)
        programs[name] = (function, (shapes, x, x), name.endswith(f" {chosen}"))
    return programs


def _steps(case: Record) -> Mapping[str, tuple]:
    from benchmarks import steps

    made = {name: steps.make_step(case, name) for name in steps.names()}
    return {name: (step.run, step.arguments, False) for name, step in made.items()}


def table(records: Sequence[Record]) -> str:
    """Estimated times, ratios to LoRA, peak memory and time to compile, a table a case."""
    from benchmarks.layers import LORA
    from benchmarks.steps import BIASES

    sections = []
    for case in {str(record["case"]): record["case"] for record in records}.values():
        of = {record["name"]: record for record in records if record["case"] == case}
        lora = of.get(LORA) or of["lora"]
        base = of.get(BIASES) or of["frozen"]
        rows = [
            [
                name + ("*" if record["chosen"] else ""),
                f"{record['cycles']:,.0f}",
                f"{1e3 * record['seconds']:.3f}",
                f"{record['seconds'] / lora['seconds']:.3f}",
                f"{record['bytes'] / 1e6:,.0f}",
                f"{record['peak'] / 1e6:,.1f}",
                f"{record['peak'] / lora['peak']:.4f}",
                f"{record['compile']:.1f}",
                f"{record['compile'] / base['compile']:.1f}",
            ]
            for name, record in of.items()
        ]
        header = ["estimated", "cycles", "ms", "/ lora", "MB moved", "peak MB", "/ lora"]
        title = ", ".join(f"{key} {value}" for key, value in case.items())
        base_name = BIASES if BIASES in of else "frozen"
        rows_table = markdown_table([*header, "compile s", f"/ {base_name}"], rows)
        sections.append(f"{title}\n\n{rows_table}")
    return "\n\n".join(sections)
