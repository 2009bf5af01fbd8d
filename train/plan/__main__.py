"""`python -m train.plan --topology v5e:4x4 …`: would a run fit some TPUs, and how fast would it be?

The whole training step is compiled by the TPU compiler for chips that are not there.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from train.plan.topology import ENVIRONMENT, find_topology

# The application is JAX alone; without this transformers would import PyTorch where it is there.
os.environ.setdefault("USE_TORCH", "0")
os.environ.setdefault("USE_TF", "0")
# transformers announces the end of its Flax classes with every import.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.update(ENVIRONMENT)

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from train import settings
from train.config import ConfigError
from train.failures import exit_code
from train.plan import report
from train.plan.estimate import estimate, prepare


def main(argv: list[str]) -> int:
    """Compiles a run's step and reports on it.

    Args:
        argv: Command-line arguments.

    Returns:
        The exit code: 0 if the step fits, 1 if not, 2 if settings and slice make no sense; for
        others see `train.failures.exit_code`.
    """
    return exit_code(lambda: _run(argv, Console()), "nothing is kept")


def _run(argv: Sequence[str], console: Console) -> int:
    options, config = settings.load_with_options(
        argv,
        _parser(),
        prog="python -m train.plan",
        description="Ask the TPU compiler whether a run fits, what it sends and how long it takes.",
    )
    if options.topology is None:
        raise ConfigError("`--topology` must be set, such as `--topology v5e:4x4`")
    topology = find_topology(options.topology)
    config, step, notes = prepare(config, topology)
    if len(topology.devices) > 1:
        places = step.placement.describe(step.arguments[1])
        console.print(places, highlight=False, markup=False, soft_wrap=True)
    with _waiting(console, f"compiling for {len(topology.devices)} × {options.topology}"):
        found = estimate(config, topology, step, notes)
    report.show(found, config, console)
    if options.json is not None:
        report.write(found, options.json)
    return 0 if found.fits else 1


def _parser() -> argparse.ArgumentParser:
    """Options of one call, which are no settings of a run."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--topology", help="kind of chip and shape of the slice, such as v5e:4x4")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    return parser


@contextmanager
def _waiting(console: Console, message: str) -> Iterator[None]:
    """Shows in a terminal how long it has taken so far; elsewhere it says that it takes long."""
    if not console.is_terminal:
        console.print(f"{message}; this can take minutes", highlight=False)
        yield
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(f"{message}; this can take minutes", total=None)
        yield


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
