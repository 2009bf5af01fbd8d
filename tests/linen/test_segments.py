"""Examples packed into one row of a causal language model are computed as if each were alone."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from circflax import BCA, AdapterConfig, combine, init_adapters, make_plan
from circflax.linen import attach, find_layouts, keep_apart, rematerialize
from tests.architectures import architecture
from tests.linen.models import randomly, with_something

transformers = pytest.importorskip("transformers", "4.57")

VOCABULARY = 67
# Examples of two lengths, padding (0), and a number that comes again in another row.
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 3, 3, 3], [5, 5, 5, 5, 1, 1, 1, 0, 0, 0]], np.int32)
TOKENS = np.random.default_rng(0).integers(5, VOCABULARY, SEGMENTS.shape, dtype=np.int32)


def _places() -> list[tuple[np.ndarray, np.ndarray]]:
    """Where the examples of each length stand: rows and columns, an example a line."""
    examples: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    for row, ids in enumerate(SEGMENTS):
        for k in np.unique(ids[ids > 0]):
            columns = np.flatnonzero(ids == k)
            examples.setdefault(len(columns), []).append((np.full_like(columns, row), columns))
    return [tuple(map(np.stack, zip(*same, strict=True))) for same in examples.values()]


PLACES = _places()
MASK = (SEGMENTS > 0).astype(np.int32)


@dataclass(frozen=True)
class Decoder:
    """A tiny causal language model that is in no other table."""

    id: str
    flax_class: str
    config_class: str
    fields: dict[str, Any]

    def config(self) -> Any:
        return getattr(transformers, self.config_class)(vocab_size=VOCABULARY, **self.fields)


_BART = dict(
    d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48, encoder_layers=1
)
_OPT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48)
_GPT_NEO = dict(
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    attention_types=[[["global", "local"], 1]],
    window_size=3,
    max_position_embeddings=32,
)
DECODERS = (
    *(architecture(id) for id in ("gpt2", "llama", "mistral")),
    Decoder("gpt_neo", "FlaxGPTNeoForCausalLM", "GPTNeoConfig", _GPT_NEO),
    Decoder("opt", "FlaxOPTForCausalLM", "OPTConfig", {**_OPT, "max_position_embeddings": 32}),
    Decoder("bart", "FlaxBartForCausalLM", "BartConfig", {**_BART, "max_position_embeddings": 32}),
)
_ALIKE = ("mistral",)


@functools.cache
def tiny(id: str):
    """A tiny model and random parameters for it."""
    (entry,) = [entry for entry in DECODERS if entry.id == id]
    model = getattr(transformers, entry.flax_class)(entry.config(), _do_init=False)
    return model, randomly(model.params_shape_tree, 0.2)


def positions(restart: bool = True) -> np.ndarray:
    """Positions within each example, or within the row."""
    place = np.tile(np.arange(SEGMENTS.shape[1]), (len(SEGMENTS), 1))
    first = [[list(row).index(k) for k in row] for row in SEGMENTS]
    return place - np.array(first) if restart else place


# Quick runs meet each way of attending once.
over_decoders = pytest.mark.parametrize(
    "entry",
    [
        pytest.param(entry, marks=pytest.mark.slow if entry.id in _ALIKE else ())
        for entry in DECODERS
    ],
    ids=lambda entry: entry.id,
)


def logits(run, params, where: np.ndarray | None = None, **options) -> jax.Array:
    """The logits of the packed rows."""
    options = options if where is None else {**options, "position_ids": where}
    return run(TOKENS, attention_mask=MASK, params=params, **options)[0]


def each(run, params, where: np.ndarray) -> list[jax.Array]:
    """The logits of the examples of each length when each has a row of its own."""
    found = []
    for place in PLACES:
        tokens = TOKENS[place]
        options = dict(attention_mask=np.ones_like(tokens), position_ids=where[place])
        found.append(run(tokens, params=params, **options)[0])
    return found


def assert_apart(packed: jax.Array, run, params, where: np.ndarray) -> None:
    apart = jax.jit(lambda p: each(run, p, where))(params)
    for place, alone in zip(PLACES, apart, strict=True):
        np.testing.assert_allclose(packed[place], alone, atol=1e-5 * max(1.0, abs(alone).max()))


@over_decoders
def test_packed_examples_are_as_if_alone(entry) -> None:
    model, params = tiny(entry.id)

    @jax.jit
    def both(params, segment_ids):
        packed = logits(keep_apart(model), params, positions(), segment_ids=segment_ids)
        return packed, logits(model, params, positions())

    packed, mixed = both(params, SEGMENTS)
    assert_apart(packed, model, params, positions())
    later = SEGMENTS == 2
    assert np.abs(packed - mixed)[later].max() > 1e-2
    # The first example of a row has nothing before it that could have been mixed in.
    np.testing.assert_allclose(packed[0, :3], mixed[0, :3], atol=1e-5)


@pytest.mark.parametrize("id", ["gpt2", "llama"])
def test_positions_of_the_row_where_none_are_given(id: str) -> None:
    model, params = tiny(id)
    packed = jax.jit(lambda p: logits(keep_apart(model), p, segment_ids=SEGMENTS))(params)
    assert_apart(packed, model, params, positions(restart=False))


@pytest.mark.parametrize("entry", DECODERS[:2], ids=str)
def test_without_segments_no_bit_changes(entry) -> None:
    model, params = tiny(entry.id)
    apart = keep_apart(model)
    np.testing.assert_array_equal(logits(apart, params), logits(model, params))
    # And nothing is left behind by a run with them.
    logits(apart, params, segment_ids=SEGMENTS)
    np.testing.assert_array_equal(logits(apart, params, segment_ids=None), logits(model, params))


def test_one_example_a_row_changes_no_bit() -> None:
    model, params = tiny("llama")
    ones = np.ones_like(SEGMENTS)
    packed = logits(keep_apart(model), params, segment_ids=ones)
    np.testing.assert_array_equal(packed, logits(model, params))


@functools.cache
def planned():
    model, params = tiny("llama")
    layouts = find_layouts(lambda p: logits(model, p), params)
    plan = make_plan(params, AdapterConfig(method=BCA(p=8), targets=("q_proj", "v_proj")), layouts)
    return plan, with_something(init_adapters(jax.random.key(0), plan, params))


WRAPS = {
    "attach(keep_apart)": lambda run, plan: attach(keep_apart(run), plan),
    "keep_apart(attach)": lambda run, plan: keep_apart(attach(run, plan)),
    "rematerialize(keep_apart(attach))": lambda run, plan: rematerialize(
        keep_apart(attach(run, plan))
    ),
    "keep_apart(rematerialize(attach))": lambda run, plan: keep_apart(
        rematerialize(attach(run, plan))
    ),
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_gradients_of_adapters_are_those_of_the_examples_alone(wrap) -> None:
    model, params = tiny("llama")
    plan, adapters = planned()
    packed, alone = wrap(model, plan), attach(model, plan)

    @jax.jit
    @jax.value_and_grad
    def ours(adapters, segment_ids):
        y = logits(packed, combine(params, adapters), positions(), segment_ids=segment_ids)
        return jnp.sum(jnp.sin(y) * MASK[..., None])

    @jax.jit
    @jax.value_and_grad
    def theirs(adapters):
        examples = each(alone, combine(params, adapters), positions())
        return sum(jnp.sum(jnp.sin(y)) for y in examples)

    value, gradient = ours(adapters, SEGMENTS)
    expected_value, expected = theirs(adapters)
    np.testing.assert_allclose(value, expected_value, rtol=1e-4, atol=1e-3)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max()),
        gradient,
        expected,
    )
    # The segments are an argument of the compiled program, no part of it.
    assert ours._cache_size() == 1 and ours(adapters, np.ones_like(SEGMENTS))[0] != value
    assert ours._cache_size() == 1


def test_attention_to_an_encoder_is_left_alone() -> None:
    config = architecture("gpt2").config()
    config.update({"add_cross_attention": True})
    model = transformers.FlaxGPT2LMHeadModel(config, _do_init=False)
    params = randomly(model.params_shape_tree, 0.2)
    # The same source for all, since `each` takes examples of several rows together.
    source = np.random.default_rng(3).standard_normal((1, 5, 32)).astype(np.float32)

    def run(tokens, **options):
        repeated = jnp.tile(source, (len(tokens), 1, 1))
        return model(tokens, encoder_hidden_states=repeated, **options)

    packed = logits(keep_apart(run), params, positions(), segment_ids=SEGMENTS)
    assert_apart(packed, run, params, positions())


class Plain(nn.Module):
    """Causal attention without weights, positions or anything else."""

    def setup(self):
        self.causal_mask = nn.make_causal_mask(jnp.ones((1, 16)))

    def __call__(self, x):
        length = x.shape[1]
        return nn.dot_product_attention(x, x, x, mask=self.causal_mask[..., :length, :length])


def test_any_linen_module_that_holds_its_mask() -> None:
    x = np.random.default_rng(0).standard_normal((*SEGMENTS.shape, 2, 4)).astype(np.float32)
    packed = keep_apart(Plain().apply)({}, x, segment_ids=SEGMENTS)
    for place in PLACES:
        np.testing.assert_allclose(packed[place], Plain().apply({}, x[place]), atol=1e-6)


@pytest.mark.parametrize(
    ("flax_class", "config"),
    [
        ("FlaxBertForSequenceClassification", architecture("bert").config),
        # Causal, but one mask is made for all layers from the padding of each call.
        (
            "FlaxBloomForCausalLM",
            lambda: transformers.BloomConfig(VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
        ),
    ],
)
def test_models_that_cannot_keep_examples_apart_are_refused(flax_class: str, config) -> None:
    model = getattr(transformers, flax_class)(config(), _do_init=False)
    params = randomly(model.params_shape_tree)
    with pytest.raises(ValueError, match="no attention that holds a causal mask"):
        keep_apart(model)(TOKENS, params=params, segment_ids=SEGMENTS)


def test_a_function_compiled_before_is_refused() -> None:
    compiled = jax.jit(Plain().apply)
    x = np.ones((*SEGMENTS.shape, 2, 4), np.float32)
    compiled({}, x)
    with pytest.raises(ValueError, match=r"not one that `jax\.jit` has compiled before"):
        keep_apart(compiled)({}, x, segment_ids=SEGMENTS)


@pytest.mark.parametrize(
    ("segment_ids", "message"),
    [
        (SEGMENTS[0], r"integers of shape \(batch, length\), not int32 of shape \(10,\)"),
        (SEGMENTS.astype(np.float32), r"not float32 of shape \(2, 10\)"),
        (SEGMENTS[:1], r"shape \(1, 10\), but `\S+/attn` attends within \(2, 10\)"),
        (SEGMENTS[:, :9], r"shape \(2, 9\), but `\S+/attn` attends within \(2, 10\)"),
    ],
)
def test_segments_of_another_shape_are_refused(segment_ids, message: str) -> None:
    model, params = tiny("gpt2")
    with pytest.raises(ValueError, match=message):
        logits(keep_apart(model), params, segment_ids=segment_ids)


def test_a_cache_is_refused() -> None:
    model, params = tiny("gpt2")
    cache = model.init_cache(*SEGMENTS.shape)
    options = dict(past_key_values=cache, position_ids=positions(), segment_ids=SEGMENTS)
    with pytest.raises(ValueError, match=r"`\S+/attn` attends with a cache"):
        keep_apart(model)(TOKENS, params=params, **options)
