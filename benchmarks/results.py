"""What was measured, in a file that grows case by case, and as tables."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from train.timing import describe_machine

Record = dict[str, Any]
"""One case of a suite, what was measured of it and under which name."""


class Results:
    """Records of benchmarks in a JSON file; what it holds already is not measured again."""

    def __init__(self, path: Path | None) -> None:
        """Opens the file, or keeps the records in memory only if there is none.

        Raises:
            ValueError: if the file is not one of benchmark results.
        """
        self._path = path
        self.machine = describe_machine()
        self.records: list[Record] = []
        if path is not None and path.exists():
            try:
                content = json.loads(path.read_text())
                self.machine, self.records = content["machine"], content["records"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"`{path}` does not hold benchmark results ({error}).") from None

    def missing(self, suite: str, cases: Sequence[Record]) -> Iterator[Record]:
        """The cases of a suite that have no records yet."""
        done = [record["case"] for record in self.records if record["suite"] == suite]
        yield from (case for case in cases if case not in done)

    def of(self, suite: str) -> list[Record]:
        """The records of a suite."""
        return [record for record in self.records if record["suite"] == suite]

    def add(self, suite: str, case: Record, measured: Mapping[str, Record]) -> None:
        """Adds what was measured of one case, by name, and writes the file."""
        for name, values in measured.items():
            self.records.append({"suite": suite, "case": case, "name": name, **values})
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            content = {"machine": self.machine, "records": self.records}
            partial = self._path.with_suffix(".part")
            partial.write_text(json.dumps(content, indent=1))
            partial.replace(self._path)


def by_case(records: Sequence[Record]) -> list[tuple[Record, dict[str, Record]]]:
    """The cases in their order, each with its records by name."""
    cases = {str(record["case"]): record["case"] for record in records}
    return [
        (case, {record["name"]: record for record in records if record["case"] == case})
        for case in cases.values()
    ]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up in a terminal too; all but the first to the right."""
    cells = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])])


def milliseconds(seconds: float | None) -> str:
    """Milliseconds with three digits, or a dash."""
    return "–" if seconds is None else f"{1e3 * seconds:#.3g}".rstrip(".")
