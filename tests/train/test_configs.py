"""The configurations that ship with the application."""

import dataclasses
from pathlib import Path

import jax
import pytest

import circflax as cf
from benchmarks import presets
from circflax import make_method
from circflax.methods import PRESETS
from train import settings
from train.compare.grid import Grid
from train.methods import RATES
from train.parts import make_plan

CONFIGS = Path(__file__).parents[2] / "configs"
COMPARISONS = sorted((CONFIGS / "compare").glob("*.yaml"))
RUNS = sorted(set(CONFIGS.rglob("*.yaml")) - set(COMPARISONS))

# Adapter parameters: C3A's and CDVFT's of RoBERTa and ViT, and BCA's of LLaMA on query and value,
# are printed in the papers; the others follow from the papers' formulas.
PARAMETERS = {
    "c3a/roberta-base": 24 * 768 * 6,
    "c3a/roberta-large": 48 * 1024 * 8,
    "c3a/vit-base": 24 * 768 * 12,
    "cdvft/roberta-base": 55_296,
    "cdvft/roberta-large": 48 * 3 * 1024,
    "cdvft/vit-base": 55_296,
    "bca/roberta-base": 24 * 768,
    "bca/roberta-large": 48 * 1024,
    "bca/vit-base": 24 * 768,
    "c3a/llama2-7b/alpaca": 64 * 4096 * 4096 // 128,
    "cdvft/llama2-7b/alpaca": 64 * 3 * 4096,
    "bca/llama2-7b/alpaca": 1_048_576,
    "cdvft/llama3-8b/alpaca": 32 * (3 * 4096 + 2 * 4096 + 1024),
    "c3a/llama2-7b/gsm8k": 32 * (3 * 4096 * 4096 // 128 + 2 * 4096 * 11008 // 256),
    "cdvft/llama2-7b/gsm8k": 32 * (4 * (2 * 4096 + 4096 * 4) + 3 * (4096 + 11008 + 4 * 11264)),
    "bca/llama2-7b/gsm8k": 32 * (4 * 4096 * 4 + 3 * 4 * 11264),
}


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_a_comparison_loads_and_names_methods(path: Path) -> None:
    grid = settings.load(["--config", str(path)], Grid)
    for method in grid.methods.values():
        if method.method not in RATES:
            assert make_method(method.method, method.hyperparameters)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_it_loads_and_names_a_method(path: Path) -> None:
    adapter = settings.load(["--config", str(path)]).adapter
    if adapter.method not in RATES:
        assert make_method(adapter.method, adapter.hyperparameters)


def test_every_preset_has_a_config_and_every_such_config_a_preset() -> None:
    folders = ("glue", "images", "language")
    files = [path for folder in folders for path in (CONFIGS / folder).glob("*.yaml")]
    own = {settings.load(["--config", str(path)]).run.output for path in files}
    assert {presets.load(name).run.output for name in PRESETS} <= own
    assert {path.read_text().startswith("# ") for path in files} == {True}


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_config_is_the_preset(name: str) -> None:
    preset, config = PRESETS[name], presets.load(name)
    data = {preset.task} & {config.data.task, config.language.format}
    assert config.model.name == preset.model
    assert data or preset.task in config.images.dataset
    adapter, optim = config.adapter, config.optim
    assert make_method(adapter.method, adapter.hyperparameters) == preset.method
    assert adapter.targets == preset.targets
    overrides = {each.pattern: each.hyperparameters for each in adapter.overrides}
    assert overrides == preset.overrides
    names = ("learning_rate", "epochs", "batch_size", "schedule", "warmup")
    assert {n: getattr(optim, n) for n in names} == {n: getattr(preset, n) for n in names}
    assert preset.head_learning_rate in (None, optim.head_learning_rate)
    assert optim.weight_decay == 0.0
    if preset.max_length is not None:
        assert config.examples.max_length == preset.max_length


@pytest.mark.parametrize(("name", "expected"), PARAMETERS.items())
def test_presets_count_their_parameters_as_in_the_papers(name: str, expected: int) -> None:
    name = _first(name)
    preset, model = PRESETS[name], name.split("/")[1]
    outline = presets.outline(presets.load(name), model)
    config = cf.AdapterConfig(
        method=preset.method, targets=preset.targets, overrides=dict(preset.overrides)
    )
    plan = cf.make_plan(outline.params, config)
    assert cf.costs.count(outline.params, plan).adapter_parameters == expected


def _first(name: str) -> str:
    """The first preset whose name begins so."""
    return next(key for key in PRESETS if key.startswith(name))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["cdvft/roberta-base", "cdvft/vit-base", "cdvft/llama3-8b/alpaca", "c3a/llama2-7b/gsm8k"],
)
def test_presets_build_and_compile(name: str) -> None:
    """The whole step of one layer at the model's own widths, in the config's own types."""
    config = presets.load(_first(name))
    one = dataclasses.replace(config, adapter=dataclasses.replace(config.adapter, layers=(0,)))
    outline = presets.outline(config, name.split("/")[1], layers=1)
    plan = make_plan(one, outline.model, outline.params, outline.new_leaves)
    costs = cf.costs.estimate(outline.run, outline.params, outline.inputs(1, 16), plan)
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(outline.params))
    assert costs.step.peak_memory > held
