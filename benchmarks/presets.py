"""The memory that a step of each preset needs, by the TPU compiler; nothing is executed."""

from collections.abc import Sequence
from pathlib import Path

from rich.progress import track

import circflax as cf
from benchmarks import compiling, papers
from benchmarks.results import Record, Results, markdown_table
from circflax.methods import PRESETS
from train import settings
from train.config import Config
from train.plan.step import make_outline, make_step

_CONFIGS = Path(__file__).parents[1] / "configs"
_FOLDERS = {"roberta-base": "glue", "roberta-large": "glue", "vit-base": "images"}
_MODELS = {"llama2-7b": "llama-2-7b", "llama3-8b": "llama-3-8b"}
# The largest chip: what a step needs is asked here, not whether it fits.
CHIP = "v5p"
# Blocks are alike, so that memory is a straight line over their number: two points give it.
_LAYERS = (2, 4)


def load(name: str) -> Config:
    """The settings of a preset, from its file under ``configs``."""
    method, model, task = name.replace("-", "_").split("/")
    folder = _FOLDERS.get(name.split("/")[1], "language")
    return settings.load(["--config", str(_CONFIGS / folder / f"{model}_{task}_{method}.yaml")])


def grid(quick: bool) -> list[Record]:
    """The cases: a preset each; of those that differ in the method alone, the first."""
    names = list(PRESETS) if not quick else ["cdvft/roberta-base/rte"]
    seen: dict[tuple, str] = {}
    for name in names:
        config, model = load(name), name.split("/")[1]
        examples = config.images if config.images.given else None
        length = None if examples else config.examples.max_length
        rows = config.optim.batch_size, config.optim.accumulation_steps
        seen.setdefault((model, config.adapter.targets, *rows, length), name)
    return [{"chip": CHIP, "preset": name} for name in seen.values()]


def run(results: Results, suite: str, quick: bool) -> None:
    """Compiles what is missing."""
    for case in track(list(results.missing(suite, grid(quick))), "compiling for TPU"):
        name = case["preset"]
        config, model = load(name), name.split("/")[1]
        peaks = {}
        for layers in (1, 2) if quick else _LAYERS:
            step = make_step(config, outline(config, model, layers))
            compiled, _ = compiling.compile_for(CHIP, step.run, step.arguments)
            peaks[layers] = cf.costs.peak_memory(compiled)
        whole = outline(config, model)
        adapters = make_step(config, whole).adapters
        length = None if config.images.given else config.examples.max_length
        measured = {"peak": _at(peaks, whole.model.config.num_hidden_layers), "adapters": adapters}
        measured |= {"batch": config.optim.batch_size, "parts": config.optim.accumulation_steps}
        results.add(suite, case, {name: measured | {"length": length}})


def outline(config: Config, model: str, layers: int | None = None) -> cf.interop.Outline:
    """A preset's model without weights, in the types of its settings.

    Args:
        config: the settings.
        model: the model's name in the preset's.
        layers: how many blocks; None has as many as the model has.

    Returns:
        The model and the shapes of its parameters.
    """
    import transformers

    kind, fields = papers.MODELS[_MODELS.get(model, model)]
    fields = dict(fields) if layers is None else {**fields, "num_hidden_layers": layers}
    return make_outline(config, getattr(transformers, kind)(**fields))


def _at(peaks: dict[int, int], layers: int) -> int:
    """The line through two measurements, at another number of blocks."""
    (few, low), (more, high) = peaks.items()
    return round(low + (high - low) * (layers - few) / (more - few))


def table(records: Sequence[Record]) -> str:
    """Parameters and memory of a step of each preset."""
    rows = [
        [
            record["name"],
            f"{record['adapters']:,}",
            str(record["batch"]),
            str(record["parts"]),
            str(record["length"] or "–"),
            f"{record['peak'] / 1e9:.1f}",
        ]
        for record in records
    ]
    return markdown_table(["preset", "parameters", "batch", "in parts", "tokens", "GB"], rows)
