"""What a run is put together from: its task, the base model, and what trains of it."""

from functools import partial
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax.sharding import Mesh

import circflax as cf
from circflax.tree import Path as LeafPath
from train.config import Config, ConfigError, DataConfig, ImagesConfig, LanguageConfig
from train.methods import BITFIT, FULL, HEAD_ALONE, LAMDA_PP, RATES
from train.progress import Track, untracked
from train.tasks.images import ImageClassification
from train.tasks.language.task import LanguageModelling
from train.tasks.task import Task
from train.tasks.text import TextClassification

if TYPE_CHECKING:
    from transformers import FlaxPreTrainedModel


def learning_rate(config: Config) -> float:
    """The peak learning rate of a run's adapters, or of what it trains in their place.

    Args:
        config: The settings.

    Returns:
        The one that is set, or else one that suits the method.
    """
    if config.optim.learning_rate is not None:
        return config.optim.learning_rate
    method = config.adapter.method
    return RATES[method] if method in RATES else cf.methods.METHODS[method].learning_rate


def load_task(config: Config) -> Task:
    """Reads the examples of a run.

    Args:
        config: The settings.

    Returns:
        The task that they are for.

    Raises:
        ValueError: If examples and settings do not fit.
    """
    return find_task(config)(config)


def find_task(config: Config) -> type[Task]:
    """The task that a run's examples are for; nothing is read."""
    return _TASKS[type(config.examples)]


_TASKS: dict[type, type[Task]] = {
    DataConfig: TextClassification,
    ImagesConfig: ImageClassification,
    LanguageConfig: LanguageModelling,
}


def load_model(
    config: Config, task: Task, mesh: Mesh, track: Track = untracked
) -> tuple["FlaxPreTrainedModel", dict[str, Any], cf.interop.LoadReport]:
    """Loads the base model with a head for the task.

    Args:
        config: The settings.
        task: The task.
        mesh: The devices that the parameters go to, each to its part of them.
        track: Shows how far reading has come.

    Returns:
        The model, its parameters, and which of these the checkpoint did not have.

    Raises:
        CheckpointError: If the checkpoint cannot be read or does not fit.
    """
    return cf.interop.load_model(
        config.model.name,
        task.head,
        revision=config.model.revision,
        config=task.head_config,
        dtype=jnp.dtype(config.model.compute_dtype),
        param_dtype=jnp.dtype(config.model.param_dtype),
        new_head=config.model.new_head,
        seed=config.run.seed,
        shard=partial(cf.sharding.shard_params, mesh=mesh),
        progress=partial(track, what="loading the model"),
    )


def make_plan(
    config: Config, model: "FlaxPreTrainedModel", base: Any, initialised: tuple[LeafPath, ...]
) -> cf.Plan:
    """Finds what a run adapts and trains.

    Args:
        config: The settings.
        model: The base model.
        base: Its parameters.
        initialised: The leaves that the checkpoint did not have: the new head, which always trains.

    Returns:
        The plan.

    Raises:
        ValueError: If the settings and the model do not fit.
    """
    adapter = config.adapter
    if adapter.method in RATES and adapter.method != LAMDA_PP and adapter.hyperparameters:
        raise ConfigError(
            f"`adapter.hyperparameters` has no use with the method `{adapter.method}`, which has"
            " no adapters"
        )
    if adapter.method == FULL:
        return cf.make_plan(base, cf.AdapterConfig(train=".*"))
    train = (*adapter.train, *("/".join(path) for path in initialised))
    if adapter.method == BITFIT:
        return cf.make_plan(base, cf.AdapterConfig(train=("bias", *train)))
    if adapter.method == HEAD_ALONE:
        return cf.make_plan(base, cf.AdapterConfig(train=train))
    overrides = {
        override.pattern: {**override.hyperparameters}
        | ({"method": override.method} if override.method else {})
        for override in adapter.overrides
    }
    method = "lamda" if adapter.method == LAMDA_PP else adapter.method
    chosen = cf.AdapterConfig(
        method=cf.make_method(method, adapter.hyperparameters),
        targets=adapter.targets,
        layers=adapter.layers,
        overrides=overrides,
        train=train,
    )
    layouts = cf.interop.Outline(model, base).layouts()
    plan = cf.make_plan(base, chosen, layouts)
    return cf.allocate_ranks(base, plan) if adapter.method == LAMDA_PP else plan
