"""What the runs of a comparison share: examples, the base model and compiled functions."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.monitoring

import circflax as cf
from train.compare.grid import Cell, Grid
from train.compare.records import Record
from train.config import ConfigError
from train.parts import load_model, make_plan
from train.placement import make_mesh, make_placement
from train.progress import untracked
from train.tasks.text import TextClassification, Texts
from train.trainer import Compiled, Trainer


class Prepared(NamedTuple):
    """A run that can start.

    Attributes:
        trainer: Its loop.
        base: The parameters of the base model.
        adapters: Number of the adapters' parameters.
        in_full: Number of parameters trained in full.
        head: How many of these the checkpoint does not have.
    """

    trainer: Trainer
    base: Any
    adapters: int
    in_full: int
    head: int


class Bench:
    """Runs single cells; a cell of the same method and task as the one before compiles nothing."""

    def __init__(self, grid: Grid) -> None:
        """Loads every task and checks every method on the model.

        Args:
            grid: The settings.

        Raises:
            ValueError: If the data of a task, or a method and the model, do not fit.
        """
        jax.config.update("jax_compilation_cache_dir", str(Path(grid.cache).resolve()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        self.tasks: dict[str, TextClassification] = {}
        self.texts: dict[str, Texts] = {}
        self._model: tuple[Any, Any] = (None, None)
        self._compiled: tuple[Any, Compiled | None] = (None, None)
        # Any of a trial's cells will do: they differ in rates, seeds and epochs alone.
        by_task = {trial.task: trial.finals[0][0].config for trial in grid.trials}
        by_label = {trial.label: trial.finals[0][0].config for trial in grid.trials}
        directory = cf.interop.find_checkpoint(grid.model.name, grid.model.revision)
        for name, config in by_task.items():
            with _naming(f"task `{name}`"):
                self.tasks[name] = task = TextClassification(config)
                self.texts[name] = task.encode(directory)
                if "test" not in self.texts[name].splits:
                    raise ConfigError(
                        "there is no test split; set `data.test` or `data.test_fraction`"
                    )
        name, config = next(iter(by_task.items()))
        self._mesh = make_mesh(config)
        model, base, loaded = load_model(config, self.tasks[name], self._mesh)
        for label, config in by_label.items():
            with _naming(f"method `{label}`"):
                make_plan(config, model, base, loaded.initialised)

    def prepare(self, cell: Cell) -> Prepared:
        """Makes a cell's trainer.

        Args:
            cell: The cell.

        Returns:
            The trainer and what it trains.
        """
        task = self.tasks[cell.task]
        of = (cell.task, cell.config.run.seed)
        if self._model[0] != of:
            self._model = of, load_model(cell.config, task, self._mesh)
        model, base, loaded = self._model[1]
        head = loaded.initialised
        plan = make_plan(cell.config, model, base, head)
        placement = make_placement(self._mesh, plan, base)
        of = (cell.task, cell.label)
        trainer = Trainer(
            cell.config,
            model,
            base,
            plan,
            head,
            self.texts[cell.task],
            task.metric,
            placement,
            self._compiled[1] if self._compiled[0] == of else None,
        )
        self._compiled = of, trainer.compiled
        counted = cf.summarize(base, plan)
        added = sum(_leaf(base, path).size for path in head)
        return Prepared(
            trainer, base, counted.adapter_parameters, counted.trained_parameters, added
        )

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
        prepared, metric, watch = self.prepare(cell), self.tasks[cell.task].metric, _Watch()
        best, progress = prepared.trainer.train_in_memory(watch)
        test = prepared.trainer.evaluate(best, "test").metrics
        return {
            "metric": metric,
            "validation": [round(result[metric], 6) for result in watch.validation],
            "best_epoch": progress.best_epoch,
            "test": {name: round(value, 6) for name, value in test.items()},
            "adapters": prepared.adapters,
            "in_full": prepared.in_full,
            "steps": len(watch.seconds),
            "seconds": round(time.monotonic() - began, 1),
            "step_ms": round(1000 * median(watch.seconds), 1),
            "compile_seconds": round(_Compiling.seconds - compiling, 1),
            "notes": list(self.texts[cell.task].notes),
        }


def _leaf(tree: Any, path: tuple[str, ...]) -> jax.Array:
    for name in path:
        tree = tree[name]
    return tree


class _Watch:
    """Keeps what a record needs of a run: the time of each step and each epoch's validation."""

    def __init__(self) -> None:
        self.validation: list[dict[str, float]] = []
        self.seconds: list[float] = []
        self._updated = time.monotonic()

    def append(self, *, step: int, epoch: int, split: str, **values: float) -> None:
        if split == "validation":
            self.validation.append(values)

    def update(self, step: int, loss: float, size: int) -> None:
        now = time.monotonic()
        self.seconds.append(now - self._updated)
        self._updated = now

    def say(self, message: str) -> None:
        pass

    track = staticmethod(untracked)


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
