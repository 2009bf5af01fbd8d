"""The settings of a comparison, and the runs that they come to."""

import dataclasses
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from train.config import (
    AdapterConfig,
    Config,
    ConfigError,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
)
from train.methods import HEAD_ALONE


@dataclass(frozen=True)
class TaskConfig:
    """One task.

    Attributes:
        data: The examples.
        epochs: Passes over its training split; None is `optim.epochs`.
        batch_size: Examples of one update; None is `optim.batch_size`.
        metric: Metric that chooses the best epoch and is reported; None is the usual one.
    """

    data: DataConfig
    epochs: int | None = None
    batch_size: int | None = None
    metric: str | None = None

    def __post_init__(self) -> None:
        if not self.data.given:
            raise ConfigError(
                "set exactly one of `data.task` (a task by name) and `data.train` (a file)"
            )


@dataclass(frozen=True)
class MethodConfig(AdapterConfig):
    """What is trained, and the rates to choose among; every pair of them is tried.

    Attributes:
        method: Name of a method that circflax knows, or one of those that `python -m train` adds.
        learning_rates: Peak learning rates of the adapters; none where nothing but the head
            trains.
        head_learning_rates: Peak learning rates of parameters trained in full.
    """

    # Unlike in a run no method goes without saying.
    method: str = field()
    learning_rates: tuple[float, ...] = ()
    head_learning_rates: tuple[float, ...] = (1e-3,)


@dataclass(frozen=True)
class SearchConfig:
    """The runs that choose the rates.

    Attributes:
        seed: Their seed.
        epochs: Their passes over the training split, if fewer than a task's own. A search of the
            same length is part of the result where its rate is chosen, and not run twice.
    """

    seed: int = 0
    epochs: int | None = None

    def __post_init__(self) -> None:
        if self.epochs is not None and self.epochs < 1:
            raise ConfigError(f"`search.epochs` must be at least 1, not {self.epochs}")


@dataclass(frozen=True)
class Cell:
    """One run: a method on a task with certain rates and a seed.

    Attributes:
        task: Name of the task.
        label: Label of the method.
        config: The settings of the run.
    """

    task: str
    label: str
    config: Config

    @property
    def rate(self) -> float | None:
        """Peak learning rate of the adapters, if there are any."""
        return None if self.config.adapter.method == HEAD_ALONE else self.config.optim.learning_rate

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All that determines the result besides task, label, rates and seed.

        Left out are what is not set, where the data lie on this machine, and its devices.
        """
        config = dataclasses.asdict(self.config)
        del config["images"], config["language"], config["mesh"]
        config["run"] = {"metric": self.config.run.metric}
        for section, name in _NOT_SETTINGS:
            del config[section][name]
        sections = {section: _set_values(values) for section, values in config.items()}
        return {section: values for section, values in sections.items() if values}

    @property
    def identity(self) -> dict[str, Any]:
        """All that determines the result, in the order of a record."""
        return {
            "task": self.task,
            "label": self.label,
            "seed": self.config.run.seed,
            "rate": self.rate,
            "head_rate": self.config.optim.head_learning_rate,
            "settings": self.settings,
        }

    @cached_property
    def key(self) -> str:
        """The identity as text."""
        return key_of(self.identity)

    def __str__(self) -> str:
        own = "" if self.rate is None else f"rate {self.rate:g}, "
        head = f"head rate {self.config.optim.head_learning_rate:g}"
        return f"{self.label} on {self.task}, {own}{head}, seed {self.config.run.seed}"


_NOT_SETTINGS = (("data", "root"), ("optim", "learning_rate"), ("optim", "head_learning_rate"))


def key_of(record: dict[str, Any]) -> str:
    """The canonical text of what determines a cell.

    Args:
        record: A cell's identity, or a record that begins with one.

    Returns:
        Canonical JSON.
    """
    names = ("task", "label", "seed", "rate", "head_rate", "settings")
    return json.dumps({name: record[name] for name in names}, sort_keys=True)


@dataclass(frozen=True)
class Trial:
    """One method on one task: a search for the rates, then every seed.

    Attributes:
        task: Name of the task.
        label: Label of the method.
        search: The runs that choose the rates; none where there is nothing to choose.
        finals: For each choice of rates the runs that are reported.
    """

    task: str
    label: str
    search: tuple[Cell, ...]
    finals: tuple[tuple[Cell, ...], ...]

    @cached_property
    def cells(self) -> dict[str, Cell]:
        """Every run that can come up, by its key."""
        return {cell.key: cell for cells in (self.search, *self.finals) for cell in cells}

    @property
    def size(self) -> int:
        """How many runs it takes, whichever rates are chosen."""
        sizes = (len({cell.key for cell in (*self.search, *final)}) for final in self.finals)
        return max(sizes)


@dataclass(frozen=True)
class Grid:
    """All settings of a comparison.

    Attributes:
        model: The base model.
        tasks: The tasks by name.
        methods: The methods by label; one method can appear under several.
        seeds: Seeds of the runs that are reported.
        search: The runs that choose the rates.
        optim: Settings that all methods share; learning rates are the methods' own.
        root: Directory that the tasks' files are in; None leaves it to each task's `data.root`.
        output: Directory of the records, tables and plots.
        cache: Directory of compiled programs.
    """

    model: ModelConfig
    tasks: dict[str, TaskConfig]
    methods: dict[str, MethodConfig]
    seeds: tuple[int, ...] = (0, 1, 2)
    search: SearchConfig = field(default_factory=SearchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    root: str | None = None
    output: str = "runs/compare"
    cache: str = ".cache/xla"

    def __post_init__(self) -> None:
        for name in ("tasks", "methods", "seeds"):
            if not getattr(self, name):
                raise ConfigError(f"`{name}` is empty; a comparison needs at least one of them")
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"`seeds` holds a seed twice: {list(self.seeds)}")
        standard = OptimConfig()
        for name in ("learning_rate", "head_learning_rate"):
            if getattr(self.optim, name) != getattr(standard, name):
                raise ConfigError(
                    f"`optim.{name}` is not for comparisons; set `{name}s` of each method"
                )
        for label, method in self.methods.items():
            _check_rates(label, method)
        self.trials  # noqa: B018 - making every run's settings checks them

    @cached_property
    def trials(self) -> tuple[Trial, ...]:
        """Every method on every task, task by task."""
        return tuple(self._trial(task, label) for task in self.tasks for label in self.methods)

    def _trial(self, task: str, label: str) -> Trial:
        method = self.methods[label]
        rates = [
            (rate, head)
            for rate in method.learning_rates or (0.0,)
            for head in method.head_learning_rates
        ]
        finals = tuple(
            tuple(self._cell(task, label, pair, seed, None) for seed in self.seeds)
            for pair in rates
        )
        seed, epochs = self.search.seed, self.search.epochs
        search = tuple(self._cell(task, label, pair, seed, epochs) for pair in rates)
        return Trial(task, label, search if len(rates) > 1 else (), finals)

    def _cell(
        self, task: str, label: str, rates: tuple[float, float], seed: int, most: int | None
    ) -> Cell:
        chosen, method = self.tasks[task], self.methods[label]
        data = chosen.data
        if self.root is not None and data.train is not None:
            data = dataclasses.replace(data, root=str(Path(self.root, data.root or "")))
        epochs = self.optim.epochs if chosen.epochs is None else chosen.epochs
        batch_size = self.optim.batch_size if chosen.batch_size is None else chosen.batch_size
        try:
            optim = dataclasses.replace(
                self.optim,
                epochs=epochs if most is None else min(epochs, most),
                batch_size=batch_size,
                learning_rate=rates[0],
                head_learning_rate=rates[1],
            )
            run = RunConfig(seed=seed, metric=chosen.metric)
        except ConfigError as error:
            raise ConfigError(f"`{label}` on `{task}`: {error}") from None
        names = [item.name for item in dataclasses.fields(AdapterConfig)]
        adapter = AdapterConfig(**{name: getattr(method, name) for name in names})
        return Cell(task, label, Config(self.model, data, adapter=adapter, optim=optim, run=run))


def _check_rates(label: str, method: MethodConfig) -> None:
    if method.method == HEAD_ALONE and method.learning_rates:
        raise ConfigError(
            f"`methods.{label}.learning_rates` has no use: nothing but the head trains"
        )
    if method.method != HEAD_ALONE and not method.learning_rates:
        raise ConfigError(f"`methods.{label}.learning_rates` is empty")
    if not method.head_learning_rates:
        raise ConfigError(f"`methods.{label}.head_learning_rates` is empty")
    for name in ("learning_rates", "head_learning_rates"):
        rates = getattr(method, name)
        if len(set(rates)) < len(rates):
            raise ConfigError(f"`methods.{label}.{name}` holds a rate twice")


def _set_values(section: dict[str, Any]) -> dict[str, Any]:
    """Leaves out what is not set, so that a setting made up later changes no identity."""
    return {name: value for name, value in section.items() if value not in (None, (), {}, [])}
