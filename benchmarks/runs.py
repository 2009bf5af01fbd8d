"""The application's training step for a run's settings, from shapes alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

import circflax as cf
from benchmarks.results import Record
from benchmarks.steps import first_state
from train.config import Config
from train.optimizer import make_optimizer
from train.parts import learning_rate, make_plan
from train.steps import TrainState, make_forward, make_train_step
from train.tasks import classification
from train.tasks.language import objective


@dataclass(frozen=True)
class Step:
    """A training step and shapes of what it runs on.

    Attributes:
        run: the jitted step, `(state, base, batch, rng) -> (state, loss)`.
        arguments: shapes of the step's arguments.
        adapters: how many parameters the adapters have.
    """

    run: Callable[..., Any]
    arguments: tuple[TrainState, Any, dict[str, Any], Any]
    adapters: int


def make_step(config: Config, outline: cf.interop.Outline, length: int | None) -> Step:
    """The step of a run on a model without weights.

    Args:
        config: the settings.
        outline: the model.
        length: tokens of a row; None for images, which have the model's own size.

    Returns:
        The step; there is no dropout.
    """
    model, optim = outline.model, config.optim
    base = outline.params
    plan = make_plan(config, model, base, outline.new_leaves)
    optimizer = make_optimizer(optim, learning_rate(config), plan, steps=100)
    state = first_state(plan, optimizer, base)
    forward = make_forward(model, plan, rematerialize=config.model.gradient_checkpointing)
    losses = objective.losses if config.language.given else classification.losses
    run = make_train_step(forward, losses, optimizer, optim.accumulation_steps)
    batch = _batch(config, outline, length)
    counted = cf.summarize(base, plan)
    key = jax.eval_shape(jax.random.key, 0)
    return Step(run, (state, base, batch, key), counted.adapter_parameters)


def _batch(config: Config, outline: cf.interop.Outline, length: int | None) -> Record:
    """Shapes of a batch, as the application's tasks make them."""
    size = config.optim.batch_size
    batch = outline.inputs(size, length)
    if not config.language.given:
        labels = jax.ShapeDtypeStruct((size,), jnp.int32)
        return {**batch, "labels": labels, "weights": jax.ShapeDtypeStruct((size,), jnp.float32)}
    ids = batch["input_ids"]
    rows = {name: ids for name in ("position_ids", "segment_ids", "targets")}
    return {**batch, **rows, "target_weights": jax.ShapeDtypeStruct(ids.shape, jnp.float32)}
