"""The tables of a comparison: ``table.md`` to read and ``table.csv`` to compute with."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from train.compare.costs import Costs
from train.compare.grid import Grid
from train.compare.outcomes import Outcome, average, compared

Outcomes = Mapping[tuple[str, str], Outcome]
NONE = "–"


def markdown(grid: Grid, outcomes: Outcomes, costs: Costs | None, plots: Sequence[str]) -> str:
    """The report as Markdown text.

    Args:
        grid: The settings.
        outcomes: What the records come to.
        costs: What was measured, if anything was.
        plots: Names of plots beside it.

    Returns:
        The text: scores, chosen rates, what has not run, and the data.
    """
    seeds = ", ".join(map(str, grid.seeds))
    parts = [
        f"# Methods compared on {', '.join(grid.tasks)}",
        f"Base model: `{grid.model.name}`. Test scores of the best validation epoch, times 100:"
        f" median ± standard deviation over the seeds {seeds}. {_averaged(outcomes)}",
        _scores(grid, outcomes, costs),
        *(f"![{Path(name).stem}]({name})" for name in plots),
        "## Learning rates",
        _how_chosen(grid),
        _rates(grid, outcomes),
        "## Not run",
        _missing(outcomes),
        "## Data",
        _data(grid, outcomes),
    ]
    if costs is not None:
        parts += ["## Step time and memory", _measured(costs)]
    return "\n\n".join(parts) + "\n"


def write_csv(path: Path, grid: Grid, outcomes: Outcomes, costs: Costs | None) -> None:
    """Writes one row for each method; what is missing is empty.

    Args:
        path: The file.
        grid: The settings.
        outcomes: What the records come to.
        costs: What was measured, if anything was.
    """
    labels, tasks = compared(outcomes)
    header = ["method", "adapter parameters"]
    for task in grid.tasks:
        header += [f"{task} {name}" for name in ("median", "deviation", "rate", "head rate")]
    header += [f"average of {' '.join(tasks)}" if tasks else "average", "step ms", "peak bytes"]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for label in grid.methods:
            row = [label, _adapters(grid, outcomes, label)]
            for task in grid.tasks:
                outcome = outcomes[task, label]
                row += [outcome.median, outcome.deviation] if outcome.complete else [None, None]
                row += outcome.rates or (None, None)
            row.append(average(outcomes, label, tasks) if tasks and label in labels else None)
            measured = costs.methods.get(label, {}) if costs else {}
            row += [measured.get("step_ms"), measured.get("peak_bytes")]
            writer.writerow(["" if value is None else value for value in row])


def score(outcome: Outcome) -> str:
    """A score as the table shows it.

    Args:
        outcome: A method on a task.

    Returns:
        Median and deviation times 100, or a dash where not every seed has a result.
    """
    if not outcome.complete:
        return NONE
    deviation = "" if outcome.deviation is None else f" ± {100 * outcome.deviation:.2f}"
    return f"{100 * outcome.median:.2f}{deviation}"


def _averaged(outcomes: Outcomes) -> str:
    labels, tasks = compared(outcomes)
    absent = list(dict.fromkeys(label for _, label in outcomes if label not in labels))
    without = f" (without {', '.join(absent)}, which have none)" if absent and labels else ""
    if not tasks:
        return f"No average: there is no task on which all methods have a result{without}."
    return f"The average is over {', '.join(tasks)}: all methods have a result there{without}."


def _scores(grid: Grid, outcomes: Outcomes, costs: Costs | None) -> str:
    labels, tasks = compared(outcomes)
    header = ["method", "adapter parameters", "in full"]
    for task in grid.tasks:
        metrics = {o.metric for (name, _), o in outcomes.items() if name == task and o.metric}
        header.append(f"{task} ({', '.join(sorted(metrics))})" if metrics else task)
    header += ["average", "step ms", "peak MiB"]
    rows = []
    for label in grid.methods:
        measured = costs.methods.get(label) if costs else None
        adapters = _adapters(grid, outcomes, label)
        rows.append(
            [
                label,
                NONE if adapters is None else f"{adapters:,}",
                _in_full(grid, outcomes, label),
                *(score(outcomes[task, label]) for task in grid.tasks),
                f"{100 * average(outcomes, label, tasks):.2f}"
                if tasks and label in labels
                else NONE,
                f"{measured['step_ms']:,.0f}" if measured else NONE,
                f"{measured['peak_bytes'] / 2**20:,.0f}" if measured else NONE,
            ]
        )
    return _table(header, rows)


def _adapters(grid: Grid, outcomes: Outcomes, label: str) -> int | None:
    counts = (outcomes[task, label].adapters for task in grid.tasks)
    return next((count for count in counts if count is not None), None)


def _in_full(grid: Grid, outcomes: Outcomes, label: str) -> str:
    counts = sorted(
        {o.in_full for task in grid.tasks if (o := outcomes[task, label]).in_full is not None}
    )
    if not counts:
        return NONE
    return f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"


def _how_chosen(grid: Grid) -> str:
    shorter = f", {grid.search.epochs} epochs" if grid.search.epochs else ""
    return (
        "Of the adapters / of the head, the best on validation of those tried (seed"
        f" {grid.search.seed}{shorter})."
    )


def _rates(grid: Grid, outcomes: Outcomes) -> str:
    def shown(outcome: Outcome) -> str:
        if outcome.rates is None:
            return NONE
        return " / ".join(NONE if rate is None else f"{rate:g}" for rate in outcome.rates)

    rows = []
    for label, method in grid.methods.items():
        tried = [method.learning_rates, method.head_learning_rates]
        rows.append(
            [
                label,
                " / ".join(", ".join(f"{rate:g}" for rate in rates) or NONE for rates in tried),
                *(shown(outcomes[task, label]) for task in grid.tasks),
            ]
        )
    return _table(["method", "tried", *grid.tasks], rows)


def _missing(outcomes: Outcomes) -> str:
    total, left = (sum(getattr(o, name) for o in outcomes.values()) for name in ("size", "left"))
    lines = [f"Cells that have not run: {left:,} of {total:,}.", ""] if left else ["No cell."]
    for task in dict.fromkeys(task for task, _ in outcomes):
        waiting = [o for (name, _), o in outcomes.items() if name == task and o.left]
        begun = any(o.left < o.size for (name, _), o in outcomes.items() if name == task)
        counts = ", ".join(f"{o.label} ({o.left} of {o.size})" for o in waiting)
        if waiting:
            lines.append(f"- {task}: {counts if begun else 'no cell of any method has run'}")
    failures = [failure for outcome in outcomes.values() for failure in outcome.failures]
    if failures:
        lines += ["", "Failed:", "", *(f"- {_escape(failure)}" for failure in failures)]
    return "\n".join(lines)


def _data(grid: Grid, outcomes: Outcomes) -> str:
    lines = []
    for task in grid.tasks:
        found = [o.notes for (name, _), o in outcomes.items() if name == task and o.notes]
        lines.append(f"- {task}: {'; '.join(found[0]) if found else NONE}")
    return "\n".join(lines)


def _measured(costs: Costs) -> str:
    case = costs.case
    machine = ", ".join(f"{name} {value}" for name, value in costs.machine.items())
    return (
        f"One training step of {case['batch']} examples of {case['length']} tokens"
        f" ({case['task']}, {case['dtype']}), the methods in turn: the median time, and the"
        f" compiled step's memory with its arguments. Machine: {machine}."
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(_escape, line))} |" for line in lines)


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
