"""How one layer's time grows with its width, its blocks and the number of tokens."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks import layers
from benchmarks.results import Record, Results

# What varies, and what it is drawn against.
AXES = {
    "features": "width d, one block, 1024 tokens",
    "block": "size of the blocks, d = 1024, 1024 tokens",
    "tokens": "tokens, d = 768, one block",
}


def grid(axis: str, quick: bool) -> list[Record]:
    """The cases along one axis."""
    match axis:
        case "features":
            sizes = (128, 256, 512, 768, 1024, 2048, 4096)
            cases = [{"tokens": 1024, "features": d, "block": d} for d in sizes]
        case "block":
            cases = [{"tokens": 1024, "features": 1024, "block": 2**n} for n in range(5, 11)]
        case "tokens":
            cases = [{"tokens": 2**n, "features": 768, "block": 768} for n in range(7, 15)]
    cases = [{**case, "dtype": "float32", "axis": axis} for case in cases]
    return cases[:2] if quick else cases


def run(results: Results, suite: str, quick: bool, rounds: int) -> None:
    """Measures what is missing along every axis."""
    for axis in AXES:
        layers.run(results, suite, grid(axis, quick), rounds)


def table(records: Sequence[Record]) -> str:
    """One table of all cases."""
    return layers.table(records)


def plot(records: Sequence[Record], directory: Path) -> list[Path]:
    """Draws time against each axis; returns the files."""
    from matplotlib import pyplot as plt

    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for axis, title in AXES.items():
        figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
        along = [record for record in records if record["case"]["axis"] == axis]
        for name in dict.fromkeys(record["name"] for record in along):
            points = sorted(
                (record["case"][axis], 1e3 * record["median"])
                for record in along
                if record["name"] == name
            )
            dashed = "--" if name.startswith(("peft", "frozen", "lora")) else "-"
            axes.plot(*zip(*points, strict=True), dashed, marker=".", label=name)
        axes.set(xscale="log", yscale="log", xlabel=title, ylabel="ms, forward and backward")
        axes.set_xticks(sorted({record["case"][axis] for record in along}), minor=False)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.xaxis.set_minor_locator(plt.NullLocator())
        axes.grid(alpha=0.3)
        figure.legend(fontsize="small", loc="outside right upper")
        path = directory / f"growth_{axis}.png"
        figure.savefig(path, dpi=110)
        plt.close(figure)
        paths.append(path)
    return paths
