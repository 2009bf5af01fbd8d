"""Reading: what is refused, in which words, and that PyTorch is not needed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from circflax.interop import (
    CheckpointError,
    find_checkpoint,
    load_model,
    outline_model,
    save_model,
)
from circflax.interop._tensors import MSGPACK, SAFETENSORS

HEAD = "sequence-classification"


@pytest.fixture
def bert(checkpoint, tmp_path) -> Path:
    """A copy of the BERT checkpoint for a test to spoil."""
    return Path(shutil.copytree(checkpoint("bert"), tmp_path / "bert"))


def shard(directory: Path) -> dict[str, str]:
    """Splits the weights in two files and returns the index's map."""
    tensors = load_file(directory / SAFETENSORS)
    (directory / SAFETENSORS).unlink()
    names = sorted(tensors)
    weight_map = {}
    for file, part in (("model-1.safetensors", names[::2]), ("model-2.safetensors", names[1::2])):
        save_file({name: tensors[name] for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / f"{SAFETENSORS}.index.json").write_text(json.dumps(index))
    return weight_map


def test_truncated_file(bert: Path) -> None:
    data = (bert / SAFETENSORS).read_bytes()
    for length in (0, 4, 100, len(data) - 1):
        (bert / SAFETENSORS).write_bytes(data[:length])
        with pytest.raises(CheckpointError, match="is truncated or corrupt"):
            load_model(bert, HEAD)


def test_missing_shard(bert: Path) -> None:
    shard(bert)
    (bert / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors` is missing"):
        load_model(bert, HEAD)


def test_index_that_promises_too_much(bert: Path) -> None:
    weight_map = shard(bert) | {"bert.pooler.extra": "model-1.safetensors"}
    index = bert / f"{SAFETENSORS}.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"promises: bert\.pooler\.extra"):
        load_model(bert, HEAD)
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside its directory"):
        load_model(bert, HEAD)
    index.write_text("[]")
    with pytest.raises(CheckpointError, match="no index"):
        load_model(bert, HEAD)


def test_corrupt_flax_file(bert: Path) -> None:
    (bert / SAFETENSORS).unlink()
    (bert / MSGPACK).write_bytes(b"\x93version https://git-lfs")
    with pytest.raises(CheckpointError, match="is truncated or corrupt"):
        load_model(bert, HEAD)


def test_pickled_weights_are_refused(bert: Path) -> None:
    (bert / SAFETENSORS).rename(bert / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"safe_serialization=True"):
        load_model(bert, HEAD)


def test_no_weights(bert: Path) -> None:
    (bert / SAFETENSORS).unlink()
    with pytest.raises(CheckpointError, match=r"holds no weights: expected `model\.safetensors`"):
        load_model(bert, HEAD)


def test_other_number_of_labels(bert: Path) -> None:
    with pytest.raises(
        CheckpointError,
        match=r"`classifier\..*shape \(.*3,?\).*`num_labels=5` needs \(.*5,?\); `new_head=True`",
    ):
        load_model(bert, HEAD, config={"num_labels": 5})


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 3}
IMAGES = SMALL | {"image_size": 8, "patch_size": 4}
TEXTS = SMALL | {"vocab_size": 9, "intermediate_size": 16, "max_position_embeddings": 8}


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("Bert", TEXTS),
        ("Roberta", TEXTS),
        ("ViT", IMAGES | {"intermediate_size": 16}),
        ("Beit", IMAGES | {"intermediate_size": 16}),
        ("Dinov2", IMAGES),
    ],
)
def test_new_head(tmp_path, caplog, kind: str, fields: dict) -> None:
    import transformers

    outline = outline_model(getattr(transformers, f"{kind}Config")(**fields))
    params = outline.init(seed=1)
    save_model(tmp_path / "base", outline.model, params)
    head = type(outline.model)
    with pytest.raises(CheckpointError, match=r"`new_head=True` leaves this head unread"):
        load_model(tmp_path / "base", head, config={"num_labels": 5})
    old = flatten_dict(params)
    model, params, report = load_model(
        tmp_path / "base", head, config={"num_labels": 5}, new_head=True
    )
    assert model.config.num_labels == 5
    assert set(report.initialised) == set(outline.new_leaves)
    assert len(report.unused) == len(outline.new_leaves)
    assert {name.partition(".")[0] for name in report.unused} == {"classifier"}
    for path, leaf in flatten_dict(params).items():
        if path not in report.initialised:
            np.testing.assert_array_equal(leaf, old[path])
    assert 5 in {leaf.shape[-1] for leaf in flatten_dict(params["classifier"]).values()}
    assert not caplog.records


def test_new_head_of_the_same_size(bert: Path) -> None:
    old, new = (load_model(bert, HEAD, new_head=new)[1] for new in (False, True))
    assert np.abs(old["classifier"]["kernel"] - new["classifier"]["kernel"]).max() > 1e-3
    assert not new["classifier"]["bias"].any()
    np.testing.assert_array_equal(
        old["bert"]["pooler"]["dense"]["kernel"], new["bert"]["pooler"]["dense"]["kernel"]
    )


def test_no_head_to_make_anew(bert: Path) -> None:
    with pytest.raises(CheckpointError, match="`FlaxBertModel` has no head that could be made"):
        load_model(bert, "base", new_head=True)


def test_a_new_head_hides_no_other_misfit(bert: Path) -> None:
    with pytest.raises(CheckpointError, match=r"word_embeddings.weight` has the shape .*\)\.$"):
        load_model(bert, HEAD, config={"vocab_size": 5}, new_head=True)


def test_two_tensors_for_one_leaf(bert: Path) -> None:
    tensors = load_file(bert / SAFETENSORS)
    tensors["bert.embeddings.LayerNorm.gamma"] = tensors["bert.embeddings.LayerNorm.weight"]
    save_file(tensors, bert / SAFETENSORS)
    with pytest.raises(
        CheckpointError, match="both hold the leaf `bert/embeddings/LayerNorm/scale`"
    ):
        load_model(bert, HEAD)


def test_configuration_errors(bert: Path) -> None:
    with pytest.raises(CheckpointError, match="`BertConfig` has no field `num_label`"):
        load_model(bert, HEAD, config={"num_label": 5})
    config = json.loads((bert / "config.json").read_text())
    for change, message in (
        ({"model_type": "no_such_model"}, "configuration in .* cannot be read"),
        ({"model_type": "mamba"}, "no Flax model for `mamba` .*it has none at all"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised weights"),
    ):
        (bert / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match=message):
            load_model(bert, HEAD)
    (bert / "config.json").unlink()
    with pytest.raises(CheckpointError, match="lacks the model's configuration, `config"):
        load_model(bert, HEAD)


def test_head_errors(bert: Path) -> None:
    import transformers

    with pytest.raises(CheckpointError, match="`classifier` is no kind of head; choose from base,"):
        load_model(bert, "classifier")
    with pytest.raises(CheckpointError, match="with the head `image-classification`; it has base,"):
        load_model(bert, "image-classification")
    with pytest.raises(CheckpointError, match=r"`FlaxGPT2Model` is no Flax class for .* `bert`"):
        load_model(bert, transformers.FlaxGPT2Model)
    model, _, _ = load_model(bert, transformers.FlaxBertForSequenceClassification)
    assert type(model) is transformers.FlaxBertForSequenceClassification


def test_source_errors(bert: Path) -> None:
    with pytest.raises(CheckpointError, match="is a local directory and has no `revision`"):
        find_checkpoint(bert, "main")
    for source in ("circflax/no-such-repository", bert / "nowhere"):
        with pytest.raises(CheckpointError, match="neither a local directory nor a Hub repository"):
            find_checkpoint(source)


def test_download_asks_for_safe_files_only(monkeypatch, bert: Path) -> None:
    import huggingface_hub

    asked = []

    def snapshot_download(name, *, revision, allow_patterns, ignore_patterns):
        asked.append((name, revision, allow_patterns))
        return str(bert)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert find_checkpoint("someone/bert", "v1") == bert
    (bert / SAFETENSORS).unlink()
    find_checkpoint("someone/bert", "v1")
    # Flax's own file is fetched only where there are no safetensors.
    assert ["flax_model.msgpack" in patterns for *_, patterns in asked] == [False, False, True]
    assert {call[:2] for call in asked} == {("someone/bert", "v1")}
    assert not any(
        pattern.endswith((".bin", ".pt", ".py", "*")) for *_, files in asked for pattern in files
    )


def test_seed_decides_new_leaves(bert: Path) -> None:
    tensors = load_file(bert / SAFETENSORS)
    kept = {name: tensor for name, tensor in tensors.items() if "classifier" not in name}
    save_file(kept, bert / SAFETENSORS)
    kernels = [load_model(bert, HEAD, seed=seed)[1]["classifier"]["kernel"] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert np.abs(kernels[0] - kernels[2]).max() > 1e-3


@pytest.mark.slow
def test_without_torch(checkpoint, tmp_path) -> None:
    script = """
import sys
sys.modules["torch"] = None
from circflax.interop import export_merged, load_model
model, params, report = load_model(sys.argv[1], "causal-lm")
assert report.initialised == report.unused == ()
export_merged(sys.argv[1], sys.argv[2], model, {("lm_head", "kernel"): lambda leaf: leaf + 1})
"""
    arguments = [str(checkpoint("llama")), str(tmp_path / "out")]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True)
    before = load_file(checkpoint("llama") / SAFETENSORS)
    after = load_file(tmp_path / "out" / SAFETENSORS)
    np.testing.assert_array_equal(before["lm_head.weight"] + 1, after["lm_head.weight"])


@pytest.mark.slow
def test_importing_needs_no_transformers() -> None:
    script = "import sys; sys.modules['transformers'] = None; import circflax.interop"
    subprocess.run([sys.executable, "-c", script], check=True)
