"""Costs as a table for the terminal."""

from collections.abc import Mapping

from circflax.costs import Costs
from circflax.tree._summary import human_bytes


def cost_table(rows: Mapping[str, Costs], head: int) -> str:
    """Rows of costs with their ratios to the row called `lora`.

    Args:
        rows: the costs by name.
        head: parameters that train in every row and are left out.

    Returns:
        The table, of at most 100 columns for names that are not long.
    """
    lora = rows.get("lora")
    counted = {name: _counted(each, lora, head) for name, each in rows.items()}
    header = ["method", "parameters", "/ lora", "file", "forward", "backward", "/ lora", "a step"]
    lines = ["", "", "", "", "FLOPs", "a token", "", "once"]
    if all(each.step is not None for each in rows.values()):
        header += ["forward", "step", "peak MiB", "/ lora"]
        lines += ["XLA", "XLA", "", ""]
        for name, each in rows.items():
            counted[name] += _compiled(each, lora)
    cells = [lines, header, *([name, *cells] for name, cells in counted.items())]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        " ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def _counted(each: Costs, lora: Costs | None, head: int) -> list[str]:
    def trainable(of: Costs) -> int:
        return of.adapter_parameters + of.trained_parameters - head

    flops = each.flops
    sums = sum(flops[:2]), sum(flops[2:])
    # Leaves trained in full have no rule: XLA's count shows what they cost.
    none = each.adapter_parameters == 0
    return [
        f"{trainable(each):,}",
        _ratio(trainable(each), lora and trainable(lora)),
        human_bytes(each.bytes),
        *["–" if none else short_number(number) for number in flops[:2]],
        "–" if none else _ratio(sums[0], lora and sum(lora.flops[:2])),
        "–" if none else short_number(sums[1]),
    ]


def _compiled(each: Costs, lora: Costs | None) -> list[str]:
    return [
        short_number(each.forward.flops),
        short_number(each.step.flops),
        f"{each.step.peak_memory / 2**20:,.1f}",
        _ratio(each.step.peak_memory, lora and lora.step.peak_memory),
    ]


def _ratio(number: float, lora: float | None) -> str:
    if not lora:
        return "–"
    return f"{number / lora:.3g}" if number < 999.5 * lora else f"{number / lora:,.0f}"


def short_number(number: float) -> str:
    """Three digits with a unit.

    Example:
        >>> short_number(294912.0), short_number(1.5e10)
        ('295k', '15G')
    """
    for unit in ("", "k", "M", "G"):
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}T"
