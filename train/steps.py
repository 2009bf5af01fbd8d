"""The two compiled functions of a run: one update, and one batch of predictions."""

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import circflax as cf

if TYPE_CHECKING:
    from transformers import FlaxPreTrainedModel

Batch = Mapping[str, jax.Array]
Forward = Callable[..., jax.Array]


class TrainState(NamedTuple):
    """What an update changes.

    Attributes:
        small: Adapters and leaves trained in full, float32.
        optimizer: The optimizer's state.
        step: Updates made so far.
    """

    small: Any
    optimizer: optax.OptState
    step: jax.Array


def make_forward(model: "FlaxPreTrainedModel", plan: cf.Plan) -> Forward:
    """The adapted model as a function `(small, base, batch, rng=None) -> logits`, float32.

    Args:
        model: A Flax model of transformers with a classification head.
        plan: The layers to adapt.

    Returns:
        The function; with an rng, dropout is on.
    """
    adapted = cf.linen.attach(model, plan)
    accepted = inspect.signature(type(model).__call__).parameters

    def forward(small: Any, base: Any, batch: Batch, rng: jax.Array | None = None) -> jax.Array:
        inputs = {name: array for name, array in batch.items() if name in accepted}
        dropout = {} if rng is None else {"train": True, "dropout_rng": rng}
        outputs = adapted(**inputs, params=cf.combine(base, small), **dropout)
        return outputs.logits.astype(jnp.float32)

    return forward


def losses(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Each example's loss: cross-entropy, or the squared error where labels are numbers.

    Args:
        logits: (batch, classes), or (batch, 1) for regression.
        labels: (batch,), integers or floating-point numbers.

    Returns:
        (batch,).
    """
    if jnp.issubdtype(labels.dtype, jnp.floating):
        return optax.squared_error(logits[:, 0], labels)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def make_train_step(
    forward: Forward, optimizer: optax.GradientTransformation, accumulation_steps: int
) -> Callable[[TrainState, Any, Batch, jax.Array], tuple[TrainState, jax.Array]]:
    """The update as a compiled function `(state, base, batch, rng) -> (state, loss)`.

    The state is donated. A batch is computed in `accumulation_steps` parts, one after the other,
    with the same result as at once, up to rounding and dropout.

    Args:
        forward: See `make_forward`.
        optimizer: The optimizer of the small tree.
        accumulation_steps: A divisor of the batch's size.

    Returns:
        The function; the loss is the mean over the batch's examples.
    """

    def summed(small: Any, base: Any, batch: Batch, rng: jax.Array) -> jax.Array:
        logits = forward(small, base, batch, rng)
        return jnp.sum(batch["weights"] * losses(logits, batch["labels"]))

    def train_step(
        state: TrainState, base: Any, batch: Batch, rng: jax.Array
    ) -> tuple[TrainState, jax.Array]:
        parts = jax.tree.map(lambda a: a.reshape(accumulation_steps, -1, *a.shape[1:]), batch)
        keys = jax.random.split(jax.random.fold_in(rng, state.step), accumulation_steps)

        def part(total: Any, xs: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            return jax.tree.map(
                jnp.add, total, jax.value_and_grad(summed)(state.small, base, *xs)
            ), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.small))
        total, _ = jax.lax.scan(part, zero, (parts, keys))
        loss, gradients = jax.tree.map(lambda a: a / jnp.sum(batch["weights"]), total)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.small)
        small = optax.apply_updates(state.small, updates)
        return TrainState(small, optimizer_state, state.step + 1), loss

    return jax.jit(train_step, donate_argnums=0)
