"""`python -m train.compare --config FILE`: methods by tasks by seeds on one base model."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

# The application is JAX alone; without this transformers would import PyTorch where it is there.
os.environ.setdefault("USE_TORCH", "0")
os.environ.setdefault("USE_TF", "0")
# transformers announces the end of its Flax classes with every import.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from rich.console import Console

from train import settings
from train.compare import costs, plots, records, runner, table
from train.compare.bench import Bench
from train.compare.grid import Grid
from train.compare.outcomes import Outcome, gather
from train.failures import exit_code

TABLE, CSV = "table.md", "table.csv"
AGAIN = "the same command goes on from there"


def main(argv: list[str]) -> int:
    """Runs a comparison, or what is left of it, and reports on it.

    Args:
        argv: Command-line arguments.

    Returns:
        The exit code: 1 if a cell failed; for others see `train.failures.exit_code`.
    """
    again = f"finished cells are recorded, and {AGAIN}"
    return exit_code(lambda: _run(argv, Console()), again)


def _run(argv: Sequence[str], console: Console) -> int:
    options, grid = settings.load_with_options(
        argv,
        _parser(),
        Grid,
        prog="python -m train.compare",
        description="Compare methods on tasks with one base model.",
    )
    directory = Path(grid.output)
    if options.report:
        known, _ = records.read(directory / records.FILE_NAME)
        _note(console, *records.foreign(grid, known))
    else:
        with records.Records(directory) as file:
            _note(console, *file.notices, *records.foreign(grid, file.by_key))
            _work(grid, file, options, console)
            known = file.by_key
    outcomes = gather(grid, known)
    _report(grid, outcomes, console)
    left = sum(outcome.left for outcome in outcomes.values())
    if left:
        _say(console, f"cells left: {left}; {AGAIN}.")
    failures = [failure for outcome in outcomes.values() for failure in outcome.failures]
    for failure in failures:
        _say(console, f"failed: {failure}")
    if failures:
        _say(console, f"cells that failed: {len(failures)}; --retry runs them again.")
    return 1 if failures else 0


def _work(grid: Grid, file: records.Records, options: argparse.Namespace, console: Console) -> None:
    """Runs cells, and when all have run measures what steps cost."""
    if options.retry:
        file.forget_failures()
    labels = list(grid.methods) if options.measure else costs.unmeasured(grid)
    if not labels and not runner.cells_left(grid, file):
        return
    bench = Bench(grid)
    limits = runner.Limits(options.cells, options.minutes)
    runner.run_cells(grid, bench, file, limits, console)
    if options.measure or (labels and not runner.cells_left(grid, file)):
        costs.measure(grid, bench, labels, console)


def _report(grid: Grid, outcomes: dict[tuple[str, str], Outcome], console: Console) -> None:
    directory = Path(grid.output)
    directory.mkdir(parents=True, exist_ok=True)
    measured = costs.read(directory)
    drawn = plots.draw(directory, grid, outcomes, measured)
    text = table.markdown(grid, outcomes, measured, drawn)
    (directory / TABLE).write_text(text, encoding="utf-8")
    table.write_csv(directory / CSV, grid, outcomes, measured)
    _say(console, f"wrote {', '.join(str(directory / name) for name in (TABLE, CSV, *drawn))}")


def _parser() -> argparse.ArgumentParser:
    """Options of one call, which are no settings of the comparison."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--cells", type=int, help="start no cell after so many")
    parser.add_argument("--minutes", type=float, help="start no cell after so many minutes")
    parser.add_argument("--retry", action="store_true", help="run failed cells again")
    parser.add_argument("--measure", action="store_true", help="measure all methods' costs anew")
    parser.add_argument("--report", action="store_true", help="write tables and plots, run nothing")
    return parser


def _note(console: Console, *notices: str) -> None:
    for notice in notices:
        _say(console, f"note: {notice}.")


def _say(console: Console, message: str) -> None:
    console.print(message, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
