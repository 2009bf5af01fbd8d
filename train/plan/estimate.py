"""What a step would need of a slice of chips: memory, what is sent, time."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax

import circflax as cf
from train.config import Config, MeshConfig
from train.plan.hlo import Array
from train.plan.program import Collective, Program, memory_wanted, read_program
from train.plan.step import Step, count_classes, make_outline, make_step
from train.plan.topology import Chip, Topology

WEIGHTS, ADAPTERS, STATE, BATCH, REST = (
    "base weights",
    "adapters, head",
    "optimizer state",
    "batch",
    "temporaries",
)


@dataclass(frozen=True)
class Traffic:
    """What operations of one kind send, for one purpose.

    Attributes:
        kind: Such as "all-gather".
        carries: Weights, gradients, scalars, or intermediates (activations, sums in the making),
            as far as shapes tell them apart.
        count: How many of them run in a step.
        sent: Bytes that a chip sends in a step.
        place: The part of the model where most of it is sent.
    """

    kind: str
    carries: str
    count: int
    sent: float
    place: str


@dataclass(frozen=True)
class Speed:
    """How long a step takes.

    It is the sum of what the compiler expects of each instruction on a chip that waits for nothing:
    it leaves out the time that chips wait for each other, the host, the loading of batches, and
    evaluation. What the chips send needs `exchange` if all their links are busy all the time, less
    than which no arrangement of the chips allows; how much of it runs beside the instructions is
    not known, so that a step takes between the larger of the two and their sum.

    Attributes:
        compute: Seconds by the compiler's cycles and the chip's clock.
        exchange: Seconds that what a chip sends takes at the published bandwidth of its links.
        units: Tokens or images of a batch.
        unit: Which of these.
        kernels: How many custom kernels run, which count as what moving their operands takes.
        unknown_loops: Loops of unknown length, counted once.
    """

    compute: float
    exchange: float
    units: int
    unit: str
    kernels: int
    unknown_loops: int

    @property
    def best(self) -> float:
        """Seconds of a step if all exchange runs beside the computation, or the reverse."""
        return max(self.compute, self.exchange)

    @property
    def worst(self) -> float:
        """Seconds of a step if nothing runs at the same time."""
        return self.compute + self.exchange


@dataclass(frozen=True)
class Estimate:
    """What one step would need.

    Attributes:
        topology: Name of the slice.
        chips: How many chips it has.
        mesh: Sizes of the mesh's axes.
        peak: Bytes of memory in use at most on a chip; of a step that does not fit what the
            compiler says that it would take.
        capacity: Bytes that a program can have there.
        parts: The peak by what is in it.
        fits: Whether the compiler made a program of it.
        traffic: What the chips send each other, most first; none if the step does not fit.
        speed: How long it takes; None if the step does not fit.
        compile_seconds: What tracing and compiling took here.
        notes: What was assumed.
    """

    topology: str
    chips: int
    mesh: Mapping[str, int]
    peak: int
    capacity: int
    parts: Mapping[str, int]
    fits: bool
    traffic: tuple[Traffic, ...]
    speed: Speed | None
    compile_seconds: float
    notes: tuple[str, ...]


def prepare(config: Config, topology: Topology) -> tuple[Config, Step, tuple[str, ...]]:
    """Makes a run's step for a slice; nothing is compiled.

    Args:
        config: The settings. A mesh that is not set is `fsdp` over all chips.
        topology: The slice.

    Returns:
        The settings with the mesh, the step, and what was assumed.

    Raises:
        ValueError: If settings, model and slice do not fit.
    """
    notes = []
    if config.mesh == MeshConfig() and len(topology.devices) > 1:
        config = replace(config, mesh=MeshConfig(data=1, fsdp=len(topology.devices)))
        notes.append("no mesh is set: `fsdp` over all chips")
    classes, assumed = count_classes(config)
    if assumed:
        notes.append(f"the examples would tell how many classes there are; {classes} are assumed")
    outline = make_outline(config, config.model.name)
    return config, make_step(config, outline, topology.devices), tuple(notes)


def estimate(config: Config, topology: Topology, step: Step, notes: tuple[str, ...]) -> Estimate:
    """Compiles a step and reads what it needs; this takes minutes.

    Args:
        config: The settings.
        topology: The slice.
        step: The step, made for it.
        notes: What was assumed.

    Returns:
        What it needs.

    Raises:
        JaxRuntimeError: If compiling fails for another reason than memory.
    """
    chip = topology.chip
    parts = _argument_bytes(step)
    start = time.perf_counter()
    lowered = step.run.lower(*step.arguments)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        # The compiler gives up on programs that do not fit, but says what they would take.
        if (wanted := memory_wanted(str(error))) is None:
            raise
        peak, capacity = wanted
        traffic, speed, fits = (), None, False
    else:
        peak, capacity, fits = cf.costs.peak_memory(compiled), chip.memory, True
        program = read_program(compiled.as_text(), len(topology.devices))
        traffic = _sum_traffic(program.collectives, step)
        speed = _speed(config, chip, program, step)
    seconds = time.perf_counter() - start
    parts[REST] = max(0, peak - sum(parts.values()))
    return Estimate(
        topology=topology.name,
        chips=len(topology.devices),
        mesh=dict(step.placement.mesh.shape),
        peak=peak,
        capacity=capacity,
        parts=parts,
        fits=fits,
        traffic=traffic,
        speed=speed,
        compile_seconds=seconds,
        notes=notes,
    )


def _argument_bytes(step: Step) -> dict[str, int]:
    """Bytes on one chip of what a step is given, by what it is."""
    state, base, batch, _ = step.arguments
    at = step.placement
    return {
        WEIGHTS: _bytes(base, at.base),
        ADAPTERS: _bytes(state.small, at.small),
        STATE: _bytes(state.optimizer, at.like_small(state.optimizer)),
        BATCH: _bytes(batch, jax.tree.map(lambda _: at.batch, batch)),
    }


def _sum_traffic(collectives: tuple[Collective, ...], step: Step) -> tuple[Traffic, ...]:
    """Sums operations by their kind and by what they carry, the largest sums first."""
    carried = _carried(step)
    groups: dict[tuple[str, str], list[Collective]] = {}
    for each in collectives:
        groups.setdefault((each.kind, carried(each)), []).append(each)
    found = []
    for (kind, carries), group in groups.items():
        places: dict[str, float] = {}
        for each in group:
            place = _module(each.place)
            places[place] = places.get(place, 0.0) + each.sent * each.times
        sent, count = sum(places.values()), sum(each.times for each in group)
        found.append(Traffic(kind, carries, count, sent, max(places, key=places.__getitem__)))
    return tuple(sorted(found, key=lambda each: -each.sent))


def _carried(step: Step) -> Callable[[Collective], str]:
    """Tells weights and gradients from what is computed in between, by shapes."""
    state, base, _, _ = step.arguments
    weights = _shapes(base, step.placement.base)
    trained = _shapes(state.small, step.placement.small)

    def carried(each: Collective) -> str:
        shapes = {_plain(array) for array in each.result}
        if all(not shape for shape in shapes):
            return "scalars"
        if each.kind in ("all-reduce", "reduce-scatter") and shapes & trained:
            return "gradients"
        return "weights" if shapes <= weights else "intermediates"

    return carried


def _shapes(tree: Any, shardings: Any) -> set[tuple[int, ...]]:
    """Shapes of arrays as a whole and on one chip, without axes of size 1 and in any order."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    shapes = (s for leaf, at in pairs for s in (leaf.shape, at.shard_shape(leaf.shape)))
    return {_plain(Array("", shape, 0)) for shape in shapes}


def _plain(array: Array) -> tuple[int, ...]:
    return tuple(sorted(size for size in array.shape if size > 1))


def _module(place: str) -> str:
    """The module of an operation, without the numbers of layers, and which pass it is in."""
    names = place.split("/")
    # Behind the model, which is differentiated, stand its modules, and last the operation.
    start = next((i for i, name in enumerate(names) if "jvp(" in name), None)
    if start is None:
        return "loss, update"
    wrappers = ("checkpoint", "rematted_computation", "shard_map")
    inner = [name for name in names[start:-1] if name.isidentifier() and name not in wrappers]
    return "/".join(inner[-2:]) + (" (backward)" if "transpose(" in place else "")


def _speed(config: Config, chip: Chip, program: Program, step: Step) -> Speed:
    batch = step.arguments[2]
    # Of a kernel that it did not make itself the compiler expects nothing.
    moved = sum(kernel.times * kernel.bytes for kernel in program.kernels)
    sent = sum(each.sent * each.times for each in program.collectives)
    ids = batch.get("input_ids")
    return Speed(
        compute=program.cycles / chip.clock + moved / chip.bandwidth,
        exchange=sent / chip.interconnect,
        units=config.optim.batch_size if ids is None else math.prod(ids.shape),
        unit="images" if ids is None else "tokens",
        kernels=sum(kernel.times for kernel in program.kernels),
        unknown_loops=program.unknown_loops,
    )


def _bytes(tree: Any, shardings: Any) -> int:
    """Bytes of a tree on one chip."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    return sum(math.prod(at.shard_shape(a.shape)) * a.dtype.itemsize for a, at in pairs)
