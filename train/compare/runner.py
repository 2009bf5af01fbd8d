"""Runs the cells of a comparison that have no record yet."""

import time
from dataclasses import dataclass

from rich.console import Console

from train.compare.bench import Bench
from train.compare.grid import Cell, Grid
from train.compare.progress import GridProgress
from train.compare.protocol import left, missing, score
from train.compare.records import Record, Records
from train.progress import duration


@dataclass(frozen=True)
class Limits:
    """When to start no further cell.

    Attributes:
        cells: After so many; None is no limit.
        minutes: After so many minutes; None is no limit.
    """

    cells: int | None = None
    minutes: float | None = None

    def reached(self, cells: int, seconds: float) -> bool:
        """Whether it is time to stop.

        Args:
            cells: Cells that have run.
            seconds: Time that has passed.

        Returns:
            Whether one of the limits is reached.
        """
        return (self.cells is not None and cells >= self.cells) or (
            self.minutes is not None and seconds >= 60 * self.minutes
        )


def run_cells(grid: Grid, bench: Bench, records: Records, limits: Limits, console: Console) -> None:
    """Runs the cells that have no record, until all have one or a limit is reached.

    Args:
        grid: The settings.
        bench: What runs a cell.
        records: Where cells are recorded; what a cell raises is recorded too.
        limits: When to start no further cell.
        console: Where to write.

    Raises:
        OSError: If a record cannot be written.
    """
    began, ran = time.monotonic(), 0
    total = sum(trial.size for trial in grid.trials)
    with GridProgress(total, total - cells_left(grid, records), console) as progress:
        for trial in grid.trials:
            while cells := missing(trial, records.by_key):
                if limits.reached(ran, time.monotonic() - began):
                    return
                cell = cells[0]
                progress.begin(str(cell))
                record = cell.identity | _outcome(bench, cell)
                records.append(record)
                ran += 1
                progress.finish(_line(cell, record), cells_left(grid, records))


def cells_left(grid: Grid, records: Records) -> int:
    """How many cells of a comparison are still to be run.

    Args:
        grid: The settings.
        records: What has run.

    Returns:
        The number; failed cells are not in it.
    """
    return sum(left(trial, records.by_key) for trial in grid.trials)


def _outcome(bench: Bench, cell: Cell) -> Record:
    """What came of a cell; whatever goes wrong is its own and must not end the others."""
    try:
        return bench.run(cell)
    except Exception as error:
        sentence = " ".join(str(error).split())
        return {"error": f"{type(error).__name__}: {sentence[:300]}"}


def _line(cell: Cell, record: Record) -> str:
    if "error" in record:
        return f"{cell}: failed: {record['error']}"
    metric = record["metric"]
    return (
        f"{cell}: {metric} {score(record):.4f} validation, {record['test'][metric]:.4f} test"
        f"  ({duration(record['seconds'])}, {record['compile_seconds']:.1f} s compiling)"
    )
