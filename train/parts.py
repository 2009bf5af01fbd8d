"""What a run is put together from: the base model, what trains of it, and the tokens."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

import circflax as cf
from circflax.tree import Path as LeafPath
from train.config import Config
from train.data import Encoded, Split, Splits, tokenize

if TYPE_CHECKING:
    from transformers import FlaxPreTrainedModel

LAMDA_PP = "lamda++"
# Methods without adapters: which leaves of the base they train besides the head.
TRAINED = {"none": (), "bitfit": ("bias",)}
# Learning rates to begin with, of methods that are no class of circflax with a rate of its own.
_RATES = {"full": 5e-5, "bitfit": 1e-3, "none": 0.0, LAMDA_PP: cf.LaMDA.learning_rate}


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
    return _RATES[method] if method in _RATES else cf.methods.METHODS[method].learning_rate


def load_model(
    config: Config, splits: Splits
) -> tuple["FlaxPreTrainedModel", dict[str, Any], cf.interop.LoadReport]:
    """Loads the base model with a head for the task.

    Args:
        config: The settings.
        splits: The examples, whose classes the head has.

    Returns:
        The model, its parameters, and which of these the checkpoint did not have.

    Raises:
        CheckpointError: If the checkpoint cannot be read or does not fit.
    """
    names = splits.label_names
    if splits.regression:
        head = {"num_labels": 1, "problem_type": "regression"}
    else:
        head = {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: i for i, name in enumerate(names)},
            "problem_type": "single_label_classification",
        }
    return cf.interop.load_model(
        config.model.name,
        "sequence-classification",
        revision=config.model.revision,
        config=head,
        dtype=jnp.dtype(config.model.compute_dtype),
        seed=config.run.seed,
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
    if adapter.method == "full":
        return cf.make_plan(base, cf.AdapterConfig(train=".*"))
    train = (*adapter.train, *("/".join(path) for path in initialised))
    if adapter.method in TRAINED:
        return cf.make_plan(base, cf.AdapterConfig(train=(*TRAINED[adapter.method], *train)))
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
    ids = jnp.zeros((1, 8), jnp.int32)
    layouts = cf.linen.find_layouts(lambda params: model(ids, params=params), base)
    plan = cf.make_plan(base, chosen, layouts)
    return cf.allocate_ranks(base, plan) if adapter.method == LAMDA_PP else plan


def encode(config: Config, splits: Splits, directory: Path) -> dict[str, Encoded]:
    """Tokenizes the examples of a run.

    Args:
        config: The settings.
        splits: The examples.
        directory: The base model's, with its tokenizer.

    Returns:
        The tokens of each split there is.

    Raises:
        DataError: If tokenizer, settings and examples do not fit.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    parts: dict[str, Split | None] = {
        "train": splits.train,
        "validation": splits.validation,
        "test": splits.test,
    }
    return {
        name: tokenize(part, tokenizer, config.data.max_length)
        for name, part in parts.items()
        if part is not None
    }


def truncation_notes(config: Config, encoded: Mapping[str, Encoded]) -> list[str]:
    """What to tell about examples that were cut.

    Args:
        config: The settings.
        encoded: The tokens of each split.

    Returns:
        A sentence for each split in which there were some.
    """
    return [
        f"{name}: {part.truncated} of {len(part)} examples were cut to {config.data.max_length}"
        " tokens"
        for name, part in encoded.items()
        if part.truncated
    ]
