"""Models of the usual architectures, adapted without a line of their code."""

import functools
import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import circflax
from circflax import (
    BCA,
    BOFT,
    C3A,
    CDVFT,
    IA3,
    AdapterConfig,
    FourierFT,
    LaMDA,
    LoRA,
    VeRA,
    combine,
    init_adapters,
    make_plan,
    merge,
)
from circflax.linen import attach, find_layouts
from circflax.tree import Layout
from tests.architectures import ARCHITECTURES, Architecture, architecture
from tests.linen.models import with_something

transformers = pytest.importorskip("transformers", "4.57")

CIRCULANT = {"cdvft": CDVFT(), "c3a": C3A(), "bca": BCA(p=8)}
OTHERS = {
    "lora": LoRA(r=2),
    "vera": VeRA(r=5),
    "fourierft": FourierFT(n=9),
    "ia3": IA3(),
    "boft": BOFT(b=2, m=1),
    "lamda": LaMDA(r=2),
}
METHODS = CIRCULANT | OTHERS
# Every architecture meets one method, and each circulant method the one that stores its kernels
# output first.
ROTATION = list(zip(ARCHITECTURES, itertools.cycle(METHODS)))
REST = [(architecture("gpt2"), name) for name in CIRCULANT]
PAIRS = [*ROTATION, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in REST)]
over_pairs = pytest.mark.parametrize(("entry", "method"), PAIRS, ids=str)


@functools.cache
def tiny(id: str):
    """A tiny model, random parameters for it, and how its layers use their kernels."""
    entry = architecture(id)
    model = getattr(transformers, entry.flax_class)(entry.config(), _do_init=False)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        # Larger than the usual initialisation, so that every layer has a say in the output.
        around = 1.0 if path[-1].key in ("scale", "weight") else 0.0
        return jnp.asarray(around + 0.2 * rng.standard_normal(leaf.shape), leaf.dtype)

    params = jax.tree_util.tree_map_with_path(draw, model.params_shape_tree)
    inputs = entry.inputs()
    layouts = find_layouts(lambda p: model(**inputs, params=p), params)
    return model, params, inputs, layouts


def planned(id: str, method: str, everywhere: bool):
    _, params, _, layouts = tiny(id)
    targets = architecture(id).targets
    if everywhere:
        chosen = [path[:-1] for path, layout in layouts.items() if isinstance(layout, Layout)]
        targets = "|".join(re.escape("/".join(path)) for path in chosen)
    config = AdapterConfig(method=METHODS[method], targets=targets)
    plan = make_plan(params, config, layouts)
    return plan, init_adapters(jax.random.key(0), plan, params)


def first(outputs):
    """The outputs proper, without caches and hidden states."""
    return outputs[0]


@pytest.mark.parametrize("entry", ARCHITECTURES, ids=str)
def test_layers_are_found_and_each_refusal_has_a_reason(entry: Architecture) -> None:
    _, params, _, layouts = tiny(entry.id)
    found = {path: layout for path, layout in layouts.items() if isinstance(layout, Layout)}
    assert {path[-2] for path in found} >= set(entry.targets)
    # Only this one family stores its kernels output first.
    output_first = entry.id == "gpt2"
    for path, layout in found.items():
        head = path[-2] == "lm_head"
        assert layout == Layout.parse("out,in" if output_first and not head else "in,out"), path
    assert all(reason for reason in layouts.values())
    kernels = jax.tree_util.tree_leaves_with_path(params)
    names = {tuple(key.key for key in path) for path, leaf in kernels if leaf.ndim == 2}
    # What is not in the list was not called, as the embedding that a tied head reads by hand.
    unseen = {path for path in names - set(layouts) if path[-1] == "kernel"}
    assert all(path[-2] == "lm_head" for path in unseen)


@over_pairs
def test_fresh_adapters_change_no_bit(entry: Architecture, method: str) -> None:
    model, params, inputs, _ = tiny(entry.id)
    plan, adapters = planned(entry.id, method, everywhere=True)
    base = first(model(**inputs, params=params))
    ours = first(attach(model, plan)(**inputs, params=combine(params, adapters)))
    np.testing.assert_array_equal(ours, base)


@pytest.mark.slow
@pytest.mark.parametrize("entry", ARCHITECTURES, ids=str)
def test_fresh_adapters_change_no_bit_under_jit(entry: Architecture) -> None:
    model, params, inputs, _ = tiny(entry.id)
    base = jax.jit(lambda p: first(model(**inputs, params=p)))(params)
    for everywhere in (False, True):
        plan, adapters = planned(entry.id, "cdvft", everywhere)
        ours = jax.jit(lambda p, plan=plan: first(attach(model, plan)(**inputs, params=p)))
        # XLA fuses an activation otherwise where an adapter reads it as well, and then rounds it
        # otherwise: beyond the attention projections a few units in the last place are its own.
        units = 16 if everywhere else 0
        tolerance = units * np.finfo(np.float32).eps * np.abs(base).max()
        np.testing.assert_allclose(ours(combine(params, adapters)), base, rtol=0, atol=tolerance)


@over_pairs
@pytest.mark.parametrize("everywhere", [False, True], ids=["attention", "everywhere"])
def test_adapted_is_merged(entry: Architecture, method: str, everywhere: bool) -> None:
    model, params, inputs, _ = tiny(entry.id)
    plan, adapters = planned(entry.id, method, everywhere)
    adapters = with_something(adapters, 0.05)
    ours = first(attach(model, plan)(**inputs, params=combine(params, adapters)))
    merged = first(model(**inputs, params=merge(params, adapters, plan)))
    scale = np.abs(merged).max()
    np.testing.assert_allclose(ours / scale, merged / scale, atol=1e-5)
    base = first(model(**inputs, params=params))
    assert np.abs(ours - base).max() > 1e-3 * scale


@pytest.mark.parametrize(
    "id",
    ["gpt2", *(pytest.param(id, marks=pytest.mark.slow) for id in ("llama", "bart", "whisper"))],
)
def test_generates_the_tokens_of_the_merged_model(id: str) -> None:
    model, params, inputs, _ = tiny(id)
    plan, adapters = planned(id, "cdvft", everywhere=False)
    adapters = with_something(adapters, 0.2)
    (prompt,) = [inputs[name] for name in ("input_features", "input_ids") if name in inputs][:1]
    options = dict(max_new_tokens=6, do_sample=False, num_beams=1, pad_token_id=0)

    def tokens(generate, params):
        return np.asarray(generate(jnp.asarray(prompt), params=params, **options).sequences)

    ours = tokens(attach(model.generate, plan), combine(params, adapters))
    assert np.array_equal(ours, tokens(model.generate, merge(params, adapters, plan)))
    assert not np.array_equal(ours, tokens(model.generate, params))


def test_no_architecture_is_named_in_the_code() -> None:
    names = "bert|gpt|llama|mistral|gemma|bart|whisper|vit|t5|opt|bloom|falcon|clip"
    words = re.compile(rf"(?<![a-z])(\w*bert|gpt\d?|{names})(?![a-z])", re.IGNORECASE)
    for package in ("linen", "tree"):
        sources = list((Path(circflax.__file__).parent / package).glob("*.py"))
        assert sources
        for source in sources:
            assert not words.findall(source.read_text()), source.name
