"""The result of a run: ``results.json``, ``report.md``, ``curves.png`` and a table on screen."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from train import log
from train.progress import duration

RESULTS = "results.json"


@dataclass(frozen=True)
class Summary:
    """What a run came to.

    Attributes:
        task: Name of the task or of the training file.
        model: Name of the base model.
        method: Adapter method.
        trainable: Parameters trained, by group (for instance "adapters" and "head").
        total: Parameters of the base model.
        metric: Metric that chose the best epoch.
        best_epoch: That epoch, counted from 1.
        validation: Validation metrics of that epoch.
        test: Test metrics of that epoch, if there is a test split.
        compared: Metrics before the training and of that epoch, of the splits measured twice.
        seconds: Time of the run.
        seed: Seed of the run.
        notes: Sentences on the data and the run.
        files: Names of what lies beside the report: pictures and answers.
    """

    task: str
    model: str
    method: str
    trainable: Mapping[str, int]
    total: int
    metric: str
    best_epoch: int
    validation: Mapping[str, float]
    test: Mapping[str, float] | None
    seconds: float
    seed: int
    notes: Sequence[str] = ()
    compared: Mapping[str, tuple[Mapping[str, float], Mapping[str, float]]] = field(
        default_factory=dict
    )
    files: Sequence[str] = ()


def write(run_directory: str | Path, summary: Summary) -> None:
    """Writes ``results.json``, ``report.md`` and ``curves.png`` into a run's directory.

    Args:
        run_directory: Directory that holds ``metrics.jsonl``.
        summary: What the run came to.
    """
    directory = Path(run_directory)
    records = log.read(directory / log.FILE_NAME)
    results = json.dumps(dataclasses.asdict(summary), indent=1)
    (directory / RESULTS).write_text(results + "\n", encoding="utf-8")
    plot(records, summary, directory / "curves.png")
    (directory / "report.md").write_text(markdown(summary), encoding="utf-8")


def show(summary: Summary, console: Console | None = None) -> None:
    """Prints the results as a table that fits 80 columns.

    Args:
        summary: What the run came to.
        console: Where to print; None is standard output.
    """
    title = f"{summary.method} on {summary.task}"
    notes = Text("\n".join(summary.notes)) if summary.notes else None
    # Text, unlike a string, is not searched for markup; long names fold instead of being cut.
    table = Table("", Column(overflow="fold"), title=Text(title), caption=notes, show_header=False)
    for name, value in _rows(summary):
        table.add_row(name, Text(value))
    (console or Console()).print(table)


def markdown(summary: Summary) -> str:
    """The report as Markdown text.

    Args:
        summary: What the run came to.

    Returns:
        The text, which refers to ``curves.png`` beside it.
    """
    rows = "\n".join(f"| {_escape(name)} | {_escape(value)} |" for name, value in _rows(summary))
    notes = "".join(f"- {note}\n" for note in summary.notes)
    return (
        f"# {summary.method} on {summary.task}\n\n"
        f"| | |\n|---|---|\n{rows}\n\n"
        + (f"{notes}\n" if notes else "")
        + "![Training loss and validation metric](curves.png)\n"
        + "".join(f"{_link(name)}\n" for name in summary.files)
    )


def plot(records: Sequence[log.Record], summary: Summary, path: str | Path) -> None:
    """Draws the training loss by step and the validation metric by epoch.

    Args:
        records: Records of the run; those of split "train" hold a loss, those of split
            "validation" the metric.
        summary: What the run came to.
        path: PNG file to write.
    """
    # The object interface draws without a display and without global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    steps, losses = _series(records, "train", "step", "loss")
    epochs, values = _series(records, "validation", "epoch", summary.metric)
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.plot(steps, losses, color="C0", alpha=0.3, linewidth=1, label="each record")
    left.plot(steps, _smooth(losses), color="C0", linewidth=2, label="smoothed")
    left.set(title="Training loss", xlabel="step", ylabel="loss")
    right.plot(epochs, values, color="C1", marker="o", markersize=4)
    best = epochs == summary.best_epoch
    right.scatter(
        epochs[best],
        values[best],
        s=130,
        marker="*",
        color="C3",
        zorder=3,
        label=f"best: {summary.validation[summary.metric]:.4f} in epoch {summary.best_epoch}",
    )
    right.set(title=f"Validation {summary.metric}", xlabel="epoch", ylabel=summary.metric)
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.suptitle(f"{summary.method} on {summary.task}")
    figure.savefig(path, dpi=150)


def _rows(summary: Summary) -> list[tuple[str, str]]:
    trained = sum(summary.trainable.values())
    groups = ", ".join(f"{name} {count:,}" for name, count in summary.trainable.items())
    rows = [
        ("task", summary.task),
        ("model", summary.model),
        ("method", summary.method),
        (
            "trainable parameters",
            f"{trained:,} of {summary.total:,} ({trained / summary.total:.3%}): {groups}",
        ),
        ("best epoch", f"{summary.best_epoch} (by validation {summary.metric})"),
        *_measured("validation", summary.validation, summary),
    ]
    if summary.test is None:
        rows.append(("test", "not reported: there is no test split"))
    else:
        rows += _measured("test", summary.test, summary)
    for split, (_, after) in summary.compared.items():
        if split not in ("validation", "test"):
            rows += _measured(split, after, summary)
    return [*rows, ("time", duration(summary.seconds)), ("seed", str(summary.seed))]


def _measured(
    split: str, metrics: Mapping[str, float], summary: Summary
) -> Iterator[tuple[str, str]]:
    """The metrics of a split, with what they were before the training if that was measured."""
    before, _ = summary.compared.get(split, ({}, {}))
    for name, value in metrics.items():
        was = f" ({before[name]:.4f} before the training)" if name in before else ""
        yield f"{split} {name}", f"{value:.4f}{was}"


def _link(name: str) -> str:
    """A picture is shown, another file named."""
    return f"\n{'!' if name.endswith('.png') else ''}[{Path(name).stem}]({name})"


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def _series(
    records: Sequence[log.Record], split: str, x: str, y: str
) -> tuple[np.ndarray, np.ndarray]:
    """Two columns of the records of a split; None (not finite) becomes nan, a gap in the line."""
    chosen = [r for r in records if r["split"] == split and y in r]
    return np.array([r[x] for r in chosen]), np.array([r[y] for r in chosen], np.float64)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Moving mean over about a twentieth of the values, over fewer at both ends."""
    reach = len(values) // 40
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return np.array([window.mean() for window in windows])
