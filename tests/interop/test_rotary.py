"""Rotary tables other than those that the Flax classes make: PyTorch is the judge."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

import circflax as cf
from circflax.interop import (
    CheckpointError,
    export_adapted,
    load_adapted,
    load_model,
    outline_model,
)
from circflax.interop._rotary import rotary_frequencies, rotary_table
from tests.architectures import VOCABULARY, Architecture, architecture
from tests.interop.test_adapted import adapted

oracle = pytest.importorskip("tests.interop.oracle", exc_type=ImportError)

LENGTH, MOST = 48, 64
TOKENS = np.random.default_rng(0).integers(5, VOCABULARY, (2, LENGTH), dtype=np.int32)
# With heads of 16, llama3 keeps, blends and slows down some features each.
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SETTINGS = {
    "theta": {"rope_theta": 5e5},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama3": {"rope_scaling": LLAMA3},
}
# In Flax the heads of Llama and Mistral share their 32 features; Gemma's have a size of their own.
HEADS = {"llama": 2, "mistral": 2, "gemma": 4}
PLAIN = {
    "base": {"rope_theta": 10000.0},
    "default": {"rope_scaling": {"rope_type": "default"}},
    "nothing": {"rope_scaling": {"rope_type": "linear", "factor": 1.0}},
}


def family(id: str, **fields: Any) -> Architecture:
    """A model of heads of 16 features, with some settings."""
    base = architecture(id)

    def config() -> Any:
        sizes = {"head_dim": 16, "num_attention_heads": HEADS[id], "max_position_embeddings": MOST}
        # Beyond the vocabulary, so that generation goes on to its full length.
        sizes["eos_token_id"] = VOCABULARY
        return type(base.config())(**{**base.config().to_dict(), **sizes, **fields})

    return replace(base, config=config, inputs=lambda: {"input_ids": TOKENS})


def case(id: str, setting: str) -> Architecture:
    return family(id, **SETTINGS[setting])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Returns the checkpoint that PyTorch wrote for a case; not to be written to."""
    directories: dict[tuple[str, str], Path] = {}

    def get(id: str, setting: str) -> Path:
        if (id, setting) not in directories:
            directory = tmp_path_factory.mktemp(f"{id}-{setting}")
            directories[id, setting] = oracle.save(oracle.torch_model(case(id, setting)), directory)
        return directories[id, setting]

    return get


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("id", HEADS)
def test_logits(saved, id: str, setting: str) -> None:
    entry, base = case(id, setting), saved(id, setting)
    model, params, _ = load_model(base, entry.head)
    expected = oracle.torch_logits(oracle.reload(entry, base), entry)
    oracle.assert_close(oracle.flax_logits(model, params, entry), expected)
    wrong = getattr(transformers, entry.flax_class)(model.config, _do_init=False)
    assert np.abs(oracle.flax_logits(wrong, params, entry) - expected).max() > 0.01


@pytest.mark.parametrize(("id", "setting"), list(zip(HEADS, SETTINGS, strict=True)))
def test_greedy_generation(saved, id: str, setting: str) -> None:
    entry, base = case(id, setting), saved(id, setting)
    model, params, _ = load_model(base, entry.head)
    generate = model.generate
    if id == "llama":
        plan = cf.make_plan(params, cf.AdapterConfig(method=cf.C3A(b=4), targets=entry.targets))
        params = cf.combine(params, cf.init_adapters(jax.random.key(0), plan, params))
        generate = cf.linen.attach(generate, plan)
    prompt, options = TOKENS[:, :20], dict(max_length=LENGTH, do_sample=False, pad_token_id=0)
    expected = oracle.reload(entry, base).generate(oracle.torch.tensor(prompt).long(), **options)
    ours = generate(prompt, params=params, **options).sequences
    assert expected.shape == TOKENS.shape and np.array_equal(ours, expected.numpy())


@pytest.fixture(scope="module")
def llama(saved) -> SimpleNamespace:
    """A Llama with `rope_scaling` of the type llama3, and its logits."""
    entry, base = case("llama", "llama3"), saved("llama", "llama3")
    model, params, _ = load_model(base, entry.head)
    logits = oracle.flax_logits(model, params, entry)
    return SimpleNamespace(entry=entry, base=base, model=model, params=params, logits=logits)


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_fresh_adapters_change_no_bit(llama, jit: bool) -> None:
    plan = cf.make_plan(
        llama.params, cf.AdapterConfig(method=cf.CDVFT(), targets=llama.entry.targets)
    )
    params = cf.combine(llama.params, cf.init_adapters(jax.random.key(0), plan, llama.params))
    run = cf.linen.attach(llama.model, plan)
    if jit:
        assert np.array_equal(oracle.flax_logits(run, params, llama.entry), llama.logits)
    else:
        ours, base = run(TOKENS, params=params), llama.model(TOKENS, params=llama.params)
        assert np.array_equal(ours.logits, base.logits)


def test_examples_kept_apart(llama) -> None:
    half = LENGTH // 2
    alone = replace(llama.entry, inputs=lambda: {"input_ids": TOKENS[:, :half]})
    packed = {
        "input_ids": TOKENS[:, :half].reshape(1, LENGTH),
        "position_ids": np.tile(np.arange(half), 2)[None],
        "segment_ids": np.repeat([1, 2], half)[None],
    }
    run = cf.linen.keep_apart(llama.model)
    logits = oracle.flax_logits(run, llama.params, replace(llama.entry, inputs=lambda: packed))
    expected = oracle.flax_logits(llama.model, llama.params, alone)
    oracle.assert_close(logits.reshape(expected.shape), expected)


def test_gradients_of_rematerialised_layers(llama) -> None:
    def gradient(run: Any) -> Any:
        return jax.jit(jax.grad(lambda p: jnp.mean(run(TOKENS, params=p).logits ** 2)))(
            llama.params
        )

    ours, expected = gradient(cf.linen.rematerialize(llama.model)), gradient(llama.model)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), ours, expected)


def test_models_with_other_settings_side_by_side(llama) -> None:
    other, _, _ = load_model(llama.base, "causal-lm", config=SETTINGS["theta"])
    others = oracle.flax_logits(other, llama.params, llama.entry)
    assert np.abs(others - llama.logits).max() > 0.01
    again = oracle.flax_logits(llama.model, llama.params, llama.entry)
    assert np.array_equal(again, llama.logits)


def test_bfloat16(llama) -> None:
    half, _, _ = load_model(llama.base, "causal-lm", dtype=jnp.bfloat16)
    wrong = transformers.FlaxLlamaForCausalLM(half.config, dtype=jnp.bfloat16, _do_init=False)
    near, far = (
        np.abs(oracle.flax_logits(model, llama.params, llama.entry) - llama.logits).mean()
        for model in (half, wrong)
    )
    assert 0 < near < far / 2


def test_an_outline_and_fresh_weights(llama) -> None:
    outline = outline_model(llama.entry.config(), llama.entry.head)
    logits = oracle.flax_logits(outline.model, llama.params, llama.entry)
    assert np.array_equal(logits, llama.logits)
    jax.tree.map(
        lambda a, b: np.testing.assert_equal(a.shape, b.shape), outline.init(), llama.params
    )


def test_the_module_is_one_of_its_class(llama) -> None:
    module = llama.model.module
    assert isinstance(module, transformers.FlaxLlamaForCausalLM.module_class)
    assert module.config is llama.model.config
    arguments = TOKENS, np.ones_like(TOKENS), np.broadcast_to(np.arange(LENGTH), TOKENS.shape)
    for run in (
        lambda params: module.apply({"params": params}, *arguments),
        lambda params: module.clone().bind({"params": params})(*arguments),
    ):
        assert np.array_equal(jax.jit(run)(llama.params).logits, llama.logits)


def test_settings_survive_export(saved, tmp_path) -> None:
    entry = case("mistral", "llama3")
    flax = adapted(saved("mistral", "llama3"), entry, tmp_path / "adapter", cf.C3A(b=4))
    export_adapted(tmp_path / "adapter", tmp_path / "merged")
    merged = oracle.reload(entry, tmp_path / "merged")
    assert merged.config.rope_scaling == LLAMA3
    assert merged.config.sliding_window == entry.config().sliding_window
    oracle.assert_close(oracle.torch_logits(merged, entry), flax.logits)
    model, params, _ = load_model(tmp_path / "merged", entry.head)
    oracle.assert_close(oracle.flax_logits(model, params, entry), flax.logits)
    loaded = load_adapted(tmp_path / "adapter")
    leaves = cf.merge(loaded.params, loaded.file.adapters, loaded.file.plan)
    oracle.assert_close(oracle.flax_logits(loaded.model, leaves, entry), flax.logits)


@pytest.mark.parametrize("setting", PLAIN)
@pytest.mark.parametrize("id", HEADS)
def test_tables_that_flax_makes_are_left_alone(id: str, setting: str) -> None:
    outline = outline_model(family(id, **PLAIN[setting]).config(), "causal-lm")
    assert type(outline.model.module) is outline.model.module_class


def test_late_positions() -> None:
    config = family("llama", **SETTINGS["theta"]).config()
    table = rotary_table(rotary_frequencies(config), 131072)
    assert table.shape == (131072, 1, 32) and table.dtype == np.float32
    angles = [131071 * 5e5 ** (-i / 8) for i in range(8)]
    expected = [f(angle) for f in (math.sin, math.cos) for angle in angles * 2]
    np.testing.assert_allclose(table[-1, 0], expected, atol=1e-7)


@pytest.mark.parametrize(
    ("id", "fields", "message"),
    [
        (
            "llama",
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "of the type `dynamic`",
        ),
        (
            "mistral",
            {"rope_scaling": {"type": "yarn", "factor": 2.0}},
            "default, linear, llama3 are",
        ),
        ("gemma", {"rope_scaling": {"factor": 2.0}}, "of the type `None`"),
        ("mistral", {"rope_scaling": {"type": "linear"}}, "needs the number `factor`"),
        ("llama", {"head_dim": 8}, "`head_dim=8`, but `FlaxLlamaForCausalLM` .* makes 16 each"),
        ("mistral", {"head_dim": 32}, "`head_dim=32`, but `FlaxMistralForCausalLM` .* 16 each"),
    ],
)
def test_refusals(saved, tmp_path, id: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        outline_model(family(id, **fields).config())
    base = saved(id, "theta")
    config = json.loads((base / "config.json").read_text()) | fields
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(base / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path, "causal-lm")
