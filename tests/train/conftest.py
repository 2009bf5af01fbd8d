"""A tiny pretrained model and a tiny task for the tests of whole runs."""

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest


@pytest.fixture(autouse=True, scope="module")
def one_device() -> Iterator[None]:
    """Runs inside a test take one of the simulated devices, as one in a process of its own does."""
    devices = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: devices)
        yield


WORDS = ("red", "green", "blue", "apple", "stone", "river", "cloud", "lamp", "chair", "window")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two narrow layers, random, with its tokenizer, as a Hugging Face directory."""
    from transformers import BertConfig, BertTokenizerFast, FlaxBertModel

    directory = tmp_path_factory.mktemp("model")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (directory / "vocab.txt").write_text("\n".join([*special, *WORDS]) + "\n")
    tokenizer = BertTokenizerFast(directory / "vocab.txt", model_max_length=64)
    tokenizer.save_pretrained(directory)
    config = BertConfig(
        vocab_size=len(special) + len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.3,  # wide enough for random features to tell words apart
    )
    FlaxBertModel(config, seed=1).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files of short texts; their label is whether they speak of a colour."""
    directory = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name, count in (("train", 96), ("validation", 24), ("test", 24)):
        lines = []
        for i in range(count):
            words = list(rng.choice(WORDS[3:], size=rng.integers(2, 12)))
            if i % 2:
                words[rng.integers(len(words))] = str(rng.choice(WORDS[:3]))
            lines.append(json.dumps({"text": " ".join(words), "label": ["plain", "colour"][i % 2]}))
        (directory / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return directory


@pytest.fixture
def arguments(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> list[str]:
    """Command-line arguments of a short run; later ones win."""
    settings = {
        "model.name": tiny_model,
        "data.root": tiny_data,
        "data.train": "train.jsonl",
        "data.validation": "validation.jsonl",
        "data.test": "test.jsonl",
        "data.max_length": 16,
        "data.buckets": [16],
        "optim.epochs": 2,
        "optim.batch_size": 16,
        "run.output": tmp_path / "run",
    }
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]
