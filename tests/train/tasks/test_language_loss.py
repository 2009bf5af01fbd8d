"""The loss of packed and padded rows is that of the examples one at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import circflax as cf
from tests.architectures import VOCABULARY, architecture
from tests.linen.models import randomly
from train.steps import make_forward, make_train_step
from train.tasks.batches import Batches
from train.tasks.language import objective
from train.tasks.language.rows import packed_rows, single_rows
from train.tasks.language.tokens import Encoded
from train.tasks.task import Runner

transformers = pytest.importorskip("transformers", "4.57")

LENGTHS = (3, 9, 5, 2, 7, 12, 4)
ROOM = 16


def examples() -> Encoded:
    rng = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(LENGTHS)])
    learnt = np.concatenate([np.arange(n) >= max(n // 2, 1) for n in LENGTHS])
    return Encoded(rng.integers(5, VOCABULARY, offsets[-1], np.int32), learnt, offsets)


def one_at_a_time(model, params, encoded: Encoded) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The sum of the losses, how many there are, and how many likeliest tokens are right."""
    loss = count = right = 0
    for i in range(len(encoded)):
        ids, learnt = encoded.row(i)
        logits = model(ids[None], params=params).logits[0, :-1].astype(jnp.float32)
        chosen = jax.nn.log_softmax(logits)[np.arange(len(ids) - 1), ids[1:]]
        loss -= jnp.sum(chosen[learnt[1:]])
        count += learnt[1:].sum()
        right += jnp.sum((logits.argmax(-1) == ids[1:])[learnt[1:]])
    return loss, count, right


packed = pytest.param(
    packed_rows,
    marks=pytest.mark.skipif(
        not hasattr(cf.linen, "keep_apart"), reason="examples cannot be kept apart yet"
    ),
    id="packed",
)
padded = pytest.param(lambda encoded, room, seed: single_rows(encoded, room), id="padded")


@pytest.mark.parametrize("lay_out", [packed, padded])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_loss_and_gradients_are_those_of_single_examples(name, lay_out) -> None:
    entry, encoded = architecture(name), examples()
    model = getattr(transformers, entry.flax_class)(entry.config(), _do_init=False)
    params = randomly(model.params_shape_tree, scale=0.2)
    expected, slope = jax.value_and_grad(
        lambda params: (lambda loss, count, _: loss / count)(*one_at_a_time(model, params, encoded))
    )(params)

    plan = cf.make_plan(params, cf.AdapterConfig(train=".*"))
    forward = make_forward(model, plan)
    batches = lay_out(encoded, ROOM, 0).batches(4)
    assert len(batches) > 1 or lay_out is packed_rows

    def mean(small):
        sums = [objective.losses(forward(small, params, batch), batch) for batch in batches]
        loss, count = np.sum(np.asarray(sums, object), 0)
        return loss / count

    value, gradients = jax.value_and_grad(mean)(params)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(slope))
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(
            ours, theirs, rtol=1e-5, atol=1e-5 * largest
        ),
        gradients,
        slope,
    )

    def predict(batch):
        return objective.rows(forward(params, params, batch), batch)

    evaluation = objective.evaluate(batches, Runner(predict))
    loss, count, right = one_at_a_time(model, params, encoded)
    assert evaluation.loss == pytest.approx(float(loss / count), rel=1e-5)
    assert evaluation.metrics == pytest.approx(
        {"perplexity": float(jnp.exp(loss / count)), "token_accuracy": float(right / count)},
        rel=1e-4,
    )


def test_accumulation_counts_tokens_not_rows() -> None:
    """Parts of a batch with few and with many targets count by these."""
    import optax

    (batch,) = single_rows(examples(), ROOM).batches(8)
    assert len(set(batch["target_weights"].sum(-1).tolist())) > 3
    small = {"w": jnp.asarray(np.random.default_rng(0).standard_normal(VOCABULARY), jnp.float32)}
    results = []
    for parts in (1, 2, 8):
        step = make_train_step(
            lambda small, base, batch, rng=None: small["w"] * batch["input_ids"][..., None] / 9,
            objective.losses,
            optimizer := optax.sgd(0.1),
            parts,
        )
        state = _state(small, optimizer)
        results.append(step(state, {}, batch, jax.random.key(0)))
    for state, loss in results[1:]:
        np.testing.assert_allclose(loss, results[0][1], rtol=1e-6)
        np.testing.assert_allclose(state.small["w"], results[0][0].small["w"], rtol=1e-5)


def _state(small, optimizer):
    from train.steps import TrainState

    tree = jax.tree.map(jnp.array, small)
    return TrainState(tree, optimizer.init(tree), jnp.zeros((), int))


def test_a_perplexity_that_is_not_finite_is_refused() -> None:
    batches = Batches(lambda planned: {}, (None,))
    for loss in (np.nan, 1e6):
        rows = np.asarray([[loss, 1.0, 0.0]])
        with pytest.raises(ValueError, match=r"perplexity is (nan|inf); a lower learning rate"):
            objective.evaluate(batches, Runner(lambda batch, rows=rows: rows))


def test_the_metric_can_be_chosen() -> None:
    assert objective.choose_metric(None, False) == "perplexity"
    assert objective.choose_metric("token_accuracy", False) == "token_accuracy"
    assert objective.choose_metric("exact_match", True) == "exact_match"
    with pytest.raises(ValueError, match="'f1' is not computed here; it can be perplexity, token_"):
        objective.choose_metric("f1", False)
    with pytest.raises(ValueError, match="'exact_match' is not computed here"):
        objective.choose_metric("exact_match", False)
