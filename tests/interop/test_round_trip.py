"""From PyTorch to Flax, changed, and back to PyTorch: the same numbers on both sides."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from circflax.interop import export_merged, load_model
from circflax.interop._checkpoint import read_tensors
from tests.architectures import ARCHITECTURES, Architecture, architecture

oracle = pytest.importorskip("tests.interop.oracle", exc_type=ImportError)
LeafPath = tuple[str, ...]


def deltas(params: dict, entry: Architecture) -> dict[LeafPath, np.ndarray]:
    """A random change of the first kernel of every kind that adapters usually go to."""
    rng = np.random.default_rng(0)
    paths = [
        next(path for path in flatten_dict(params) if path[-2:] == (target, "kernel"))
        for target in entry.targets
    ]
    leaves = flatten_dict(params)
    return {path: 0.01 * rng.standard_normal(leaves[path].shape).astype("f") for path in paths}


def changed(params: dict, changes: dict[LeafPath, np.ndarray]) -> dict:
    leaves = flatten_dict(params)
    return unflatten_dict(leaves | {path: leaves[path] + by for path, by in changes.items()})


def adding(changes: dict[LeafPath, np.ndarray]) -> dict:
    def add(by: np.ndarray):
        return lambda leaf: (leaf.astype(np.float32) + by).astype(leaf.dtype)

    return {path: add(by) for path, by in changes.items()}


def raw(directory: Path) -> dict[str, bytes]:
    return {name: tensor.data().tobytes() for name, tensor in read_tensors(directory).items()}


@pytest.mark.parametrize("entry", ARCHITECTURES, ids=str)
def test_same_logits_before_and_after_merging(checkpoint, tmp_path, entry: Architecture) -> None:
    base = checkpoint(entry.id)
    model, params, report = load_model(base, entry.head)
    assert type(model).__name__ == entry.flax_class
    assert report.initialised == report.unused == ()
    expected = oracle.torch_logits(oracle.torch_model(entry), entry)
    oracle.assert_close(oracle.flax_logits(model, params, entry), expected)

    changes = deltas(params, entry)
    export_merged(base, tmp_path / "out", model, adding(changes))
    merged = oracle.reload(entry, tmp_path / "out")
    logits = oracle.flax_logits(model, changed(params, changes), entry)
    assert np.abs(logits - expected).max() > 1e-4
    oracle.assert_close(oracle.torch_logits(merged, entry), logits)

    before, after = raw(base), raw(tmp_path / "out")
    assert before.keys() == after.keys()
    assert sum(before[name] != after[name] for name in before) == len(changes)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [entry.torch_class]
    assert config["dtype"] == "float32"


@pytest.mark.parametrize("id", ["gpt2", "bart"])
def test_shards_in_and_out(checkpoint, tmp_path, id: str) -> None:
    entry = architecture(id)
    whole, sharded = checkpoint(id), tmp_path / "sharded"
    oracle.save(oracle.torch_model(entry), sharded, max_shard_size="40KB")
    assert not (sharded / "model.safetensors").exists()
    model, params, _ = load_model(sharded, entry.head)
    _, expected, _ = load_model(whole, entry.head)
    for path, leaf in flatten_dict(expected).items():
        np.testing.assert_array_equal(flatten_dict(params)[path], leaf)

    export_merged(sharded, tmp_path / "out", model, {}, max_shard_size="60KB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert all((tmp_path / "out" / file).stat().st_size < 70_000 for file in files)
    oracle.reload(entry, tmp_path / "out")
    assert raw(tmp_path / "out") == raw(whole)


@pytest.mark.parametrize("torch_dtype", ["bfloat16", "float16"])
def test_half_precision_base(tmp_path, torch_dtype: str) -> None:
    entry = architecture("llama")
    torch_model = oracle.torch_model(entry).to(getattr(oracle.torch, torch_dtype))
    base = oracle.save(torch_model, tmp_path / "base")
    model, params, _ = load_model(base, entry.head)
    assert {leaf.dtype for leaf in flatten_dict(params).values()} == {jnp.dtype(jnp.float32)}
    # PyTorch's rotary frequencies would keep the rounding of a model that is cast back and forth.
    expected = oracle.torch_logits(oracle.reload(entry, base), entry)
    oracle.assert_close(oracle.flax_logits(model, params, entry), expected)
    _, stored, _ = load_model(base, entry.head, param_dtype=None)
    assert {leaf.dtype for leaf in flatten_dict(stored).values()} == {jnp.dtype(torch_dtype)}

    changes = deltas(params, entry)
    export_merged(base, tmp_path / "out", model, adding(changes))
    before, after = read_tensors(base), read_tensors(tmp_path / "out")
    assert {name: tensor.dtype for name, tensor in after.items()} == {
        name: tensor.dtype for name, tensor in before.items()
    }
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == torch_dtype
    rounded = load_model(tmp_path / "out", entry.head)[1]
    logits = oracle.flax_logits(model, rounded, entry)
    oracle.assert_close(oracle.torch_logits(oracle.reload(entry, tmp_path / "out"), entry), logits)


@pytest.mark.parametrize("id", ["bert", "gpt2", "whisper"])
@pytest.mark.parametrize("shards", [False, True], ids=["file", "shards"])
def test_flax_file_only(checkpoint, tmp_path, id: str, shards: bool) -> None:
    entry = architecture(id)
    model, params, _ = load_model(checkpoint(id), entry.head)
    base = tmp_path / "base"
    model.save_pretrained(base, params=params, max_shard_size="60KB" if shards else "1GB")
    assert not list(base.glob("*.safetensors"))
    assert (base / "flax_model.msgpack").exists() != shards
    model, read, report = load_model(base, entry.head)
    assert report.initialised == report.unused == ()
    for path, leaf in flatten_dict(params).items():
        np.testing.assert_array_equal(flatten_dict(read)[path], leaf)

    changes = deltas(params, entry)
    export_merged(base, tmp_path / "out", model, adding(changes))
    merged = oracle.reload(entry, tmp_path / "out")
    logits = oracle.flax_logits(model, changed(params, changes), entry)
    oracle.assert_close(oracle.torch_logits(merged, entry), logits)


@pytest.mark.parametrize("id", ["bert", "roberta", "vit", "gpt2"])
@pytest.mark.parametrize("sharded", [False, True], ids=["file", "shards"])
def test_new_head_on_headless_base(tmp_path, caplog, id: str, sharded: bool) -> None:
    entry = architecture(id)
    kind = {"bert": "Bert", "roberta": "Roberta", "vit": "ViT", "gpt2": "GPT2"}[id]
    torch_base = oracle.torch_model(entry, torch_class=f"{kind}Model")
    base = oracle.save(torch_base, tmp_path / "base")
    model, params, report = load_model(base, entry.head)
    assert not caplog.records
    again = load_model(base, entry.head)[1]
    leaves = flatten_dict(params)
    for path, leaf in flatten_dict(again).items():
        np.testing.assert_array_equal(leaves[path], leaf)
    # A tied language model has no head of its own, and classifiers leave out the base's pooler.
    assert {path[0] for path in report.initialised} == (set() if id == "gpt2" else {"classifier"})
    pooler = () if id in ("bert", "gpt2") else ("pooler.dense.bias", "pooler.dense.weight")
    assert report.unused == pooler

    head = {path: np.asarray(leaves[path]) + 0.1 for path in report.initialised}
    options = {"max_shard_size": "40KB"} if sharded else {}
    export_merged(base, tmp_path / "out", model, adding(deltas(params, entry)), head, **options)
    torch_class = getattr(oracle.transformers, entry.torch_class)
    merged, info = torch_class.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    # PyTorch's classifier has no place for the pooler that the base brings, nor had it before.
    assert all("pooler" in name for name in info["unexpected_keys"])
    params = unflatten_dict(leaves | head)
    logits = oracle.flax_logits(model, changed(params, deltas(params, entry)), entry)
    oracle.assert_close(oracle.torch_logits(merged.eval(), entry), logits)


def test_base_model_from_checkpoint_with_head(checkpoint, tmp_path, caplog) -> None:
    model, params, report = load_model(checkpoint("bert"), "base")
    assert report.initialised == ()
    assert not caplog.records
    assert report.unused == ("classifier.bias", "classifier.weight")
    base = oracle.save(
        oracle.torch_model(architecture("bert"), torch_class="BertForMaskedLM"), tmp_path / "mlm"
    )
    model, params, report = load_model(base, "base")
    assert {path[0] for path in report.initialised} == {"pooler"}
    assert "random values replace: pooler/dense/bias, pooler/dense/kernel." in caplog.text
    added = {path: flatten_dict(params)[path] for path in report.initialised}
    export_merged(base, tmp_path / "out", model, {}, added)
    merged, info = oracle.transformers.BertModel.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"]
    np.testing.assert_array_equal(
        merged.pooler.dense.weight.detach().numpy().T, params["pooler"]["dense"]["kernel"]
    )


def test_tensors_of_other_kinds_are_kept(checkpoint, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text((checkpoint("bert") / "config.json").read_text())
    kept = ("vocab.txt", "tokenizer_config.json", "preprocessor_config.json", "chat_template.jinja")
    for name in kept:
        (base / name).write_text("{}")
    for name in ("pytorch_model.bin", "modeling_bert.py", "pytorch_model.bin.index.json"):
        (base / name).write_text("{}")
    tensors = load_file(checkpoint("bert") / "model.safetensors")
    others = {
        "bert.embeddings.position_ids": oracle.torch.arange(32)[None],
        "extra.mask": oracle.torch.ones(3, dtype=oracle.torch.bool),
        "extra.scale": oracle.torch.ones(5).to(oracle.torch.float8_e4m3fn),
        "extra.empty": oracle.torch.zeros(0, 4),
        "extra.scalar": oracle.torch.tensor(1.5),
    }
    save_file(tensors | others, base / "model.safetensors", metadata={"format": "pt"})
    model, _, report = load_model(base, "sequence-classification")
    assert report.unused == tuple(sorted(others))
    export_merged(base, tmp_path / "out", model, {})
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in (tensors | others).items():
        assert written[name].dtype == tensor.dtype
        assert oracle.torch.equal(
            written[name].view(oracle.torch.uint8) if tensor.ndim else written[name],
            tensor.view(oracle.torch.uint8) if tensor.ndim else tensor,
        )
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors",
        *kept,
    }


def test_old_layer_norm_names(checkpoint, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    entry = architecture("bert")
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text((checkpoint("bert") / "config.json").read_text())
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in load_file(checkpoint("bert") / "model.safetensors").items()
    }
    save_file(old, base / "model.safetensors", metadata={"format": "pt"})
    model, params, report = load_model(base, entry.head)
    assert report.initialised == report.unused == ()
    export_merged(base, tmp_path / "out", model, {})
    merged = oracle.reload(entry, tmp_path / "out")
    oracle.assert_close(
        oracle.torch_logits(merged, entry), oracle.flax_logits(model, params, entry)
    )


def test_configuration_travels(checkpoint, tmp_path) -> None:
    names = {0: "no", 1: "perhaps", 2: "yes"}
    config = {"id2label": names, "label2id": {name: i for i, name in names.items()}}
    model, _, _ = load_model(
        checkpoint("bert"), "sequence-classification", config=config, dtype=jnp.bfloat16
    )
    assert model.dtype == jnp.bfloat16
    export_merged(checkpoint("bert"), tmp_path / "out", model, {})
    read = oracle.transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert read.id2label == names
    assert read.num_labels == 3


def test_new_head_on_headless_flax_file(checkpoint, tmp_path) -> None:
    entry, base = architecture("bert"), tmp_path / "base"
    bare, params, _ = load_model(checkpoint("bert"), "base")
    bare.save_pretrained(base, params=params)
    model, params, report = load_model(base, entry.head, config={"num_labels": 5})
    head = {("classifier", name): leaf for name, leaf in params["classifier"].items()}
    assert set(report.initialised) == set(head)
    export_merged(base, tmp_path / "out", model, {}, head)
    merged = oracle.reload(entry, tmp_path / "out")
    assert merged.config.num_labels == 5
    logits = oracle.flax_logits(model, params, entry)
    oracle.assert_close(oracle.torch_logits(merged, entry), logits)


def test_batch_norm_collections(tmp_path) -> None:
    config = oracle.transformers.RegNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=4, num_labels=3
    )
    torch_model = oracle.transformers.RegNetForImageClassification(config)
    base = oracle.save(torch_model, tmp_path / "base")
    model, params, report = load_model(base, "image-classification")
    assert params.keys() == {"params", "batch_stats"}
    assert report.initialised == ()
    assert all(name.endswith("num_batches_tracked") for name in report.unused)
    statistics = next(path for path in flatten_dict(params) if path[-1] == "var")
    export_merged(base, tmp_path / "out", model, {statistics: lambda leaf: leaf + 1})
    before, after = raw(base), raw(tmp_path / "out")
    name = ".".join(statistics[1:-1]) + ".running_var"
    assert [key for key in before if before[key] != after[key]] == [name]
