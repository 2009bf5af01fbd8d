"""What a compiled TPU program says of itself: cycles, and what the chips send each other.

All of it is read from the text of the optimised program, where a loop's body stands once: it counts
as often as the loop runs.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

# What a chip sends of an operation with a result of one byte among n chips.
_SENT = {
    "all-gather": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|body|condition|to_apply|\w+_computations?)=(%?[\w.\-]+|\{[\w.\-%, ]+\})"
)
_MEMORY = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Array(NamedTuple):
    """An array of a program.

    Attributes:
        dtype: As the program writes it, such as "bf16".
        shape: On one chip.
        bytes: Its size.
    """

    dtype: str
    shape: tuple[int, ...]
    bytes: int


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
    result: tuple[Array, ...]
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
    """

    name: str
    results: tuple[Array, ...]
    operands: tuple[Array, ...]
    times: int

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


class _Instruction(NamedTuple):
    root: bool
    name: str
    type: str
    opcode: str
    rest: str


_Computations = Mapping[str, Sequence[_Instruction]]


def read_program(text: str, devices: int) -> Program:
    """Reads the text of an optimised program.

    Args:
        text: As `compiled.as_text()` gives it.
        devices: How many devices it runs on.

    Returns:
        What it says.
    """
    computations, entry = _parse(text)
    times, unknown = _count(computations, entry)
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
                operands = _arrays(each.rest.partition("metadata=")[0])
                kernels.append(Kernel(each.name, _arrays(each.type), operands, times[name]))
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


def _parse(text: str) -> tuple[_Computations, str]:
    computations: dict[str, list[_Instruction]] = {}
    name = entry = ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name = header[2]
            computations[name] = []
            entry = name if header[1] else entry
        elif found := _INSTRUCTION.match(line):
            root, *fields = found.groups()
            computations[name].append(_Instruction(root is not None, *fields))
    return computations, entry


def _count(computations: _Computations, entry: str) -> tuple[Mapping[str, int], int]:
    """How often each computation runs, and how many loops have no known length."""
    callers: dict[str, list[tuple[str, int]]] = defaultdict(list)
    unknown = 0
    for name, instructions in computations.items():
        for each in instructions:
            # The end of something asynchronous names the same computation as its start.
            if each.opcode in ("async-update", "async-done"):
                continue
            length = 1
            if each.opcode == "while":
                found = _loop_length(computations, each)
                length, unknown = found or 1, unknown + (found is None)
            for names in _CALLED.findall(each.rest):
                for called in re.findall(r"[\w.\-]+", names):
                    callers[called].append((name, length))

    @cache
    def times(name: str) -> int:
        own = 1 if name == entry else 0
        return own + sum(times(caller) * length for caller, length in callers[name])

    return {name: times(name) for name in computations}, unknown


def _loop_length(computations: _Computations, loop: _Instruction) -> int | None:
    """How often a loop's body runs, if the loop counts from 0 to a constant."""
    if known := re.search(r'known_trip_count"?[:=]\{"?n"?:"?(\d+)', loop.rest):
        return int(known[1])
    names = {key: re.search(rf"{key}=%?([\w.\-]+)", loop.rest)[1] for key in ("condition", "body")}
    condition = {each.name: each for each in computations[names["condition"]]}
    body = {each.name: each for each in computations[names["body"]]}
    end = next(each for each in condition.values() if each.root)
    if end.opcode != "compare" or "direction=LT" not in end.rest:
        return None
    counter, limit = (condition[name] for name in _operands(end))
    if limit.opcode != "constant" or counter.opcode != "get-tuple-element":
        return None
    root = next(each for each in body.values() if each.root)
    if root.opcode != "tuple":
        return None
    step = body[_operands(root)[int(re.search(r"index=(\d+)", counter.rest)[1])]]
    if step.opcode != "add":
        return None
    by = [body[name] for name in _operands(step) if body[name].opcode == "constant"]
    return math.ceil(_constant(limit) / _constant(by[0])) if by else None


def _arrays(text: str) -> tuple[Array, ...]:
    """The arrays of a type or an instruction, in their order."""
    found = []
    for dtype, bits, sizes in _ARRAY.findall(text):
        shape = tuple(map(int, filter(None, sizes.split(","))))
        found.append(Array(dtype, shape, math.prod(shape) * int(bits or 8) // 8))
    return tuple(found)


def _operands(instruction: _Instruction) -> list[str]:
    return re.findall(r"%([\w.\-]+)", instruction.rest.partition(")")[0])


def _constant(instruction: _Instruction) -> int:
    return int(instruction.rest.partition(")")[0])


def _collectives(
    instruction: _Instruction, computation: str, times: int, devices: int
) -> list[Collective]:
    """The instruction as a collective operation, if it is one."""
    kind = instruction.opcode.removesuffix("-start")
    if kind not in _SENT:
        return []
    result = _arrays(instruction.type)
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
