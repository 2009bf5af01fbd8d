"""What a step costs by method: time, peak memory and parameters, measured side by side."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from circflax.costs import peak_memory
from train.compare.bench import Bench
from train.compare.grid import Cell, Grid
from train.tasks.batches import PlannedBatch
from train.tasks.text import collate
from train.timing import describe_machine, time_interleaved

FILE_NAME = "costs.json"
ROUNDS, SECONDS = 10, 15.0


@dataclass(frozen=True)
class Costs:
    """What was measured.

    Attributes:
        machine: What it was measured on.
        case: The model, task and batch it was measured with.
        methods: By label the parameters that train besides the head (``parameters``), the step's
            time (``step_ms``) and its peak memory (``peak_bytes``).
    """

    machine: dict[str, str]
    case: dict[str, Any]
    methods: dict[str, dict[str, Any]]


def read(directory: Path) -> Costs | None:
    """Reads what was measured.

    Args:
        directory: Directory of the comparison.

    Returns:
        The costs, if there are any.

    Raises:
        ValueError: If the file holds something else.
    """
    path = directory / FILE_NAME
    if not path.exists():
        return None
    try:
        return Costs(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"`{path}` does not hold costs ({error})") from None


def unmeasured(grid: Grid) -> list[str]:
    """The methods that have not been measured with the grid's settings.

    Args:
        grid: The settings.

    Returns:
        Their labels; where one is missing and the machine is another by now, all labels.
    """
    known = read(Path(grid.output))
    cells = _cells(grid)
    if known is None or known.case != _case(next(iter(cells.values()))):
        return list(cells)
    missing = [
        label
        for label, cell in cells.items()
        if known.methods.get(label, {}).get("settings") != _settings(cell)
    ]
    return list(cells) if missing and known.machine != describe_machine() else missing


def measure(grid: Grid, bench: Bench, labels: list[str], console: Console) -> None:
    """Measures some methods side by side and keeps what is known of the others.

    The step is the real one, dropout included, on a batch of the longest bucket.

    Args:
        grid: The settings.
        bench: What prepares runs.
        labels: The methods.
        console: Where to write.

    Raises:
        OSError: If the file cannot be written.
    """
    cells = _cells(grid)
    measured, steps = {}, {}
    for label in labels:
        console.print(f"compiling a step of {label}", highlight=False, markup=False)
        try:
            measured[label], steps[label] = _prepare(bench, cells[label])
        except Exception as error:
            # As with cells: what one method cannot do must not keep the others from it.
            console.print(f"not measured: {label}: {error}", highlight=False, markup=False)
    console.print("timing …", highlight=False)
    for label, timing in time_interleaved(steps, rounds=ROUNDS, budget=SECONDS).items():
        measured[label] |= {"step_ms": round(1000 * timing.median, 1), "runs": timing.runs}
    known = read(Path(grid.output))
    if known is not None:
        measured = known.methods | measured
    ordered = {label: measured[label] for label in cells if label in measured}
    case = _case(next(iter(cells.values())))
    _write(Path(grid.output) / FILE_NAME, Costs(describe_machine(), case, ordered))


def _cells(grid: Grid) -> dict[str, Cell]:
    """A cell of each method on the task with the longest sequences."""
    longest = max(grid.tasks, key=lambda name: grid.tasks[name].data.bucket_lengths[-1])
    return {trial.label: trial.finals[0][0] for trial in grid.trials if trial.task == longest}


def _case(cell: Cell) -> dict[str, Any]:
    return {
        "model": cell.config.model.name,
        "dtype": cell.config.model.compute_dtype,
        "task": cell.task,
        "batch": cell.config.optim.batch_size,
        "length": cell.config.data.bucket_lengths[-1],
    }


def _settings(cell: Cell) -> dict[str, Any]:
    # As JSON gives them back, which knows no tuples.
    return json.loads(json.dumps(cell.settings["adapter"]))


def _prepare(bench: Bench, cell: Cell) -> tuple[dict[str, Any], Callable[[], None]]:
    """What can be known of a method without running it, and a function that makes a step."""
    prepared = bench.prepare(cell)
    case = _case(cell)
    examples = bench.texts[cell.task].encoded["train"]
    rows = np.arange(case["batch"]) % len(examples)
    batch = collate(examples, PlannedBatch(rows, case["length"]), case["batch"])
    state, rng = prepared.trainer.start()
    step = prepared.trainer.compiled.train_step
    compiled = step.lower(state, prepared.base, batch, rng).compile()

    def run() -> None:
        nonlocal state
        state, loss = compiled(state, prepared.base, batch, rng)
        jax.block_until_ready((state, loss))

    return {
        "settings": _settings(cell),
        "parameters": prepared.adapters + prepared.in_full - prepared.head,
        "peak_bytes": peak_memory(compiled),
    }, run


def _write(path: Path, costs: Costs) -> None:
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(asdict(costs), indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
