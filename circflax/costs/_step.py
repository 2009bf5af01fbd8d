"""A training step from shapes, to be compiled and never run."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from circflax.linen import attach
from circflax.tree import Plan, Tree, combine, init_adapters

Run = Callable[[Tree, Any], Any]
"""Calls a linen model: parameters and inputs to outputs."""

Loss = Callable[[Any], jax.Array]
"""The number to be made small, from the model's outputs."""


class Step(NamedTuple):
    """A training step and the shapes of what it runs on.

    Attributes:
        run: the jitted step, `(small, state, base, inputs) -> (small, state, loss)`; the small
            tree and the optimizer's state are donated.
        arguments: shapes of its arguments.
    """

    run: Callable[..., Any]
    arguments: tuple[Any, Any, Any, Any]


def mean_square(outputs: Any) -> jax.Array:
    """A loss of any outputs: the mean of their squares, each array's in float32."""
    leaves = [leaf for leaf in jax.tree.leaves(outputs) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return sum(jnp.mean(jnp.square(leaf.astype(jnp.float32))) for leaf in leaves)


def make_step(run: Run, params: Tree, inputs: Any, plan: Plan, loss: Loss = mean_square) -> Step:
    """One update by AdamW of what a plan trains, with no dropout and no schedule.

    Args:
        run: calls the model: `lambda params, x: model.apply({"params": params}, x)`.
        params: shapes of the model's parameters.
        inputs: shapes of a batch.
        plan: what to adapt and to train.
        loss: of the model's outputs.

    Returns:
        The step.
    """
    adapted = attach(run, plan)
    # Arrays that never train have no state.
    optimizer = optax.masked(optax.adamw(1e-3), plan.trainable())

    def step(small: Any, state: Any, base: Any, inputs: Any) -> tuple[Any, Any, jax.Array]:
        value, gradients = jax.value_and_grad(
            lambda small: loss(adapted(combine(base, small), inputs))
        )(small)
        updates, state = optimizer.update(gradients, state, small)
        return optax.apply_updates(small, updates), state, value

    small = init_adapters(jax.random.key(0), plan, params)
    state = jax.eval_shape(optimizer.init, small)
    return Step(jax.jit(step, donate_argnums=(0, 1)), (small, state, params, inputs))
