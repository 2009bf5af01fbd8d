"""Runs the cells of a comparison that have no record yet."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.monitoring
from rich.console import Console

import circflax as cf
from train import metrics
from train.compare.grid import Cell, Grid
from train.compare.progress import GridProgress
from train.compare.protocol import left, missing, score
from train.compare.records import Record, Records
from train.config import Config, ConfigError
from train.data import Encoded, Splits, load_splits
from train.progress import duration
from train.run import _load_model, _make_plan, _truncation_notes, encode
from train.trainer import Compiled, Trainer


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
        """Whether it is time to stop after so many cells and seconds."""
        return (self.cells is not None and cells >= self.cells) or (
            self.minutes is not None and seconds >= 60 * self.minutes
        )


@dataclass(frozen=True)
class Task:
    """A task's examples as the model takes them.

    Attributes:
        splits: The examples.
        encoded: Their tokens by split.
        metric: The metric that chooses the best epoch.
    """

    splits: Splits
    encoded: dict[str, Encoded]
    metric: str


class Bench:
    """What cells share: the tasks' examples and, for one method and task, compiled functions."""

    def __init__(self, grid: Grid) -> None:
        """Loads every task and checks every method on the model.

        Args:
            grid: The settings.

        Raises:
            ValueError: If the data of a task, or a method and the model, do not fit.
        """
        jax.config.update("jax_compilation_cache_dir", str(Path(grid.cache).resolve()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        configs = {trial.task: _any(trial.cells).config for trial in grid.trials}
        splits = {}
        for name, config in configs.items():
            with _naming(f"task `{name}`"):
                splits[name] = _load(config)
        name, config = _any(configs.items())
        model, base, loaded = _load_model(config, splits[name])
        for label, trial in {trial.label: trial for trial in grid.trials}.items():
            with _naming(f"method `{label}`"):
                _make_plan(_any(trial.cells).config, model, base, loaded.initialised)
        self._tasks = {}
        for name, config in configs.items():
            with _naming(f"task `{name}`"):
                classes = len(splits[name].label_names)
                metric = metrics.choose(config.run.metric, config.data.task, classes)
                encoded = encode(config, splits[name], loaded.directory)
                self._tasks[name] = Task(splits[name], encoded, metric)
        self._compiled: tuple[tuple[str, str], Compiled] | None = None

    def run(self, cell: Cell) -> Record:
        """Runs one cell.

        Args:
            cell: The cell.

        Returns:
            What came of it.

        Raises:
            TrainingError: If the loss or the adapters are no longer finite.
            ValueError: If the model's outputs are not finite.
        """
        began, compiling = time.monotonic(), _Compiling.seconds
        task, watch = self._tasks[cell.task], _Watch()
        model, base, loaded = _load_model(cell.config, task.splits)
        plan = _make_plan(cell.config, model, base, loaded.initialised)
        of = (cell.task, cell.label)
        trainer = Trainer(
            cell.config,
            model,
            base,
            plan,
            loaded.initialised,
            task.encoded,
            task.metric,
            self._compiled[1] if self._compiled and self._compiled[0] == of else None,
        )
        self._compiled = of, trainer.compiled
        best, progress = trainer.train_in_memory(watch)
        test, _ = trainer.evaluate(best, task.encoded["test"])
        counted = cf.summarize(base, plan)
        return {
            "metric": task.metric,
            "validation": [_rounded(result[task.metric]) for result in watch.validation],
            "best_epoch": progress.best_epoch,
            "test": {name: _rounded(value) for name, value in test.items()},
            "adapters": counted.adapter_parameters,
            "in_full": counted.trained_parameters,
            "steps": len(watch.seconds),
            "seconds": round(time.monotonic() - began, 1),
            "step_ms": round(1000 * median(watch.seconds), 1),
            "compile_seconds": round(_Compiling.seconds - compiling, 1),
            "notes": [*task.splits.notes, *_truncation_notes(cell.config, task.encoded)],
        }


def run_cells(grid: Grid, records: Records, limits: Limits, console: Console) -> None:
    """Runs the cells that have no record, until all have one or a limit is reached.

    Args:
        grid: The settings.
        records: Where cells are recorded.
        limits: When to start no further cell.
        console: Where to write.

    Raises:
        ValueError: If the data of a task, or a method and the model, do not fit; no cell has run
            then. What a single cell raises is recorded instead.
        OSError: If a record cannot be written.
    """
    began, ran = time.monotonic(), 0
    total, remaining = sum(trial.size for trial in grid.trials), cells_left(grid, records)
    if not remaining:
        return
    bench = Bench(grid)
    with GridProgress(total, total - remaining, console) as progress:
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


def _load(config: Config) -> Splits:
    splits = load_splits(config.data)
    if splits.test is None:
        raise ConfigError("there is no test split; set `data.test` or `data.test_fraction`")
    return splits


class _Watch:
    """Keeps what a record needs of a run: the time of each step and each epoch's validation."""

    def __init__(self) -> None:
        self.validation: list[dict[str, float]] = []
        self.seconds: list[float] = []
        self._updated = time.monotonic()

    def append(self, *, step: int, epoch: int, split: str, **values: float) -> None:
        if split == "validation":
            self.validation.append(values)

    def update(self, step: int, loss: float, tokens: int) -> None:
        now = time.monotonic()
        self.seconds.append(now - self._updated)
        self._updated = now

    def say(self, message: str) -> None:
        pass


class _Compiling:
    """Time that the process has spent compiling programs or reading compiled ones."""

    seconds = 0.0

    @classmethod
    def listen(cls, event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            cls.seconds += duration


jax.monitoring.register_event_duration_secs_listener(_Compiling.listen)


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Puts what is at fault before the sentence of an error."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{what}: {error}") from None


def _rounded(value: float) -> float:
    return round(value, 6)


def _any(of: Any) -> Any:
    return next(iter(of.values() if isinstance(of, dict) else of))
