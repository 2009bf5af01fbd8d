"""The loss of the next token, and what evaluation makes of it."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from train.metrics import PERPLEXITY
from train.tasks.task import Evaluation

METRICS = (PERPLEXITY, "token_accuracy")
EXACT_MATCH = "exact_match"


def choose_metric(metric: str | None, answers: bool) -> str:
    """Finds the metric that chooses the best epoch.

    Args:
        metric: The one asked for, if any.
        answers: Whether answers are generated that can be right or wrong.

    Returns:
        The name of one that is computed.

    Raises:
        ValueError: If the one asked for is not among those.
    """
    if metric is None:
        return PERPLEXITY
    names = (*METRICS, EXACT_MATCH) if answers else METRICS
    if metric not in names:
        raise ValueError(
            f"`run.metric` {metric!r} is not computed here; it can be {', '.join(names)}"
        )
    return metric


def losses(logits: jax.Array, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The loss of a batch.

    Args:
        logits: (batch, length, vocabulary), float32.
        batch: ``targets`` and ``target_weights``, see `train.tasks.language.rows.collate`.

    Returns:
        The sum of the cross-entropies of the tokens to learn, and how many these are.
    """
    return jnp.sum(_each_loss(logits, batch)), jnp.sum(batch["target_weights"])


def rows(logits: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """What evaluation needs of each row.

    Args:
        logits: (batch, length, vocabulary), float32.
        batch: As for `losses`.

    Returns:
        (batch, 3), float32: the sum of the losses, the number of tokens that count, and of how
        many of these the likeliest token is the right one.
    """
    counts = batch["target_weights"]
    right = counts * (jnp.argmax(logits, -1) == batch["targets"])
    return jnp.stack([jnp.sum(a, -1) for a in (_each_loss(logits, batch), counts, right)], -1)


def evaluate(measured: Sequence[np.ndarray]) -> Evaluation:
    """Sums up what was measured of a split.

    Args:
        measured: The `rows` of each of its batches, (batch, 3).

    Returns:
        The perplexity and the part of tokens that were predicted right, over all tokens that
        count, and the mean loss.

    Raises:
        ValueError: If the perplexity is not finite.
    """
    loss, count, right = np.concatenate(measured).sum(0, dtype=np.float64)
    mean = loss / count
    with np.errstate(over="ignore"):
        perplexity = np.exp(mean)
    if not np.isfinite(perplexity):
        raise ValueError(f"the model's perplexity is {perplexity}; a lower learning rate may help")
    metrics = {PERPLEXITY: float(perplexity), "token_accuracy": float(right / count)}
    return Evaluation(metrics, float(mean))


def _each_loss(logits: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    return batch["target_weights"] * each
