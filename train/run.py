"""One run from its settings to its report."""

import dataclasses
import os
from pathlib import Path

from rich.console import Console

import circflax as cf
from train import config as configuration
from train import metrics, report
from train.config import Config, ConfigError, DataConfig
from train.data import load_splits
from train.parts import encode, load_model, make_plan, truncation_notes
from train.trainer import Trainer

CONFIG, ADAPTER = "config.yaml", "adapter"


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
    model, base, loaded = load_model(config, splits)
    plan = make_plan(config, model, base, loaded.initialised)
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
        notes=(*splits.notes, *truncation_notes(config, encoded)),
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


def _task(data: DataConfig) -> str:
    """The GLUE task, or the name of the local files' directory, or of the file."""
    path = Path(data.root or ".", data.train or "")
    return data.task or path.parent.name or path.stem
