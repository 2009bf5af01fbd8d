"""What a compiled TPU program says of itself: cycles, and what the chips send each other.

All of it is read from the text of the optimised program, where a loop's body stands once: it counts
as often as the loop runs.
"""

import math
import re
from dataclasses import dataclass

from train.plan import hlo

# What a chip sends of an operation with a result of one byte among n chips.
_SENT = {
    "all-gather": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}
_MEMORY = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Collective:
    """One operation that sends data between chips.

    Attributes:
        kind: Such as "all-gather".
        result: What a chip has of it afterwards.
        sent: Bytes that a chip sends, each time.
        times: How often it runs in a step.
        place: The operation of the model that it belongs to, as the compiler names it.
    """

    kind: str
    result: tuple[hlo.Array, ...]
    sent: float
    times: int
    place: str


@dataclass(frozen=True)
class Kernel:
    """A custom kernel, which the compiler does not estimate.

    Attributes:
        name: As the program writes it.
        results: What it writes.
        operands: What it reads.
        times: How often it runs in a step.
        fused: Whether it computes operands itself, as the compiler fused what makes them into it.
    """

    name: str
    results: tuple[hlo.Array, ...]
    operands: tuple[hlo.Array, ...]
    times: int
    fused: bool

    @property
    def bytes(self) -> int:
        """Bytes of its results and operands."""
        return sum(array.bytes for array in (*self.results, *self.operands))


@dataclass(frozen=True)
class Program:
    """What was read from a program.

    Attributes:
        cycles: The compiler's own estimates of its instructions, summed.
        kernels: The custom kernels in it.
        collectives: What the chips send each other.
        unknown_loops: Loops whose length is not known; they are counted once.
    """

    cycles: int
    kernels: tuple[Kernel, ...]
    collectives: tuple[Collective, ...]
    unknown_loops: int


def read_program(text: str, devices: int) -> Program:
    """Reads the text of an optimised program.

    Args:
        text: As `compiled.as_text()` gives it.
        devices: How many devices it runs on.

    Returns:
        What it says.
    """
    computations, entry = hlo.parse(text)
    times, unknown = hlo.count_runs(computations, entry)
    fusions = (each for of in computations.values() for each in of if each.opcode == "fusion")
    fused = {name for fusion in fusions for name in fusion.called}
    cycles, kernels, collectives = 0, [], []
    for name, instructions in computations.items():
        if not times[name]:
            continue
        begins_chain = any('"AsyncCollectiveStart"' in each.rest for each in instructions)
        for each in instructions:
            estimated = re.search(r'"estimated_cycles":"(\d+)"', each.rest)
            # Of what runs beside everything else the compiler says that it never ends.
            if estimated and int(estimated[1]) < 2**40:
                cycles += int(estimated[1]) * times[name]
            if 'custom_call_target="tpu_custom_call"' in each.rest:
                operands = hlo.arrays(each.rest.partition("metadata=")[0])
                results = hlo.arrays(each.type)
                kernels.append(Kernel(each.name, results, operands, times[name], name in fused))
            # The compiler writes each part of an operation that it spreads over others as a whole.
            if begins_chain or "chain_id=" not in each.rest:
                collectives += _collectives(each, name, times[name], devices)
    return Program(cycles, tuple(kernels), tuple(collectives), unknown)


def memory_wanted(message: str) -> tuple[int, int] | None:
    """Reads what a program would take that the compiler gave up on.

    Args:
        message: The compiler's.

    Returns:
        Bytes that it needs and bytes that there are; None if the message is about something else.
    """
    size = r"([\d.]+)([KMGT]?)"
    used = re.search(rf"Used {size} of {size} hbm", message)
    used = used or re.search(rf"\({size}\) exceeds available HBM \({size}\)", message)
    if used is None:
        return None
    wanted, there = (round(float(used[i]) * _MEMORY[used[i + 1]]) for i in (1, 3))
    return wanted, there


def _collectives(
    instruction: hlo.Instruction, computation: str, times: int, devices: int
) -> list[Collective]:
    """The instruction as a collective operation, if it is one."""
    kind = instruction.opcode.removesuffix("-start")
    if kind not in _SENT:
        return []
    result = hlo.arrays(instruction.type)
    if instruction.opcode in ("all-gather-start", "collective-permute-start"):
        # Operands, results, and numbers that the hardware keeps.
        result = tuple(array for array in result if array.shape or array.dtype != "u32")
        result = result[len(result) // 2 :]
    n = _group_size(instruction.rest, devices)
    size = sum(array.bytes for array in result)
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        # A sum of which each chip keeps a part is written as a sum inside a fusion.
        kind, size = "reduce-scatter", size / n
    place = re.search(r'op_name="([^"]*)"', instruction.rest)
    return [Collective(kind, result, size * _SENT[kind](n), times, place[1] if place else "")]


def _group_size(rest: str, devices: int) -> int:
    """Among how many devices one operation is."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(listed[1].split(","))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(iota[1])
    if mesh := re.search(r"replica_groups=(?:mesh|@mesh\w*)\[([^\]]*)\] ?\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        # An axis may be named in part: 'axis':(a)b is b of its devices.
        named = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in named)
    return devices
