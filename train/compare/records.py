"""The record of a comparison: one JSON object a line, one line a finished cell."""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from train.compare.grid import Grid, key_of

FILE_NAME = "cells.jsonl"
Record = dict[str, Any]


class Records:
    """Appends records of cells, each on disk before the next cell begins.

    Use as a context manager; a second process that opens the same file is refused.
    """

    def __init__(self, directory: Path) -> None:
        """Opens the file, and drops a last line that a crash left unfinished.

        Args:
            directory: Directory of the comparison; made if it is missing.

        Raises:
            ValueError: If another process has the file open, or a line is no record.
        """
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / FILE_NAME
        self._file = path.open("a", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ValueError(f"another process is at work on `{path}`") from None
        self.by_key, whole = read(path)
        self.notices: tuple[str, ...] = ()
        if whole < path.stat().st_size:
            # Cutting off the end leaves every finished cell as it is, whenever it is interrupted.
            os.truncate(path, whole)
            self.notices = (f"`{path}` ended in the middle of a record, which is dropped",)

    def __enter__(self) -> "Records":
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def append(self, record: Record) -> None:
        """Adds a record and forces it to disk.

        Args:
            record: A cell's identity and what came of it.

        Raises:
            OSError: If it cannot be written.
        """
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.by_key[key_of(record)] = record

    def forget_failures(self) -> None:
        """Treats failed cells as if they had not run; their records stay in the file."""
        self.by_key = {key: r for key, r in self.by_key.items() if "error" not in r}


def read(path: Path) -> tuple[dict[str, Record], int]:
    """Reads the records of a comparison.

    Args:
        path: The file; a missing one has no records.

    Returns:
        The last record of each cell by its key, and where the last whole line ends.

    Raises:
        ValueError: If a line other than the last is no record.
    """
    content = path.read_bytes() if path.exists() else b""
    records, end = {}, 0
    lines = content.splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            if not line.endswith(b"\n"):
                break
            record = json.loads(line)
            records[key_of(record)] = record
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break
            raise ValueError(f"`{path}`, line {number} is not the record of a cell") from None
        end += len(line)
    return records, end


def foreign(grid: Grid, records: Mapping[str, Record]) -> list[str]:
    """Names the methods whose records were made with other settings than the grid's.

    Args:
        grid: The settings.
        records: Records by key.

    Returns:
        A sentence for each method and task.
    """
    sentences = []
    for trial in grid.trials:
        known = [cell.settings for cell in trial.cells.values()]
        others = [
            record
            for record in records.values()
            if (record["task"], record["label"]) == (trial.task, trial.label)
            and not any(_same(record["settings"], settings) for settings in known)
        ]
        if others:
            sentences.append(
                f"records of `{trial.label}` on `{trial.task}` that do not count since they had"
                f" other settings: {len(others)}"
                f" ({_difference(others[-1]['settings'], known[-1])})"
            )
    return sentences


def _same(left: Any, right: Any) -> bool:
    return json.dumps(left, sort_keys=True) == json.dumps(right, sort_keys=True)


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The first setting in which two cells differ."""
    for section in [*new, *(name for name in old if name not in new)]:
        before, now = old.get(section, {}), new.get(section, {})
        for name in [*now, *(name for name in before if name not in now)]:
            if not _same(before.get(name), now.get(name)):
                return f"`{section}.{name}` {before.get(name)!r}, not {now.get(name)!r}"
    raise AssertionError("the settings are equal")
