"""New models: what is written of a Flax model is that model, in Flax and in PyTorch."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from circflax.cli import main
from circflax.interop import CheckpointError, load_model, outline_model, save_model
from tests.architectures import ARCHITECTURES, Architecture, architecture

oracle = pytest.importorskip("tests.interop.oracle", exc_type=ImportError)


def assert_equal(actual: dict, expected: dict) -> None:
    actual, expected = flatten_dict(actual), flatten_dict(expected)
    assert actual.keys() == expected.keys()
    for path, leaf in expected.items():
        assert actual[path].dtype == leaf.dtype
        np.testing.assert_array_equal(actual[path], leaf)


@pytest.mark.parametrize("entry", ARCHITECTURES, ids=str)
def test_round_trip(checkpoint, tmp_path, entry: Architecture) -> None:
    model, params, _ = load_model(checkpoint(entry.id), entry.head)
    save_model(tmp_path / "out", model, params, max_shard_size="60KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    again, read, report = load_model(tmp_path / "out", entry.head)
    assert type(again) is type(model)
    assert report.initialised == report.unused == ()
    assert_equal(read, params)
    expected = oracle.torch_logits(oracle.torch_model(entry), entry)
    logits = oracle.torch_logits(oracle.reload(entry, tmp_path / "out"), entry)
    oracle.assert_close(logits, expected)


def test_half_precision(tmp_path) -> None:
    outline = outline_model(architecture("vit").config(), dtype="bfloat16")
    params = outline.init(3)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    save_model(tmp_path / "out", outline.model, params)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert_equal(load_model(tmp_path / "out", "image-classification", param_dtype=None)[1], params)


def test_what_flax_does_not_tie_is_not_tied(tmp_path) -> None:
    entry = architecture("llama")
    config = entry.config()
    config.tie_word_embeddings = True
    outline = outline_model(config, entry.head)
    # Far from the initialisers' values, so that it shows which matrix the logits come from.
    params = jax.tree.map(lambda leaf: leaf * 3, outline.init())
    save_model(tmp_path / "out", outline.model, params)
    assert config.tie_word_embeddings
    expected = oracle.flax_logits(outline.model, params, entry)
    torch_model = oracle.reload(entry, tmp_path / "out")
    oracle.assert_close(oracle.torch_logits(torch_model, entry), expected)


def test_refusals(tmp_path) -> None:
    outline = outline_model(architecture("vit").config())
    leaves = flatten_dict(outline.init())
    bias = ("classifier", "bias")
    rest = {path: leaf for path, leaf in leaves.items() if path != bias}
    name = "`FlaxViTForImageClassification`"
    for changed, message in (
        (rest, f"{name} needs the parameter `classifier/bias`"),
        (leaves | {("classifier", "scale"): np.ones(3)}, f"{name} has no parameter"),
        (rest | {bias: np.ones(4)}, rf"`classifier/bias` has the shape \(4,\), but {name} needs"),
        (rest | {bias: np.full(3, np.nan)}, "`classifier/bias` holds values that are not finite"),
    ):
        with pytest.raises(CheckpointError, match=message):
            save_model(tmp_path / "out", outline.model, unflatten_dict(changed))
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(CheckpointError, match="is not an empty directory"):
        save_model(tmp_path / "out", outline.model, unflatten_dict(leaves))
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["precious"]


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    """A configuration with an image processor beside it, and other things."""
    directory = tmp_path / "vit"
    architecture("vit").config().save_pretrained(directory)
    for name in ("preprocessor_config.json", "adapter_config.json", "model.safetensors"):
        (directory / name).write_text("{}")
    return directory


def new(config: Path, output: Path, *options: str, head: str = "image-classification") -> int:
    return main(["new", str(config), str(output), "--head", head, *options])


def test_new(vit: Path, tmp_path: Path, capsys) -> None:
    assert new(vit / "config.json", tmp_path / "a") == 0
    out = capsys.readouterr().out
    assert new(vit, tmp_path / "b", "--seed", "0") == 0
    assert new(vit, tmp_path / "c", "--seed", "1") == 0
    entry = architecture("vit")
    model, params, report = load_model(tmp_path / "a", entry.head)
    assert report.initialised == report.unused == ()
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert f"new FlaxViTForImageClassification of {count:,} parameters" in out
    written = ["config.json", "model.safetensors", "preprocessor_config.json"]
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == written
    assert_equal(load_model(tmp_path / "b", entry.head)[1], params)
    other = load_model(tmp_path / "c", entry.head)[1]
    assert np.abs(other["classifier"]["kernel"] - params["classifier"]["kernel"]).max() > 1e-3
    oracle.assert_close(
        oracle.torch_logits(oracle.reload(entry, tmp_path / "a"), entry),
        oracle.flax_logits(model, params, entry),
    )


def test_new_from_a_file_of_another_name(vit: Path, tmp_path: Path) -> None:
    (vit / "config.json").rename(vit / "tiny.json")
    assert new(vit / "tiny.json", tmp_path / "out") == 0
    written = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert written == ["config.json", "model.safetensors"]


def test_new_refusals(vit: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").touch()
    before = sorted(tmp_path.rglob("*"))
    for config, output, head, message in (
        (vit, "out", "causal-lm", "no Flax model for `vit` with the head `causal-lm`; it has base"),
        (vit, "out", "classifier", "`classifier` is no kind of head; choose from base,"),
        (tmp_path / "none", "out", "base", "none` is neither a model's configuration nor a"),
        (tmp_path / "empty", "out", "base", "lacks the model's configuration, `config.json`"),
        (vit, "full", "base", "full` exists and is not an empty directory"),
    ):
        assert new(config, tmp_path / output, head=head) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
