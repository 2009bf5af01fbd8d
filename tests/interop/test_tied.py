"""Heads tied in PyTorch alone: read off the embedding, and written once they part from it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import circflax as cf
from circflax.interop import export_adapted, load_adapted, load_model, outline_model
from circflax.interop._checkpoint import read_tensors
from circflax.interop._tied import tied_leaves
from tests.architectures import ARCHITECTURES, Architecture, architecture
from tests.interop.test_adapted import adapted

oracle = pytest.importorskip("tests.interop.oracle", exc_type=ImportError)

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
OWN_HEAD = ("lm_head", "kernel")
LANGUAGE = [entry for entry in ARCHITECTURES if entry.head in ("causal-lm", "seq2seq-lm")]


def tying(entry: Architecture, tie: bool = True) -> Architecture:
    def config():
        config = entry.config()
        config.tie_word_embeddings = tie
        return config

    return replace(entry, config=config)


@pytest.fixture(scope="module", params=["llama", "mistral"])
def entry(request) -> Architecture:
    return tying(architecture(request.param))


@pytest.fixture(scope="module")
def base(entry: Architecture, tmp_path_factory) -> Path:
    directory = oracle.save(oracle.torch_model(entry), tmp_path_factory.mktemp("tied"))
    assert HEAD not in read_tensors(directory)
    return directory


def raw(directory: Path) -> dict[str, bytes]:
    return {name: tensor.data().tobytes() for name, tensor in read_tensors(directory).items()}


@pytest.mark.parametrize("entry", LANGUAGE, ids=str)
def test_which_classes_have_a_head_of_their_own(entry: Architecture) -> None:
    for tie in (True, False):
        outline = outline_model(tying(entry, tie).config(), entry.head)
        own = tie and entry.id in ("llama", "mistral")
        expected = (OWN_HEAD, ("model", "embed_tokens", "embedding")) if own else ()
        assert tied_leaves(outline.model) == expected


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "headless"])
def test_logits(entry: Architecture, base: Path, tmp_path, caplog, whole: bool) -> None:
    if not whole:
        base_class = entry.torch_class.replace("ForCausalLM", "Model")
        base = oracle.save(oracle.torch_model(entry, torch_class=base_class), tmp_path / "base")
        assert EMBEDDING not in read_tensors(base)
    model, params, report = load_model(base, entry.head)
    assert report.initialised == report.unused == ()
    assert not caplog.records
    logits = oracle.flax_logits(model, params, entry)
    oracle.assert_close(logits, oracle.torch_logits(oracle.reload(entry, base), entry))


def test_what_is_not_changed_stays_tied(entry: Architecture, base: Path, tmp_path) -> None:
    flax = adapted(base, entry, tmp_path / "adapter", cf.C3A(b=4))
    export_adapted(tmp_path / "adapter", tmp_path / "merged")
    merged = oracle.reload(entry, tmp_path / "merged")
    assert merged.config.tie_word_embeddings
    oracle.assert_close(oracle.torch_logits(merged, entry), flax.logits)
    before, after = raw(base), raw(tmp_path / "merged")
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert all(name.endswith(("q_proj.weight", "v_proj.weight")) for name in changed)
    assert len(changed) == len(flax.plan.targets)


@pytest.mark.parametrize(
    ("targets", "train", "changed"),
    [
        (("q_proj",), ("lm_head",), {HEAD}),
        (("q_proj",), ("embed_tokens",), {EMBEDDING}),
        (("q_proj",), ("lm_head", "embed_tokens"), {HEAD, EMBEDDING}),
        (("lm_head",), (), {HEAD}),
    ],
    ids=["head", "embedding", "both", "adapter"],
)
def test_what_is_changed_is_untied(
    entry: Architecture, base: Path, tmp_path, targets, train, changed: set[str]
) -> None:
    entry = replace(entry, targets=targets)
    flax = adapted(base, entry, tmp_path / "adapter", cf.LoRA(r=2), train)
    export_adapted(tmp_path / "adapter", tmp_path / "merged")
    merged = oracle.reload(entry, tmp_path / "merged")
    assert not merged.config.tie_word_embeddings
    oracle.assert_close(oracle.torch_logits(merged, entry), flax.logits)
    original, after = raw(base)[EMBEDDING], raw(tmp_path / "merged")
    assert {name for name in (HEAD, EMBEDDING) if after[name] != original} == changed
    model, params, report = load_model(tmp_path / "merged", entry.head)
    assert report.initialised == report.unused == ()
    oracle.assert_close(oracle.flax_logits(model, params, entry), flax.logits)

    loaded = load_adapted(tmp_path / "adapter")
    leaves = cf.merge(loaded.params, loaded.file.adapters, loaded.file.plan)
    oracle.assert_close(oracle.flax_logits(loaded.model, leaves, entry), flax.logits)


def test_a_new_head_is_not_the_embedding(entry: Architecture, base: Path, tmp_path) -> None:
    model, params, report = load_model(base, entry.head, new_head=True)
    assert report.initialised == (OWN_HEAD,)
    assert report.unused == ()
    head = np.asarray(params["lm_head"]["kernel"]) * 10
    params["lm_head"]["kernel"] = head
    cf.interop.export_merged(base, tmp_path / "out", model, {}, {OWN_HEAD: head})
    merged = oracle.reload(entry, tmp_path / "out")
    logits = oracle.flax_logits(model, params, entry)
    oracle.assert_close(oracle.torch_logits(merged, entry), logits)


def test_a_head_that_flax_wrote_is_its_own(entry: Architecture, base: Path, tmp_path) -> None:
    """Flax's `save_pretrained` keeps the head beside the embedding, and that the two are tied."""
    model, params, _ = load_model(base, entry.head)
    params["lm_head"]["kernel"] = params["lm_head"]["kernel"][:, ::-1]
    expected = oracle.flax_logits(model, params, entry)
    model.save_pretrained(tmp_path / "flax", params=params)
    model, params, _ = load_model(tmp_path / "flax", entry.head)
    assert model.config.tie_word_embeddings
    oracle.assert_close(oracle.flax_logits(model, params, entry), expected)
    cf.interop.export_merged(tmp_path / "flax", tmp_path / "out", model, {})
    merged = oracle.reload(entry, tmp_path / "out")
    oracle.assert_close(oracle.torch_logits(merged, entry), expected)
