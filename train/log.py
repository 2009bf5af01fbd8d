"""The record of a run: one JSON object a line, mirrored to TensorBoard."""

import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any

FILE_NAME = "metrics.jsonl"
Record = dict[str, Any]


class MetricsLog:
    """Appends records to ``metrics.jsonl`` and to TensorBoard files beside it.

    The file depends on nothing but the records, so that the file of a resumed run equals that of
    an unbroken one. Use as a context manager.
    """

    def __init__(self, directory: str | Path, resume_step: int | None = None) -> None:
        """Opens the log of a run.

        Args:
            directory: Directory of the run; made if it is missing.
            resume_step: Step of the checkpoint that the run goes on from: later records are
                dropped, since they will be made again. None begins a new log.
        """
        from tensorboardX import SummaryWriter

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / FILE_NAME
        if resume_step is None:
            path.unlink(missing_ok=True)
        else:
            truncate_after(path, resume_step)
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(
            str(directory / "tensorboard"),
            purge_step=None if resume_step is None else resume_step + 1,
        )

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.sync()
        self._file.close()
        self._board.close()

    def append(self, *, step: int, epoch: int, split: str, **values: float) -> None:
        """Adds one record; numbers that are not finite, which JSON lacks, are written as null.

        Args:
            step: Updates made so far.
            epoch: Number of the pass.
            split: What the values were measured on, for instance "train".
            **values: The values by name.
        """
        values = {name: float(value) for name, value in values.items()}
        finite = {name: v if math.isfinite(v) else None for name, v in values.items()}
        self._file.write(
            json.dumps({"step": step, "epoch": epoch, "split": split, **finite}) + "\n"
        )
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{split}/{name}", value, step)

    def sync(self) -> None:
        """Forces everything to disk: call it before a checkpoint that the log must reach up to."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._board.flush()


class NoLog:
    """Takes the place of a `MetricsLog` in processes that write nothing."""

    def append(self, *, step: int, epoch: int, split: str, **values: float) -> None:
        """Drops a record, which the first process writes."""

    def sync(self) -> None:
        """Does nothing."""


def read(path: str | Path) -> list[Record]:
    """Reads the records of a run; values that were not finite are None.

    Args:
        path: The ``metrics.jsonl`` file.

    Returns:
        The records in order, without a last line that a crash left unfinished.

    Raises:
        ValueError: If another line is not a record.
    """
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    records = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            raise ValueError(f"`{path}`, line {number} is not a record") from None
    return records


def truncate_after(path: str | Path, step: int) -> None:
    """Drops the records after a step, and a last line that a crash left unfinished.

    Args:
        path: The ``metrics.jsonl`` file; a missing one stays missing.
        step: Last step to keep.
    """
    path = Path(path)
    if not path.exists():
        return
    kept = [json.dumps(record) + "\n" for record in read(path) if record["step"] <= step]
    # Replacing the file in one go keeps the old one if the machine stops here.
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)
