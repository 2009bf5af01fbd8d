"""The compiled functions of a run: an update, a batch of predictions, and generation."""

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import circflax as cf
from train.placement import Placement

if TYPE_CHECKING:
    from transformers import FlaxPreTrainedModel

Batch = Mapping[str, jax.Array]
Forward = Callable[..., jax.Array]
# From logits and a batch the sum of the losses and their number.
Losses = Callable[[jax.Array, Batch], tuple[jax.Array, jax.Array]]


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


def make_forward(
    model: "FlaxPreTrainedModel",
    plan: cf.Plan,
    inputs: Callable[[Batch], dict[str, jax.Array]] = dict,
    rematerialize: bool = False,
    placement: Placement | None = None,
) -> Forward:
    """The adapted model as a function `(small, base, batch, rng=None) -> logits`, float32.

    Args:
        model: A Flax model of transformers with a head.
        plan: The layers to adapt.
        inputs: What the model may take of a batch, by name; what it does not know is left out,
            save ``segment_ids``, which keeps the examples of a row apart.
        rematerialize: Whether the backward pass computes each block's activations again.
        placement: Where the rows of a batch lie; None leaves that to XLA.

    Returns:
        The function; with an rng, dropout is on.
    """
    rows = placement and placement.rows
    run = cf.linen.keep_apart(cf.linen.attach(model, plan, rows=rows))
    if rematerialize:
        run = cf.linen.rematerialize(run)
    if rows is not None:
        run = cf.linen.shard_rows(run, rows)
    accepted = inspect.signature(type(model).__call__).parameters

    def forward(small: Any, base: Any, batch: Batch, rng: jax.Array | None = None) -> jax.Array:
        given = inputs(batch)
        known = {name: array for name, array in given.items() if name in accepted}
        dropout = {} if rng is None else {"train": True, "dropout_rng": rng}
        params, segment_ids = cf.combine(base, small), given.get("segment_ids")
        outputs = run(**known, params=params, segment_ids=segment_ids, **dropout)
        return outputs.logits.astype(jnp.float32)

    return forward


def make_generate(
    model: "FlaxPreTrainedModel",
    plan: cf.Plan,
    settings: Mapping[str, Any],
    placement: Placement | None = None,
) -> Callable[[Any, Any, jax.Array, jax.Array, jax.Array], jax.Array]:
    """Generation with adapters as a compiled function `(small, base, ids, mask, key) -> ids`.

    Args:
        model: A Flax causal language model of transformers.
        plan: The layers to adapt.
        settings: What `generate` of transformers takes besides.
        placement: Where the rows of prompts lie; the result is on every device. None leaves both to
            XLA.

    Returns:
        The function: of prompts (batch, length), padded on the left, and their attention mask it
        gives prompts and answers, (batch, length + new).
    """
    adapted = cf.linen.attach(model.generate, plan, rows=placement and placement.rows)

    def generate(
        small: Any, base: Any, ids: jax.Array, mask: jax.Array, key: jax.Array
    ) -> jax.Array:
        params = cf.combine(base, small)
        return adapted(ids, attention_mask=mask, params=params, prng_key=key, **settings).sequences

    return jax.jit(generate, out_shardings=placement and placement.replicated)


def make_train_step(
    forward: Forward,
    losses: Losses,
    optimizer: optax.GradientTransformation,
    accumulation_steps: int,
    placement: Placement | None = None,
) -> Callable[[TrainState, Any, Batch, jax.Array], tuple[TrainState, jax.Array]]:
    """The update as a compiled function `(state, base, batch, rng) -> (state, loss)`.

    The state is donated. A batch is computed in `accumulation_steps` parts, one after the other,
    with the same result as at once, up to rounding and dropout.

    Args:
        forward: See `make_forward`.
        losses: The sum of a batch's losses, and how many there are.
        optimizer: The optimizer of the small tree.
        accumulation_steps: A divisor of the batch's size.
        placement: Where its arguments and results lie; None leaves that to them.

    Returns:
        The function; the loss is the mean over the whole batch.
    """

    def summed(small: Any, base: Any, batch: Batch, rng: jax.Array) -> tuple[jax.Array, jax.Array]:
        return losses(forward(small, base, batch, rng), batch)

    def train_step(
        state: TrainState, base: Any, batch: Batch, rng: jax.Array
    ) -> tuple[TrainState, jax.Array]:
        # Every part has rows of every device.
        parts = jax.tree.map(
            lambda a: a.reshape(-1, accumulation_steps, *a.shape[1:]).swapaxes(0, 1), batch
        )
        keys = jax.random.split(jax.random.fold_in(rng, state.step), accumulation_steps)

        def part(total: Any, xs: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            own = jax.value_and_grad(summed, has_aux=True)(state.small, base, *xs)
            return jax.tree.map(jnp.add, total, own), None

        zero = ((jnp.zeros(()), jnp.zeros(())), jax.tree.map(jnp.zeros_like, state.small))
        ((loss, count), gradients), _ = jax.lax.scan(part, zero, (parts, keys))
        loss, gradients = jax.tree.map(lambda a: a / count, (loss, gradients))
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.small)
        small = optax.apply_updates(state.small, updates)
        return TrainState(small, optimizer_state, state.step + 1), loss

    if placement is None:
        return jax.jit(train_step, donate_argnums=0)
    moments = jax.eval_shape(optimizer.init, placement.shapes)
    whole = placement.replicated
    state = TrainState(placement.small, placement.like_small(moments), whole)
    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(state, placement.base, placement.batch, whole),
        out_shardings=(state, whole),
    )
