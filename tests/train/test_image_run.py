"""Whole runs of image classification on tiny models."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from transformers import (
    BeitConfig,
    BeitImageProcessor,
    BeitModel,
    BitImageProcessor,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

import circflax as cf
from train import settings, trainer
from train.__main__ import main
from train.run import run

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "patch_size": 4,
    "image_size": 8,
}
SIZE = {"height": 8, "width": 8}
MODELS = {
    "vit": (ViTModel, ViTConfig, ViTImageProcessor(size=SIZE)),
    "beit": (BeitModel, BeitConfig, BeitImageProcessor(size=SIZE, crop_size=SIZE)),
    "dinov2": (
        Dinov2Model,
        Dinov2Config,
        BitImageProcessor(size={"shortest_edge": 8}, crop_size=SIZE),
    ),
}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of each kind with its image processor, as Hugging Face directories."""
    directory = tmp_path_factory.mktemp("models")
    for name, (model, config, processor) in MODELS.items():
        torch.manual_seed(1)
        model(config(**SMALL, initializer_range=0.2)).save_pretrained(directory / name)
        processor.save_pretrained(directory / name)
    return directory


@pytest.fixture
def arguments(models: Path, tmp_path: Path) -> list[str]:
    """Command-line arguments of a short run; later ones win."""
    return [
        *("--model.name", str(models / "vit"), "--images.dataset", "digits"),
        *("--images.max_train_examples", "60", "--images.max_eval_examples", "30"),
        *("--optim.epochs", "1", "--optim.batch_size", "16", "--optim.learning_rate", "0.1"),
        *("--run.output", str(tmp_path / "run")),
    ]


@pytest.mark.parametrize("name", MODELS)
def test_a_run_leaves_a_report_with_a_picture_and_its_adapter(
    name, models, arguments, tmp_path
) -> None:
    summary = run(settings.load([*arguments, "--model.name", str(models / name)]))
    directory = tmp_path / "run"
    assert set(summary.test) == {"accuracy", "matthews", "top5"}
    assert "![confusion](confusion.png)" in (directory / "report.md").read_text()
    with Image.open(directory / "confusion.png") as picture:
        assert min(picture.size) > 500
    plan = cf.load_adapters(directory / "adapter").plan
    assert len(plan.targets) == 4
    assert {target.path[-1] for target in plan.targets} == {"query", "value"}
    assert ("classifier", "kernel") in plan.trained


def test_it_learns(arguments, tmp_path) -> None:
    """Two digits that even a random model's features tell apart, from an .npz file."""
    digits = load_digits()
    chosen = np.flatnonzero(digits.target < 2)
    images = np.round(digits.images[chosen] * 15.9).astype(np.uint8)
    np.savez(tmp_path / "two.npz", images=images, labels=digits.target[chosen])
    place = arguments.index("--images.dataset")
    arguments[place : place + 2] = ["--images.train", str(tmp_path / "two.npz")]
    more = ["--images.augment", "[]", "--optim.epochs", "6", "--optim.head_learning_rate", "0.02"]
    summary = run(settings.load([*arguments, *more]))
    assert set(summary.validation) == {"accuracy", "f1", "matthews"}
    assert summary.validation["accuracy"] > 0.9


def test_an_interrupted_run_goes_on_with_the_batches_left(
    arguments, tmp_path, capsys, monkeypatch
) -> None:
    arguments = [*arguments, "--run.checkpoint_every", "2", "--optim.epochs", "2"]
    assert main([*arguments, "--run.output", str(tmp_path / "whole")]) == 0
    made = trainer.make_train_step

    def interrupted(*args):
        step = made(*args)

        def wrapped(state, *rest):
            if int(state.step) == 7:
                raise KeyboardInterrupt
            return step(state, *rest)

        return wrapped

    monkeypatch.setattr(trainer, "make_train_step", interrupted)
    assert main(arguments) == 130
    monkeypatch.undo()
    assert main(arguments) == 0
    # In the second of four batches of its second epoch.
    assert "resumed from step 6 of 8" in capsys.readouterr().out
    for file in ("metrics.jsonl", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_notes_of_examples_and_input_are_reported(models, arguments, tmp_path) -> None:
    shutil.copytree(models / "vit", tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").unlink()
    more = ["--model.name", str(tmp_path / "vit"), "--images.classes", '["3", "8"]']
    run(settings.load([*arguments, *more]))
    notes = json.loads((tmp_path / "run" / "results.json").read_text())["notes"]
    assert any("images are of other classes (0, 1, 2, 4" in note for note in notes)
    assert any("has no `preprocessor_config.json`" in note for note in notes)


def test_a_model_without_image_classification_is_refused(
    models, arguments, tmp_path, capsys
) -> None:
    shutil.copytree(models / "vit", tmp_path / "clip")
    (tmp_path / "clip" / "config.json").write_text('{"model_type": "clip"}')
    assert main([*arguments, "--model.name", str(tmp_path / "clip")]) == 2
    error = capsys.readouterr().err
    assert "no Flax model for `clip` with the head `image-classification`" in error
    assert error.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--images.classes", '["1", "x"]'], "has no images of the class 'x'"),
        (["--images.augment", '["turn"]'], "`images.augment`"),
        (["--images.image", "img"], "`images.image` is a column of a dataset on the Hub"),
        (["--images.train", "x"], "set only one of `images.dataset`"),
        (["--run.metric", "f1"], "`run.metric` 'f1' is not computed here; it can be accuracy, m"),
    ],
)
def test_bad_input_is_one_sentence(more, message, arguments, tmp_path, capsys) -> None:
    assert main([*arguments, *more]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("error: ")
    assert not (tmp_path / "run").exists()
