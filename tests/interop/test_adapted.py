"""Adapters from file to merged model: Flax with adapters, Flax merged and PyTorch agree."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file, save_file

import circflax as cf
from circflax.cli import main
from circflax.interop._checkpoint import read_tensors
from tests.architectures import ARCHITECTURES, Architecture, architecture

oracle = pytest.importorskip("tests.interop.oracle", exc_type=ImportError)

CIRCULANT = {"cdvft": cf.CDVFT(), "c3a": cf.C3A(b=4), "bca": cf.BCA(p=8)}
OTHERS = {
    "lora": cf.LoRA(r=2),
    "vera": cf.VeRA(r=5),
    "fourierft": cf.FourierFT(n=9),
    "ia3": cf.IA3(),
    "boft": cf.BOFT(b=2),
    "lamda": cf.LaMDA(r=2),
}
METHODS = CIRCULANT | OTHERS
# Every architecture meets a method; every method meets the one whose files hold kernels (in, out),
# and what its own wheel turns them into elsewhere.
PAIRS = [
    pytest.param(entry, name, marks=() if own else pytest.mark.slow, id=f"{entry}-{name}")
    for i, entry in enumerate(ARCHITECTURES)
    for j, name in enumerate(METHODS)
    if (own := i % len(METHODS) == j) or entry.id == "gpt2"
]


def adapted(base: Path, entry: Architecture, directory: Path, method: cf.Method, train=()):
    """Random adapters for a checkpoint, saved as a run saves them."""
    model, params, report = cf.interop.load_model(base, entry.head)
    layouts = cf.linen.find_layouts(lambda p: model(**entry.inputs(), params=p), params)
    chosen = cf.AdapterConfig(method=method, targets=entry.targets, train=train)
    plan = cf.make_plan(params, chosen, layouts)
    adapters = cf.init_adapters(jax.random.key(0), plan, params)
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(
        lambda a: a + 0.05 * rng.standard_normal(a.shape).astype(a.dtype), adapters
    )
    save(directory, model, params, plan, adapters, base, entry)
    run = cf.linen.attach(model, plan)
    logits = oracle.flax_logits(run, cf.combine(params, adapters), entry)
    return SimpleNamespace(
        model=model, params=params, plan=plan, adapters=adapters, logits=logits, report=report
    )


def save(directory: Path, model, params, plan, adapters, base: Path, entry: Architecture) -> None:
    """Saves adapters as a run does."""
    cf.save_adapters(directory, adapters, plan, params, base=str(base))
    model.config.architectures = [entry.torch_class]
    model.config.save_pretrained(directory)


@pytest.mark.parametrize(("entry", "name"), PAIRS)
def test_exported_in_pytorch_is_adapted_in_flax(checkpoint, tmp_path, entry, name) -> None:
    base = checkpoint(entry.id)
    flax = adapted(base, entry, tmp_path / "adapter", METHODS[name])
    cf.interop.export_adapted(tmp_path / "adapter", tmp_path / "merged")
    merged = oracle.reload(entry, tmp_path / "merged")
    oracle.assert_close(oracle.torch_logits(merged, entry), flax.logits)
    before, after = read_tensors(base), read_tensors(tmp_path / "merged")
    assert set(before) == set(after)
    changed = [n for n in before if before[n].data().tobytes() != after[n].data().tobytes()]
    biases = [t for t in flax.plan.targets if t.method.changes_bias and t.bias is not None]
    assert len(changed) == len(flax.plan.targets) + len(biases)


@pytest.fixture
def bert(checkpoint, tmp_path):
    entry = architecture("bert")
    flax = adapted(checkpoint("bert"), entry, tmp_path / "adapter", cf.CDVFT(), ("LayerNorm",))
    return SimpleNamespace(entry=entry, base=checkpoint("bert"), **vars(flax))


def test_loaded_again_it_computes_the_same(bert, tmp_path) -> None:
    loaded = cf.interop.load_adapted(tmp_path / "adapter")
    assert loaded.file.plan == bert.plan
    run = cf.linen.attach(loaded.model, loaded.file.plan)
    both = cf.combine(loaded.params, loaded.file.adapters)
    assert np.array_equal(oracle.flax_logits(run, both, bert.entry), bert.logits)


def test_a_base_that_lacks_an_adapted_layer(bert, tmp_path) -> None:
    base = Path(shutil.copytree(bert.base, tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    del tensors["bert.encoder.layer.0.attention.self.query.weight"]
    save_file(tensors, base / "model.safetensors")
    message = r"lacks the leaf `bert/.*/0/attention/self/query/kernel`"
    with pytest.raises(cf.interop.CheckpointError, match=message):
        cf.interop.load_adapted(tmp_path / "adapter", base)
    with pytest.raises(cf.interop.CheckpointError, match=message):
        cf.interop.export_adapted(tmp_path / "adapter", tmp_path / "merged", base)


def test_a_merged_checkpoint_for_orbax(bert, tmp_path, capsys) -> None:
    assert main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged"), "--float64"]) == 0
    with ocp.StandardCheckpointer() as checkpointer:
        merged = checkpointer.restore(tmp_path / "merged")
    oracle.assert_close(oracle.flax_logits(bert.model, merged, bert.entry), bert.logits)
    assert "merged parameters" in capsys.readouterr().out


def test_export_in_shards_loads_everywhere(bert, tmp_path) -> None:
    arguments = ["export", str(tmp_path / "adapter"), str(tmp_path / "merged")]
    assert main([*arguments, "--max-shard-size", "20KB"]) == 0
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 2
    logits = oracle.torch_logits(oracle.reload(bert.entry, tmp_path / "merged"), bert.entry)
    oracle.assert_close(logits, bert.logits)
    model, params, _ = cf.interop.load_model(tmp_path / "merged", bert.entry.head)
    oracle.assert_close(oracle.flax_logits(model, params, bert.entry), bert.logits)


def test_a_new_head_is_exported_with_its_classes(checkpoint, tmp_path) -> None:
    entry = architecture("bert")
    headless = oracle.torch_model(entry, torch_class="BertModel")
    base = oracle.save(headless, tmp_path / "base")
    names = {0: "no", 1: "yes", 2: "perhaps"}
    config = {"num_labels": 3, "id2label": names, "label2id": {n: i for i, n in names.items()}}
    model, params, report = cf.interop.load_model(base, entry.head, config=config)
    train = tuple("/".join(path) for path in report.initialised)
    plan = cf.make_plan(params, cf.AdapterConfig(method=cf.C3A(), targets=("query",), train=train))
    adapters = cf.init_adapters(jax.random.key(0), plan, params)
    save(tmp_path / "adapter", model, params, plan, adapters, base, entry)
    cf.interop.export_adapted(tmp_path / "adapter", tmp_path / "merged")
    merged = oracle.reload(entry, tmp_path / "merged")
    assert merged.config.id2label == names
    expected = oracle.flax_logits(model, params, entry)
    oracle.assert_close(oracle.torch_logits(merged, entry), expected)


@pytest.fixture(params=["bert", "vit"])
def other_head(request, checkpoint, tmp_path):
    """Adapters with a head of other classes than the base's own."""
    entry = architecture(request.param)
    names = {i: f"class {i}" for i in range(5)}
    config = {"num_labels": 5, "id2label": names, "label2id": {n: i for i, n in names.items()}}
    base = checkpoint(entry.id)
    model, params, report = cf.interop.load_model(base, entry.head, config=config, new_head=True)
    train = tuple("/".join(path) for path in report.initialised)
    layouts = cf.linen.find_layouts(lambda p: model(**entry.inputs(), params=p), params)
    chosen = cf.AdapterConfig(method=cf.C3A(b=4), targets=("query",), train=train)
    plan = cf.make_plan(params, chosen, layouts)
    adapters = cf.init_adapters(jax.random.key(0), plan, params)
    rng = np.random.default_rng(0)
    # As after training: neither the adapters nor the head are what they began as.
    adapters = jax.tree.map(
        lambda a: a + 0.05 * rng.standard_normal(a.shape).astype(a.dtype), adapters
    )
    save(tmp_path / "adapter", model, params, plan, adapters, base, entry)
    run = cf.linen.attach(model, plan)
    logits = oracle.flax_logits(run, cf.combine(params, adapters), entry)
    return SimpleNamespace(
        entry=entry, base=base, names=names, model=model, params=params, logits=logits
    )


def test_a_head_of_other_classes_is_exported(other_head, tmp_path) -> None:
    entry = other_head.entry
    cf.interop.export_adapted(tmp_path / "adapter", tmp_path / "merged")
    merged = oracle.reload(entry, tmp_path / "merged")
    assert merged.config.id2label == other_head.names
    oracle.assert_close(oracle.torch_logits(merged, entry), other_head.logits)
    before, after = read_tensors(other_head.base), read_tensors(tmp_path / "merged")
    assert set(before) == set(after)
    model, params, report = cf.interop.load_model(tmp_path / "merged", entry.head)
    assert report.initialised == report.unused == () and model.config.num_labels == 5
    oracle.assert_close(oracle.flax_logits(model, params, entry), other_head.logits)


def test_a_head_of_other_classes_is_merged(other_head, tmp_path) -> None:
    loaded = cf.interop.load_adapted(tmp_path / "adapter")
    merged = cf.merge(loaded.params, loaded.file.adapters, loaded.file.plan)
    logits = oracle.flax_logits(loaded.model, merged, other_head.entry)
    oracle.assert_close(logits, other_head.logits)


def test_a_new_head_that_was_not_trained_is_refused(other_head, tmp_path, capsys) -> None:
    file = cf.load_adapters(tmp_path / "adapter")
    plan = replace(file.plan, trained=(("classifier", "bias"),))
    adapters = {**file.adapters, "classifier": {"bias": file.adapters["classifier"]["bias"]}}
    save(
        tmp_path / "adapter",
        other_head.model,
        other_head.params,
        plan,
        adapters,
        other_head.base,
        other_head.entry,
    )
    for command in ("export", "merge"):
        assert main([command, str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 2
        error = capsys.readouterr().err
        assert "do not train `classifier/kernel`, which the base in" in error
    assert not (tmp_path / "merged").exists()


def test_inspect_fits_a_terminal(bert, tmp_path, capsys) -> None:
    assert main(["inspect", str(tmp_path / "adapter")]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines()[:5])) <= 80
    assert f"{len(bert.plan.targets)} layers" in out and "CDVFT(" in out
    assert "bert/encoder/layer/0/attention/self/query" in out


def test_inspect_shows_what_products_cost(bert, tmp_path, capsys) -> None:
    assert main(["inspect", str(tmp_path / "adapter"), "--costs", "--tokens", "512"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    assert "512 tokens" in out and f"{len(bert.plan.targets)} × 1 × 1 blocks of" in out
    for platform in ("cpu", "tpu", "cuda"):
        lines = [line for line in out.splitlines() if line.split()[:1] == [platform]]
        assert len(lines) == 2 and all(line.count("*") == 1 for line in lines)
    assert main(["inspect", str(tmp_path / "adapter"), "--costs", "--tokens", "0"]) == 2
    assert "--tokens" in capsys.readouterr().err


def damage(directory: Path, what: str) -> None:
    weights, config = directory / "adapter_model.safetensors", directory / "adapter_config.json"
    match what:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-40])
        case "corrupt":
            weights.write_bytes(b"\xff" * 64)
        case "no weights":
            weights.unlink()
        case "no configuration":
            (directory / "config.json").unlink()
        case "half a configuration":
            config.write_text(config.read_text()[:200])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("truncated", "truncated or corrupt"),
        ("corrupt", "truncated or corrupt"),
        ("no weights", "adapter_model.safetensors is missing"),
        ("no configuration", "no whole `config.json`"),
        ("half a configuration", "not a whole adapter configuration"),
    ],
)
def test_damaged_adapters_are_refused(what, message, bert, tmp_path, capsys) -> None:
    damage(tmp_path / "adapter", what)
    for command in ("export", "merge"):
        assert main([command, str(tmp_path / "adapter"), str(tmp_path / "merged")]) != 0
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "merged").exists()


def test_adapters_for_another_base_are_refused(bert, tmp_path, capsys) -> None:
    other = oracle.torch_model(bert.entry)
    with oracle.torch.no_grad():
        other.bert.encoder.layer[0].attention.self.query.weight.mul_(1.5)
    oracle.save(other, tmp_path / "other")
    arguments = ["export", str(tmp_path / "adapter"), str(tmp_path / "merged")]
    assert main([*arguments, "--base", str(tmp_path / "other")]) == 2
    assert "trained on another base model" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_a_result_that_is_not_finite_is_refused(bert, tmp_path, capsys) -> None:
    huge = jax.tree.map(lambda a: np.full(a.shape, 3e38, a.dtype), bert.adapters)
    cf.save_adapters(tmp_path / "adapter", huge, bert.plan, bert.params, base=str(bert.base))
    for command in ("export", "merge"):
        assert main([command, str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 2
        assert "not finite" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_a_full_disk_is_one_sentence(bert, tmp_path, capsys, monkeypatch) -> None:
    room = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room._replace(free=10))
    assert main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 1
    assert "the merged checkpoint needs" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_an_existing_output_is_left_alone(bert, tmp_path, capsys) -> None:
    output = tmp_path / "merged"
    output.mkdir()
    (output / "precious").write_text("kept")
    for command in ("export", "merge"):
        assert main([command, str(tmp_path / "adapter"), str(output)]) == 2
        assert "exists" in capsys.readouterr().err
    assert (output / "precious").read_text() == "kept"


def test_a_base_without_a_name_must_be_given(bert, tmp_path, capsys) -> None:
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base": None}))
    arguments = ["export", str(tmp_path / "adapter"), str(tmp_path / "merged")]
    assert main(arguments) == 2
    assert "does not name its base model" in capsys.readouterr().err
    moved = tmp_path / "moved"
    shutil.copytree(bert.base, moved)
    assert main([*arguments, "--base", str(moved)]) == 0
