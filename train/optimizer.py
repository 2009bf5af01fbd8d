"""AdamW with a learning rate of its own for each leaf."""

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
    warmup = round(config.warmup * steps)
    rest = max(1, steps - warmup)
    match config.schedule:
        case "linear":
            after = optax.linear_schedule(1.0, 0.0, rest)
        case "cosine":
            after = optax.cosine_decay_schedule(1.0, rest)
        case "constant":
            after = optax.constant_schedule(1.0)
    # The first update already moves: its rate is 1/warmup, not 0.
    rising = optax.linear_schedule(1 / max(1, warmup), 1.0, max(1, warmup - 1))
    return optax.join_schedules([rising, after], [warmup])


def make_rates(config: OptimConfig, plan: Plan, fast: frozenset[Path]) -> dict[str, Any]:
    """The peak learning rate of every leaf of the small tree.

    Args:
        config: The two rates.
        plan: The adapters, whose methods scale their rates, and the leaves trained in full.
        fast: Leaves trained in full that learn at the adapters' rate, not at the head's.

    Returns:
        A tree of numbers like the small tree.
    """
    rates = {}
    for path, factor in flatten_dict(plan.learning_rates()).items():
        head = path in plan.trained and path not in fast
        rates[path] = factor * (config.head_learning_rate if head else config.learning_rate)
    return unflatten_dict(rates)


def make_optimizer(
    config: OptimConfig, plan: Plan, steps: int, fast: frozenset[Path] = frozenset()
) -> optax.GradientTransformation:
    """AdamW with clipping, a schedule and a learning rate for each leaf.

    Args:
        config: The settings.
        plan: The adapters and the leaves trained in full.
        steps: Updates of the whole run.
        fast: See `make_rates`.

    Returns:
        The optimizer of the small tree.
    """
    rates = make_rates(config, plan, fast)
    clip = (
        optax.identity()
        if config.clip_norm is None
        else optax.clip_by_global_norm(config.clip_norm)
    )
    return optax.chain(
        clip,
        # Arrays that never train get no moments.
        optax.masked(optax.scale_by_adam(config.b1, config.b2), plan.trainable()),
        optax.add_decayed_weights(config.weight_decay, mask=plan.decayed()),
        optax.stateless(lambda updates, _: jax.tree.map(lambda u, r: u * r, updates, rates)),
        _scale_by_training(plan, steps),
        optax.scale_by_learning_rate(make_schedule(config, steps)),
    )


def _scale_by_training(plan: Plan, steps: int) -> optax.GradientTransformation:
    """Stops the updates of what methods freeze in the course of training."""

    def update(updates: Any, state: optax.ScaleByScheduleState, _: Any = None) -> tuple[Any, Any]:
        factors = plan.training(state.count / steps)
        updates = jax.tree.map(lambda u, f: u * f, updates, factors)
        return updates, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    init = optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))
    return optax.GradientTransformation(lambda _: init, update)
