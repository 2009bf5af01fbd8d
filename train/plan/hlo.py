"""The text of an optimised program, instruction by instruction."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|body|condition|to_apply|\w+_computations?)=(%?[\w.\-]+|\{[\w.\-%, ]+\})"
)


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


class Instruction(NamedTuple):
    """One instruction, as the program writes it.

    Attributes:
        root: Whether its result is the computation's.
        name: Of its result.
        type: Of its result.
        opcode: Such as "fusion".
        rest: What comes after the opening parenthesis of its operands.
    """

    root: bool
    name: str
    type: str
    opcode: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Names of what it reads."""
        return re.findall(r"%([\w.\-]+)", self.rest.partition(")")[0])

    @property
    def called(self) -> list[str]:
        """Names of the computations that it runs."""
        found = _CALLED.findall(self.rest)
        return [name for names in found for name in re.findall(r"[\w.\-]+", names)]


Computations = Mapping[str, Sequence[Instruction]]
"""The instructions of each computation, by its name."""


def parse(text: str) -> tuple[Computations, str]:
    """Reads a program.

    Args:
        text: As `compiled.as_text()` gives it.

    Returns:
        Its computations, and the name of the one that it begins with.
    """
    computations: dict[str, list[Instruction]] = {}
    name = entry = ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name = header[2]
            computations[name] = []
            entry = name if header[1] else entry
        elif found := _INSTRUCTION.match(line):
            root, *fields = found.groups()
            computations[name].append(Instruction(root is not None, *fields))
    return computations, entry


def arrays(text: str) -> tuple[Array, ...]:
    """The arrays of a type or an instruction, in their order."""
    found = []
    for dtype, bits, sizes in _ARRAY.findall(text):
        shape = tuple(map(int, filter(None, sizes.split(","))))
        found.append(Array(dtype, shape, math.prod(shape) * int(bits or 8) // 8))
    return tuple(found)


def count_runs(computations: Computations, entry: str) -> tuple[Mapping[str, int], int]:
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
            for called in each.called:
                callers[called].append((name, length))

    @cache
    def times(name: str) -> int:
        own = 1 if name == entry else 0
        return own + sum(times(caller) * length for caller, length in callers[name])

    return {name: times(name) for name in computations}, unknown


def _loop_length(computations: Computations, loop: Instruction) -> int | None:
    """How often a loop's body runs, if the loop counts from 0 to a constant."""
    if known := re.search(r'known_trip_count"?[:=]\{"?n"?:"?(\d+)', loop.rest):
        return int(known[1])
    names = {key: re.search(rf"{key}=%?([\w.\-]+)", loop.rest)[1] for key in ("condition", "body")}
    condition = {each.name: each for each in computations[names["condition"]]}
    body = {each.name: each for each in computations[names["body"]]}
    end = next(each for each in condition.values() if each.root)
    if end.opcode != "compare" or "direction=LT" not in end.rest:
        return None
    counter, limit = (condition[name] for name in end.operands)
    if limit.opcode != "constant" or counter.opcode != "get-tuple-element":
        return None
    root = next(each for each in body.values() if each.root)
    if root.opcode != "tuple":
        return None
    step = body[root.operands[int(re.search(r"index=(\d+)", counter.rest)[1])]]
    if step.opcode != "add":
        return None
    by = [body[name] for name in step.operands if body[name].opcode == "constant"]
    return math.ceil(_constant(limit) / _constant(by[0])) if by else None


def _constant(instruction: Instruction) -> int:
    return int(instruction.rest.partition(")")[0])
