"""The configurations that ship with the application."""

from pathlib import Path

import pytest

from circflax import make_method
from circflax.methods import PRESETS
from train import settings
from train.compare.grid import Grid
from train.parts import LAMDA_PP, TRAINED

CONFIGS = Path(__file__).parents[2] / "configs"
COMPARISONS = sorted((CONFIGS / "compare").glob("*.yaml"))
RUNS = sorted(set(CONFIGS.rglob("*.yaml")) - set(COMPARISONS))


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_a_comparison_loads_and_names_methods(path: Path) -> None:
    grid = settings.load(["--config", str(path)], Grid)
    for method in grid.methods.values():
        if method.method not in ("full", LAMDA_PP, *TRAINED):
            assert make_method(method.method, method.hyperparameters)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_it_loads_and_names_a_method(path: Path) -> None:
    loaded = settings.load(["--config", str(path)])
    assert make_method(loaded.adapter.method, loaded.adapter.hyperparameters)


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_config_is_the_preset(name: str) -> None:
    preset = PRESETS[name]
    path = CONFIGS / "glue" / f"{name.replace('/', '_').replace('-', '_')}.yaml"
    loaded = settings.load(["--config", str(path)])
    assert (loaded.model.name, loaded.data.task) == (preset.model, preset.task)
    method = make_method(loaded.adapter.method, loaded.adapter.hyperparameters)
    assert method == preset.method
    optim = loaded.optim
    assert (optim.learning_rate, optim.head_learning_rate, optim.epochs, optim.batch_size) == (
        preset.learning_rate,
        preset.head_learning_rate,
        preset.epochs,
        preset.batch_size,
    )
    assert (optim.schedule, optim.warmup, optim.weight_decay) == ("linear", 0.06, 0.0)
    assert loaded.data.max_length == 512
