"""`python -m train.table RUN …`: the results of several runs as one Markdown table."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from train.metrics import PERPLEXITY
from train.report import RESULTS


def table(directories: Sequence[Path]) -> str:
    """A row for each method and task of some finished runs.

    Args:
        directories: The runs' directories. Runs that differ only in their seed share a row, which
            shows their median.

    Returns:
        Markdown. Scores are those of the metric that chose the best epoch, times 100 unless it
        is a perplexity.

    Raises:
        ValueError: If a directory holds no finished run.
    """
    groups: dict[tuple[str, str], list[dict]] = {}
    for directory in directories:
        try:
            result = json.loads((directory / RESULTS).read_text(encoding="utf-8"))
            groups.setdefault((result["task"], result["method"]), []).append(result)
        except (OSError, KeyError, TypeError, json.JSONDecodeError):
            raise ValueError(f"`{directory}` holds no finished run (no whole {RESULTS}).") from None
    lines = [
        "| task | method | adapter parameters | in full | metric | validation | test | seeds |"
        " best epoch | minutes |",
        "|---|---|---:|---:|---|---:|---:|---|---|---:|",
    ]
    for (task, method), runs in groups.items():
        first = runs[0]
        metric = first["metric"]
        epochs = ", ".join(str(run["best_epoch"]) for run in runs)
        seeds = ", ".join(str(run["seed"]) for run in runs)
        scale = 1 if metric == PERPLEXITY else 100
        test = [run["test"][metric] for run in runs if run["test"]]
        lines.append(
            f"| {task} | {method} | {first['trainable']['adapters']:,} |"
            f" {first['trainable']['in full']:,} | {metric} |"
            f" {scale * median(run['validation'][metric] for run in runs):.2f} |"
            f" {f'{scale * median(test):.2f}' if test else 'none'} | {seeds} | {epochs} |"
            f" {median(run['seconds'] for run in runs) / 60:.1f} |"
        )
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Prints the table.

    Args:
        argv: The runs' directories.

    Returns:
        The exit code: 0, or 2 if a directory holds no finished run.
    """
    if not argv:
        print("usage: python -m train.table RUN [RUN ...]", file=sys.stderr)
        return 2
    try:
        print(table([Path(argument) for argument in argv]))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
