"""Generation: adapters on are merged weights, a batch is its prompts one by one."""

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import BloomConfig, FlaxLlamaForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import circflax as cf
from train.generation import Sampling, answer, longest_prompt
from train.steps import make_generate

VOCABULARY = 40
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def model() -> FlaxLlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.5,  # wide enough for distinct tokens
    )
    return FlaxLlamaForCausalLM(config, seed=3)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w2")


def _plan(model, method) -> cf.Plan:
    layouts = cf.linen.find_layouts(
        lambda params: model(np.zeros((1, 8), np.int32), params=params), model.params
    )
    return cf.make_plan(model.params, cf.AdapterConfig(method=method, targets=TARGETS), layouts)


def _moved(model, plan):
    """Adapters that change the model's answers."""
    small = cf.init_adapters(jax.random.key(0), plan, model.params)
    leaves, tree = jax.tree.flatten(small)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [a + 0.3 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, moved)


def _prompts(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, VOCABULARY, n).astype(np.int32) for n in rng.integers(1, 12, count)]


@pytest.fixture(scope="module")
def plain(model, tokenizer):
    """Generation of the plain model by temperature, compiled once."""
    return {
        t: make_generate(model, cf.Plan((), ()), Sampling(8, t, 0.9).settings(tokenizer))
        for t in (0.0, 0.8)
    }


@pytest.mark.parametrize(
    ("method", "temperature"),
    [(cf.CDVFT(), 0.0), (cf.CDVFT(), 0.8), (cf.C3A(b=8), 0.0), (cf.BCA(p=8), 0.0)],
    ids=str,
)
def test_adapters_on_are_merged_weights(model, tokenizer, plain, method, temperature):
    plan = _plan(model, method)
    small = _moved(model, plan)
    settings = Sampling(8, temperature, top_p=0.9).settings(tokenizer)
    generate = make_generate(model, plan, settings)
    ids = np.random.default_rng(1).integers(3, VOCABULARY, (4, 6)).astype(np.int32)
    mask, key = np.ones_like(ids), jax.random.key(7)
    merged = cf.merge(model.params, small, plan)
    sequences = np.asarray(generate(small, model.params, ids, mask, key))
    assert sequences.shape == (4, 14)
    np.testing.assert_array_equal(sequences, plain[temperature]({}, merged, ids, mask, key))
    assert (sequences != np.asarray(plain[temperature]({}, model.params, ids, mask, key))).any()


def test_a_batch_is_its_prompts_one_by_one(model, tokenizer, plain):
    compiled = plain[0.0]

    def generate(ids, mask, key):
        return compiled({}, model.params, ids, mask, key)

    prompts = _prompts(4)
    shared = {"longest": 24, "key": jax.random.key(0)}
    together = answer(prompts, generate, tokenizer, batch_size=2, **shared)
    for prompt, given in zip(prompts, together, strict=True):
        (alone,) = answer([prompt], generate, tokenizer, batch_size=1, **shared)
        assert alone == given
        ids = prompt[None]
        expected = np.asarray(compiled({}, model.params, ids, np.ones_like(ids), jax.random.key(0)))
        new = expected[0, len(prompt) :].tolist()
        new = new[: new.index(2)] if 2 in new else new
        assert given.split() == [f"w{i}" for i in new]


def test_an_answer_ends_at_its_end_token(tokenizer):
    def generate(ids, mask, key):
        assert mask.sum(1).tolist() == [1, 5] and (ids[:, -1] == [9, 5]).all()
        # As long as can be, which is no power of two.
        assert ids.shape == (2, 6)
        return np.concatenate([ids, [[2, 8, 8, 8], [7, 2, 8, 8]]], 1)

    prompts = [np.asarray([3, 3, 3, 4, 5]), np.asarray([9])]
    shared = {"batch_size": 2, "longest": 6, "key": jax.random.key(0)}
    assert answer(prompts, generate, tokenizer, **shared) == ["w7", ""]


def test_answers_that_leave_no_room_are_refused(model):
    assert longest_prompt(model.config, Sampling(30)) == 2
    with pytest.raises(ValueError, match="answers of 32 tokens leave no room for a prompt"):
        longest_prompt(model.config, Sampling(32))
    assert longest_prompt(BloomConfig(), Sampling(32)) > 1e9
