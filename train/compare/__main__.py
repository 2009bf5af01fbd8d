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

from train import config
from train.compare.grid import Grid
from train.compare.records import Records, foreign
from train.compare.runner import Limits, cells_left, run_cells
from train.config import ConfigError

AGAIN = "the same command goes on from there"


def main(argv: list[str]) -> int:
    """Runs a comparison.

    Args:
        argv: Command-line arguments.

    Returns:
        The exit code: 0, 1 if a cell failed, 2 if settings, data or model do not fit, 130 if
        interrupted.
    """
    try:
        return _run(argv)
    except OSError as error:
        where = f" (`{error.filename}`)" if error.filename else ""
        return _fail(f"{error.strerror or error}{where}", 1)
    except ValueError as error:
        return _fail(error, 2)
    except KeyboardInterrupt:
        return _fail(f"interrupted; finished cells are recorded, and {AGAIN}.", 130)


def _run(argv: Sequence[str]) -> int:
    options, rest = _options(argv)
    grid = config.load(rest, Grid)
    console = Console()
    directory = Path(grid.output)
    with Records(directory) as records:
        for notice in filter(None, (records.notice, *foreign(grid, records.by_key))):
            console.print(f"note: {notice}", highlight=False, markup=False, soft_wrap=True)
        if options.retry:
            records.forget_failures()
        run_cells(grid, records, Limits(options.cells, options.minutes), console)
        failed = [
            record
            for trial in grid.trials
            for key in trial.cells
            if "error" in (record := records.by_key.get(key, {}))
        ]
        remaining = cells_left(grid, records)
    if remaining:
        console.print(f"{remaining} cells are left; {AGAIN}.", highlight=False)
    for record in failed:
        console.print(f"failed: {record}", highlight=False, markup=False, soft_wrap=True)
    return 1 if failed else 0


def _options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Takes out of the arguments what is not a setting of the comparison."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--cells", type=int, help="start no cell after so many")
    parser.add_argument("--minutes", type=float, help="start no cell after so many minutes")
    parser.add_argument("--retry", action="store_true", help="run failed cells again")
    try:
        return parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from None


def _fail(message: object, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
