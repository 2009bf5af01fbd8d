"""The loss of packed and padded rows is that of the examples one at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import circflax as cf
from tests.architectures import VOCABULARY, architecture
from tests.linen.models import randomly
from train.steps import TrainState, make_forward, make_train_step
from train.tasks.language import objective
from train.tasks.language.rows import Rows, packed_rows, single_rows
from train.tasks.language.tokens import Encoded

transformers = pytest.importorskip("transformers", "4.57")

LENGTHS = (3, 9, 3, 5, 9, 5, 3)
ROOM = 16


def examples() -> Encoded:
    rng = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(LENGTHS)])
    learnt = np.concatenate([np.arange(n) >= max(n // 2, 1) for n in LENGTHS])
    return Encoded(rng.integers(5, VOCABULARY, offsets[-1], np.int32), learnt, offsets)


def summed(function, parts):
    """The sums of what a function, compiled, and its gradient give for several arguments."""
    compiled = jax.jit(jax.value_and_grad(function, has_aux=True))
    results = [compiled(*part) for part in parts]
    return functools.reduce(functools.partial(jax.tree.map, jnp.add), results)


def one_at_a_time(model, params, encoded: Encoded):
    """The sum of the losses with its gradient, how many there are, and how many are right."""

    def loss(params, ids, learnt):
        logits = model(ids[None], params=params).logits[0, :-1].astype(jnp.float32)
        chosen = jax.nn.log_softmax(logits)[jnp.arange(len(ids) - 1), ids[1:]]
        right = jnp.sum((logits.argmax(-1) == ids[1:]) * learnt[1:])
        return -jnp.sum(chosen * learnt[1:]), (jnp.sum(learnt[1:]), right)

    return summed(loss, [(params, *encoded.row(i)) for i in range(len(encoded))])


def single(encoded: Encoded, room: int, seed: int) -> Rows:
    return single_rows(encoded, room)


@functools.cache
def reference(name: str):
    """A tiny model, random parameters for it, and what `one_at_a_time` gives."""
    entry = architecture(name)
    model = getattr(transformers, entry.flax_class)(entry.config(), _do_init=False)
    params = randomly(model.params_shape_tree, scale=0.2)
    return model, params, *one_at_a_time(model, params, examples())


@pytest.mark.parametrize("lay_out", [packed_rows, single])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_loss_and_gradients_are_those_of_single_examples(name, lay_out) -> None:
    model, params, (expected, (count, right)), slope = reference(name)
    forward = make_forward(model, cf.make_plan(params, cf.AdapterConfig(train=".*")))
    batches = lay_out(examples(), ROOM, 0).batches(4)

    def loss(small, batch):
        logits = forward(small, params, batch)
        value, count = objective.losses(logits, batch)
        return value, (count, objective.rows(logits, batch))

    (value, (ours, rows)), gradients = summed(loss, [(params, batch) for batch in batches])
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert ours == count
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(slope))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5 * largest)
    jax.tree.map(close, gradients, slope)

    evaluation = objective.evaluate([rows])
    assert evaluation.loss == pytest.approx(float(expected / count), rel=1e-5)
    figures = {"perplexity": np.exp(evaluation.loss), "token_accuracy": float(right / count)}
    assert evaluation.metrics == pytest.approx(figures)


def test_accumulation_counts_tokens_not_rows() -> None:
    """Parts of a batch with few and with many targets count by these."""
    (batch,) = single_rows(examples(), ROOM).batches(8)
    assert len(set(batch["target_weights"].sum(-1).tolist())) > 3
    small = {"w": jnp.asarray(np.random.default_rng(0).standard_normal(VOCABULARY), jnp.float32)}
    optimizer, results = optax.sgd(0.1), []
    for parts in (1, 2, 8):
        step = make_train_step(
            lambda small, base, batch, rng=None: small["w"] * batch["input_ids"][..., None] / 9,
            objective.losses,
            optimizer,
            parts,
        )
        tree = jax.tree.map(jnp.array, small)
        state = TrainState(tree, optimizer.init(tree), jnp.zeros((), int))
        results.append(step(state, {}, batch, jax.random.key(0)))
    for state, loss in results[1:]:
        np.testing.assert_allclose(loss, results[0][1], rtol=1e-6)
        np.testing.assert_allclose(state.small["w"], results[0][0].small["w"], rtol=1e-5)


def test_a_perplexity_that_is_not_finite_is_refused() -> None:
    for loss in (np.nan, 1e6):
        rows = np.asarray([[loss, 1.0, 0.0]])
        with pytest.raises(ValueError, match=r"perplexity is (nan|inf); a lower learning rate"):
            objective.evaluate([rows])


def test_the_metric_can_be_chosen() -> None:
    assert objective.choose_metric(None, False) == "perplexity"
    assert objective.choose_metric("token_accuracy", False) == "token_accuracy"
    assert objective.choose_metric("exact_match", True) == "exact_match"
    with pytest.raises(ValueError, match="'f1' is not computed here; it can be perplexity, token_"):
        objective.choose_metric("f1", False)
    with pytest.raises(ValueError, match="'exact_match' is not computed here"):
        objective.choose_metric("exact_match", False)
