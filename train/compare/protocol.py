"""The papers' protocol: rates chosen on validation with one seed, then every seed at them."""

from collections.abc import Mapping

from train.compare.grid import Cell, Trial
from train.compare.records import Record


def score(record: Record) -> float:
    """The validation score of a cell's best epoch.

    Args:
        record: The record of a cell that did not fail.

    Returns:
        The score by the metric that chose the epoch.
    """
    return record["validation"][record["best_epoch"] - 1]


def choose(trial: Trial, records: Mapping[str, Record]) -> int | None:
    """The choice of rates that is reported: the best by validation, of equals the first.

    Args:
        trial: A method on a task.
        records: Records by key.

    Returns:
        A position in `trial.finals`; None while the search is not over, or if all of it failed.
    """
    if not trial.search:
        return 0
    if any(cell.key not in records for cell in trial.search):
        return None
    found = [records[cell.key] for cell in trial.search]
    whole = [number for number, record in enumerate(found) if "error" not in record]
    return max(whole, key=lambda number: score(found[number]), default=None)


def missing(trial: Trial, records: Mapping[str, Record]) -> list[Cell]:
    """The cells that can be run now: of the search first, then of the rates it chose.

    Args:
        trial: A method on a task.
        records: Records by key.

    Returns:
        Those that have no record; none if all of the search failed.
    """
    search = [cell for cell in trial.search if cell.key not in records]
    if search:
        return search
    chosen = choose(trial, records)
    if chosen is None:
        return []
    return [cell for cell in trial.finals[chosen] if cell.key not in records]


def left(trial: Trial, records: Mapping[str, Record]) -> int:
    """How many cells are still to be run.

    Args:
        trial: A method on a task.
        records: Records by key.

    Returns:
        The number, those that wait for the search included.
    """
    searching = [cell for cell in trial.search if cell.key not in records]
    waiting = trial.size - len({cell.key for cell in trial.search}) if searching else 0
    return len(missing(trial, records)) + waiting
