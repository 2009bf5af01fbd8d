"""One run from its settings to its report."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from rich.console import Console

import circflax as cf
from train import config as configuration
from train import metrics, report
from train.config import Config, ConfigError, DataConfig
from train.data import Encoded, Split, Splits, load_splits, tokenize
from train.trainer import Trainer

if TYPE_CHECKING:
    from transformers import FlaxPreTrainedModel

CONFIG, ADAPTER = "config.yaml", "adapter"
LAMDA_PP = "lamda++"
# Methods without adapters: which leaves of the base they train besides the head.
TRAINED = {"none": (), "bitfit": ("bias",)}


def run(config: Config, console: Console | None = None) -> report.Summary:
    """Trains, chooses the best epoch on validation, reports it on test and saves its adapter.

    The run's directory gets ``config.yaml``, ``metrics.jsonl``, TensorBoard files, checkpoints,
    ``report.md`` with ``curves.png``, and ``adapter/``. A run that was stopped goes on where its
    last checkpoint left off, and ends with the same numbers.

    Args:
        config: The settings.
        console: Where to write; None is standard output.

    Returns:
        What the run came to.

    Raises:
        ConfigError, DataError, CheckpointError, ValueError: If settings, data and model do not
            fit; nothing has been written then.
        TrainingError: If the loss or the adapters are no longer finite.
        OSError: If a file cannot be written; the last checkpoint stays.
    """
    console = console or Console()
    directory = Path(config.run.output)
    _check_directory(config, directory)
    splits = load_splits(config.data)
    metric = metrics.choose(config.run.metric, config.data.task, len(splits.label_names))
    model, base, loaded = _load_model(config, splits)
    plan = _make_plan(config, model, base, loaded.initialised)
    counted = cf.summarize(base, plan)
    console.print(str(counted), highlight=False, markup=False, soft_wrap=True)
    encoded = encode(config, splits, loaded.directory)

    directory.mkdir(parents=True, exist_ok=True)
    configuration.save(config, directory / CONFIG)
    trainer = Trainer(config, model, base, plan, loaded.initialised, encoded, metric)
    best, progress = trainer.train(directory, console)
    test = trainer.evaluate(best, encoded["test"])[0] if "test" in encoded else None

    adapter = directory / ADAPTER
    name = config.model.name
    base_name = os.path.abspath(name) if os.path.isdir(name) else name
    cf.save_adapters(adapter, best, plan, base, base=base_name)
    # With the model's own configuration beside it, the adapter can be merged without this run.
    model.config.architectures = [type(model).__name__.removeprefix("Flax")]
    model.config.save_pretrained(adapter)

    summary = report.Summary(
        task=_task(config.data),
        model=config.model.name,
        method=config.adapter.method,
        trainable={
            "adapters": counted.adapter_parameters,
            "in full": counted.trained_parameters,
        },
        total=counted.base_parameters + counted.adapter_parameters,
        metric=metric,
        best_epoch=progress.best_epoch,
        validation=progress.validation,
        test=test,
        seconds=progress.seconds,
        seed=config.run.seed,
        notes=(*splits.notes, *_truncation_notes(config, encoded)),
    )
    report.write(directory, summary)
    report.show(summary, console)
    return summary


def _check_directory(config: Config, directory: Path) -> None:
    """Refuses to resume a run that had other settings."""
    saved = directory / CONFIG
    if not config.run.resume or not saved.exists():
        return
    before = configuration.load(["--config", str(saved)])
    for section in dataclasses.fields(Config):
        old, new = getattr(before, section.name), getattr(config, section.name)
        for field in dataclasses.fields(old):
            was, now = getattr(old, field.name), getattr(new, field.name)
            if was != now:
                raise ConfigError(
                    f"`{directory}` holds a run with `{section.name}.{field.name}` {was!r}, not"
                    f" {now!r}; choose another `run.output`, or set `run.resume` to false to"
                    " begin again"
                )


def _load_model(
    config: Config, splits: Splits
) -> tuple["FlaxPreTrainedModel", dict[str, Any], cf.interop.LoadReport]:
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


def _make_plan(
    config: Config,
    model: "FlaxPreTrainedModel",
    base: Any,
    initialised: tuple[tuple[str, ...], ...],
) -> cf.Plan:
    adapter = config.adapter
    if adapter.method == "full":
        return cf.make_plan(base, cf.AdapterConfig(train=".*"))
    # What the checkpoint lacks has random values: the new head always trains.
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


def _task(data: DataConfig) -> str:
    """The GLUE task, or the name of the local files' directory, or of the file."""
    path = Path(data.root or ".", data.train or "")
    return data.task or path.parent.name or path.stem


def _truncation_notes(config: Config, encoded: Mapping[str, Encoded]) -> list[str]:
    return [
        f"{name}: {part.truncated} of {len(part)} examples were cut to {config.data.max_length}"
        " tokens"
        for name, part in encoded.items()
        if part.truncated
    ]
