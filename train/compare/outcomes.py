"""What the records of a comparison come to: a score for each method and task, or what it lacks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median, stdev

from train.compare.grid import Grid, Trial
from train.compare.protocol import choose, left
from train.compare.records import Record


@dataclass(frozen=True)
class Outcome:
    """One method on one task.

    Attributes:
        task: Name of the task.
        label: Label of the method.
        metric: The metric of the scores, if a cell has finished.
        rates: The rates that were chosen, of the adapters and of the head; None while they are
            not.
        scores: Test scores at these rates by seed; None where a seed has no result.
        adapters: Parameters of the adapters, if a cell has finished.
        in_full: Parameters trained in full, likewise.
        notes: How the examples came about, likewise.
        left: Cells still to be run.
        size: All of its cells.
        failures: Cells that failed, each with its error.
    """

    task: str
    label: str
    metric: str | None
    rates: tuple[float | None, float] | None
    scores: tuple[float | None, ...]
    adapters: int | None
    in_full: int | None
    notes: tuple[str, ...]
    left: int
    size: int
    failures: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether every seed has a result."""
        return bool(self.scores) and None not in self.scores

    @property
    def median(self) -> float:
        """Median of the scores over seeds."""
        return median(self.scores)

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the scores over seeds; None of a single seed."""
        return stdev(self.scores) if len(self.scores) > 1 else None


def gather(grid: Grid, records: Mapping[str, Record]) -> dict[tuple[str, str], Outcome]:
    """Reads the outcomes off the records.

    Args:
        grid: The settings.
        records: Records by key.

    Returns:
        The outcome of each task and label.
    """
    return {(trial.task, trial.label): _outcome(trial, records) for trial in grid.trials}


def compared(outcomes: Mapping[tuple[str, str], Outcome]) -> tuple[list[str], list[str]]:
    """The methods that have a result, and the tasks on which all of these have one.

    Args:
        outcomes: See `gather`.

    Returns:
        Labels and names of tasks; averages over these tasks compare these methods fairly.
    """
    labels = list(dict.fromkeys(label for (_, label), o in outcomes.items() if o.complete))
    tasks = [
        task
        for task in dict.fromkeys(task for task, _ in outcomes)
        if labels and all(outcomes[task, label].complete for label in labels)
    ]
    return labels, tasks


def average(outcomes: Mapping[tuple[str, str], Outcome], label: str, tasks: Sequence[str]) -> float:
    """A method's mean over tasks of its medians over seeds.

    Args:
        outcomes: See `gather`.
        label: The method.
        tasks: The tasks, complete for the method.

    Returns:
        The mean.
    """
    return mean(outcomes[task, label].median for task in tasks)


def _outcome(trial: Trial, records: Mapping[str, Record]) -> Outcome:
    found = {key: records[key] for key in trial.cells if key in records}
    whole = [record for record in found.values() if "error" not in record]
    chosen = choose(trial, records)
    finals = () if chosen is None else trial.finals[chosen]
    any_record = whole[0] if whole else {}
    return Outcome(
        task=trial.task,
        label=trial.label,
        metric=any_record.get("metric"),
        rates=(finals[0].rate, finals[0].config.optim.head_learning_rate) if finals else None,
        scores=tuple(_score(found.get(cell.key)) for cell in finals),
        adapters=any_record.get("adapters"),
        in_full=any_record.get("in_full"),
        notes=tuple(any_record.get("notes", ())),
        left=left(trial, records),
        size=trial.size,
        failures=tuple(
            f"{trial.cells[key]}: {record['error']}"
            for key, record in found.items()
            if "error" in record
        ),
    )


def _score(record: Record | None) -> float | None:
    return None if record is None or "error" in record else record["test"][record["metric"]]
