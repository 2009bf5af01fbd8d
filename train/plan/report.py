"""An estimate on screen and in a file, and what would help a step that does not fit."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from train.config import Config
from train.plan.estimate import REST, STATE, WEIGHTS, Estimate

_GB = 1e9


def show(estimate: Estimate, config: Config, console: Console) -> None:
    """Prints an estimate.

    Args:
        estimate: What a step needs.
        config: The settings, for what would help.
        console: Where to print.
    """
    mesh = " × ".join(f"{axis} {size}" for axis, size in estimate.mesh.items())
    chips = f"{estimate.chips} chip{'s' if estimate.chips > 1 else ''}"
    _say(console, f"{estimate.topology}: {chips}, mesh {mesh}")
    for note in estimate.notes:
        _say(console, f"note: {note}")
    console.print(_memory(estimate))
    if estimate.speed is not None:
        if estimate.traffic:
            console.print(_traffic(estimate))
        for line in _speed(estimate):
            _say(console, line)
    _say(console, f"compiled in {estimate.compile_seconds:.0f} s, nothing was executed")
    _say(console, verdict(estimate))
    if not estimate.fits:
        _say(console, "what would help: " + "; ".join(advice(estimate, config)) + ".")


def write(estimate: Estimate, path: Path) -> None:
    """Writes an estimate as JSON.

    Args:
        estimate: What a step needs.
        path: The file.

    Raises:
        OSError: If it cannot be written.
    """
    record: dict[str, Any] = asdict(estimate)
    if estimate.speed is not None:
        best, worst = estimate.speed.best, estimate.speed.worst
        record["speed"] |= {"best": best, "worst": worst}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def verdict(estimate: Estimate) -> str:
    """Whether a step fits, and by how much, in a line."""
    left = estimate.capacity - estimate.peak
    if estimate.fits:
        return f"fits: {left / _GB:.2f} GB of each chip are left"
    return f"does not fit: each chip lacks {-left / _GB:.2f} GB"


def advice(estimate: Estimate, config: Config) -> list[str]:
    """Settings that would lessen the memory of a step, those for its largest part first.

    Args:
        estimate: What it needs.
        config: The settings.

    Returns:
        Settings with what they do; none for parts of less than a tenth of the whole.
    """
    ways = {WEIGHTS: _lighter_weights, REST: _fewer_temporaries, STATE: _smaller_state}
    large = [part for part in ways if estimate.parts[part] >= estimate.peak / 10]
    order = sorted(large, key=lambda part: -estimate.parts[part])
    return [each for part in order for each in ways[part](estimate, config)]


def _lighter_weights(estimate: Estimate, config: Config) -> list[str]:
    found = []
    if config.model.param_dtype == "float32":
        found.append("--model.param_dtype bfloat16 halves the base weights")
    sharing = estimate.mesh["fsdp"] * estimate.mesh["tensor"]
    if sharing < estimate.chips:
        fsdp = estimate.chips // estimate.mesh["tensor"]
        found.append(f"--mesh.data 1 --mesh.fsdp {fsdp} has more chips share them")
    else:
        found.append("a slice of more chips, which share them")
    return found


def _fewer_temporaries(estimate: Estimate, config: Config) -> list[str]:
    found = []
    if not config.model.gradient_checkpointing:
        found.append("--model.gradient_checkpointing true computes activations again")
    if config.model.compute_dtype == "float32":
        found.append("--model.compute_dtype bfloat16 halves activations")
    optim, rows = config.optim, estimate.mesh["data"] * estimate.mesh["fsdp"]
    part = optim.batch_size // optim.accumulation_steps
    if part > rows and part % (2 * rows) == 0:
        steps = 2 * optim.accumulation_steps
        found.append(f"--optim.accumulation_steps {steps} halves the rows at a time")
    elif optim.batch_size > rows:
        found.append("a smaller --optim.batch_size")
    else:
        found.append("--mesh.tensor, by which chips share the work on a row")
    return found


def _smaller_state(estimate: Estimate, config: Config) -> list[str]:
    if config.adapter.method != "full":
        return []
    return ["an --adapter.method that trains less than all parameters"]


def _memory(estimate: Estimate) -> Table:
    table = _table("memory of a chip", "GB", "of all")
    for part, size in estimate.parts.items():
        table.add_row(part, f"{size / _GB:.3f}", f"{size / estimate.peak:.1%}")
    table.add_section()
    share = estimate.peak / estimate.capacity
    table.add_row("peak", f"{estimate.peak / _GB:.3f}", "")
    table.add_row("there is", f"{estimate.capacity / _GB:.3f}", f"{share:.1%} used")
    return table


def _traffic(estimate: Estimate) -> Table:
    table = _table("a chip sends, in a step", "count", "MB", "ms")
    table.add_column("most in", overflow="fold")
    total = sum(each.sent for each in estimate.traffic)
    seconds = estimate.speed.exchange / total if total else 0.0
    for each in estimate.traffic:
        numbers = (each.count, each.sent / 1e6, 1e3 * each.sent * seconds)
        table.add_row(
            f"{each.kind}: {each.carries}",
            *(f"{numbers[0]:,}", f"{numbers[1]:,.1f}", f"{numbers[2]:,.2f}"),
            each.place,
        )
    return table


def _speed(estimate: Estimate) -> list[str]:
    speed = estimate.speed
    ahead = f"a step by the compiler's cycles: {1e3 * speed.compute:,.1f} ms"
    if estimate.chips == 1:
        lines = [f"{ahead}, {speed.units / speed.compute:,.0f} {speed.unit} a second"]
    else:
        lines = [
            f"{ahead}; what a chip sends: {1e3 * speed.exchange:,.1f} ms at full bandwidth",
            f"together {1e3 * speed.best:,.1f} to {1e3 * speed.worst:,.1f} ms:"
            f" {speed.units / speed.worst:,.0f} to {speed.units / speed.best:,.0f} {speed.unit} a"
            " second",
        ]
    if speed.kernels:
        lines.append(
            f"note: {speed.kernels} custom kernels count as what moving their operands takes"
        )
    if speed.unknown_loops:
        lines.append(f"note: {speed.unknown_loops} loops of unknown length are counted once")
    return lines


def _table(title: str, *numbers: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(title, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _say(console: Console, message: str) -> None:
    console.print(message, highlight=False, markup=False)
