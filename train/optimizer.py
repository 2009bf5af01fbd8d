"""AdamW with a learning rate of its own for each leaf."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from circflax import Plan
from circflax.tree import Path
from train.config import OptimConfig


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """The learning rate as a fraction of its peak, by step.

    Args:
        config: Shape and warm-up.
        steps: Updates of the whole run.

    Returns:
        A function of the step, between 0 and 1.
    """
    return _schedule(config.schedule, **_lengths(config, steps))


def _lengths(config: OptimConfig, steps: int) -> dict[str, float]:
    warmup = round(config.warmup * steps)
    return {"warmup": float(warmup), "rest": float(max(1, steps - warmup))}


def _schedule(
    shape: str, warmup: float | jax.Array, rest: float | jax.Array
) -> Callable[[jax.Array], jax.Array]:
    """The schedule from lengths that may be traced, which those of optax may not."""

    def fraction(step: jax.Array) -> jax.Array:
        done = jnp.clip((step - warmup) / rest, 0.0, 1.0)
        match shape:
            case "linear":
                after = 1.0 - done
            case "cosine":
                after = 0.5 * (1.0 + jnp.cos(jnp.pi * done))
            case "constant":
                after = 1.0
        # The first update already moves: its rate is 1/warmup, not 0.
        return jnp.where(step < warmup, (step + 1) / jnp.maximum(1.0, warmup), after)

    return fraction


def make_rates(
    learning_rate: float | jax.Array,
    head_learning_rate: float | jax.Array,
    plan: Plan,
    fast: frozenset[Path],
) -> dict[str, Any]:
    """The peak learning rate of every leaf of the small tree.

    Args:
        learning_rate: The adapters'.
        head_learning_rate: That of leaves trained in full.
        plan: The adapters, whose methods scale their rates, and the leaves trained in full.
        fast: Leaves trained in full that learn at the adapters' rate, not at the head's.

    Returns:
        A tree of numbers like the small tree.
    """
    rates = {}
    for path, factor in flatten_dict(plan.learning_rates()).items():
        head = path in plan.trained and path not in fast
        rates[path] = factor * (head_learning_rate if head else learning_rate)
    return unflatten_dict(rates)


def make_optimizer(
    config: OptimConfig,
    learning_rate: float,
    plan: Plan,
    steps: int,
    fast: frozenset[Path] = frozenset(),
) -> optax.GradientTransformation:
    """AdamW with clipping, a schedule and a learning rate for each leaf.

    Args:
        config: The settings.
        learning_rate: The adapters' peak; the head's is among the settings.
        plan: The adapters and the leaves trained in full.
        steps: Updates of the whole run.
        fast: See `make_rates`.

    Returns:
        The optimizer of the small tree.
    """
    clip = optax.identity() if config.clip_norm is None else _clip(config.clip_norm, plan)

    def adamw(
        learning_rate: jax.Array, head_learning_rate: jax.Array, warmup: jax.Array, rest: jax.Array
    ) -> optax.GradientTransformation:
        rates = make_rates(learning_rate, head_learning_rate, plan, fast)
        return optax.chain(
            clip,
            # Arrays that never train get no moments.
            optax.masked(optax.scale_by_adam(config.b1, config.b2), plan.trainable()),
            optax.add_decayed_weights(config.weight_decay, mask=plan.decayed()),
            optax.stateless(lambda updates, _: jax.tree.map(lambda u, r: u * r, updates, rates)),
            _scale_by_training(plan, warmup + rest),
            optax.scale_by_learning_rate(_schedule(config.schedule, warmup, rest)),
        )

    # Peaks and lengths are in the state, so that runs that differ in them share one program.
    return optax.inject_hyperparams(adamw)(
        learning_rate=learning_rate,
        head_learning_rate=config.head_learning_rate,
        **_lengths(config, steps),
    )


def _clip(limit: float, plan: Plan) -> optax.GradientTransformation:
    """Clips by the global norm in the coordinates in which all learning rates would be equal.

    An array with the factor f on its rate counts with the root of f. A circulant's gradient, which
    sums p entries of the kernel's, then counts as much as the kernel's own would; as it is, it
    would have all gradients clipped all the time.
    """
    roots = jax.tree.map(math.sqrt, plan.learning_rates())

    def update(gradients: Any, _: Any) -> Any:
        norm = optax.tree.norm(jax.tree.map(lambda g, root: g * root, gradients, roots))
        scale = jnp.minimum(1.0, limit / norm)
        return jax.tree.map(lambda g: g * scale, gradients)

    return optax.stateless(update)


def _scale_by_training(plan: Plan, steps: jax.Array) -> optax.GradientTransformation:
    """Stops the updates of what methods freeze in the course of training."""

    def update(updates: Any, state: optax.ScaleByScheduleState, _: Any = None) -> tuple[Any, Any]:
        factors = plan.training(state.count / steps)
        updates = jax.tree.map(lambda u, f: u * f, updates, factors)
        return updates, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    init = optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))
    return optax.GradientTransformation(lambda _: init, update)
