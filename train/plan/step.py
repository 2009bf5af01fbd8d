"""A run's training step from shapes alone: no weights, no examples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

import circflax as cf
from train import docstrings, glue
from train.config import DIGITS, Config, DataConfig, ImagesConfig
from train.optimizer import make_optimizer
from train.parts import find_task, learning_rate, make_plan
from train.placement import Placement, make_mesh, make_placement
from train.steps import TrainState, make_forward, make_train_step
from train.tasks import classification
from train.tasks.language import objective

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Step:
    """A training step and shapes of what it runs on.

    Attributes:
        run: The jitted step, `(state, base, batch, rng) -> (state, loss)`.
        arguments: Shapes of the step's arguments.
        adapters: How many parameters the adapters have.
        placement: Where the arguments lie; None without a mesh.
    """

    run: Callable[..., Any]
    arguments: tuple[TrainState, Any, dict[str, Any], Any]
    adapters: int
    placement: Placement | None


def make_outline(config: Config, source: "str | PretrainedConfig") -> cf.interop.Outline:
    """A run's model without weights, with the head of its task, in the types of its settings.

    Args:
        config: The settings.
        source: The model's configuration, or where it is; see `circflax.interop.outline_model`.

    Returns:
        The model and the shapes of its parameters.

    Raises:
        CheckpointError: If there is no such configuration, or no Flax model that follows it.
    """
    head, (classes, _) = find_task(config).head, count_classes(config)
    options = {"dtype": config.model.compute_dtype, "revision": config.model.revision}
    outline = cf.interop.outline_model(source, head, **options)
    if classes is not None:
        outline.model.config.num_labels = classes
        outline = cf.interop.outline_model(outline.model.config, head, **options)
    cast = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, config.model.param_dtype), outline.params
    )
    return replace(outline, params=cast)


def count_classes(config: Config) -> tuple[int | None, bool]:
    """How many numbers the head gives for an example.

    Args:
        config: The settings.

    Returns:
        Their number, None if the head is a language model's, and whether it is assumed, since
        only the examples would tell.
    """
    examples = config.examples
    if isinstance(examples, DataConfig):
        if examples.task in glue.TASKS:
            return len(glue.TASKS[examples.task].labels) or 1, False
        if examples.task == docstrings.NAME:
            return docstrings.MODULES, False
        named = 1 if examples.regression else len(examples.labels or ())
        return named or 2, not named
    if isinstance(examples, ImagesConfig):
        named = 10 if examples.dataset == DIGITS else len(examples.classes or ())
        return named or 2, not named
    return None, False


def make_step(
    config: Config, outline: cf.interop.Outline, devices: Sequence[jax.Device] | None = None
) -> Step:
    """The step of a run on a model without weights.

    Args:
        config: The settings. A batch has rows of the greatest length that they allow, and images
            have the model's size; there is no dropout.
        outline: The model.
        devices: What to compile for, as the settings' mesh; None is JAX's default device.

    Returns:
        The step.

    Raises:
        ValueError: If settings, model and devices do not fit.
    """
    model, optim = outline.model, config.optim
    base = outline.params
    if devices is not None:
        mesh = make_mesh(config, devices)
        shardings = cf.sharding.shard_params(base, mesh)
        base = jax.tree.map(
            lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
            base,
            shardings,
        )
    plan = make_plan(config, model, base, outline.new_leaves)
    optimizer = make_optimizer(optim, learning_rate(config), plan, steps=100)
    state = first_state(plan, optimizer, base)
    placement = None if devices is None else make_placement(mesh, plan, base)
    rematerialize = config.model.gradient_checkpointing
    forward = make_forward(model, plan, rematerialize=rematerialize, placement=placement)
    losses = objective.losses if config.language.given else classification.losses
    run = make_train_step(forward, losses, optimizer, optim.accumulation_steps, placement)
    counted = cf.summarize(base, plan)
    key = jax.eval_shape(jax.random.key, 0)
    arguments = (state, base, _batch(config, outline), key)
    return Step(run, arguments, counted.adapter_parameters, placement)


def first_state(plan: cf.Plan, optimizer: optax.GradientTransformation, base: Any) -> TrainState:
    """Shapes of the state before the first update, from shapes of the base model."""

    def start(key: jax.Array, base: Any) -> TrainState:
        small = cf.init_adapters(key, plan, base)
        return TrainState(small, optimizer.init(small), jnp.zeros((), jnp.int32))

    return jax.eval_shape(start, jax.random.key(0), base)


def _batch(config: Config, outline: cf.interop.Outline) -> dict[str, Any]:
    """Shapes of a batch, as the application's tasks make them."""
    size, images = config.optim.batch_size, config.images.given
    batch = outline.inputs(size, None if images else config.examples.max_length)
    if not config.language.given:
        numbers = jnp.float32 if count_classes(config)[0] == 1 else jnp.int32
        labels = jax.ShapeDtypeStruct((size,), numbers)
        return {**batch, "labels": labels, "weights": jax.ShapeDtypeStruct((size,), jnp.float32)}
    ids = batch["input_ids"]
    rows = {name: ids for name in ("position_ids", "segment_ids", "targets")}
    return {**batch, **rows, "target_weights": jax.ShapeDtypeStruct(ids.shape, jnp.float32)}
