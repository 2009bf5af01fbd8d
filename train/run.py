"""One run from its settings to its report."""

import dataclasses
import os
from pathlib import Path

from rich.console import Console

import circflax as cf
from train import processes, report, settings
from train.config import Config, ConfigError
from train.parts import load_model, load_task, make_plan
from train.placement import make_mesh, make_placement
from train.progress import Display
from train.trainer import Trainer

CONFIG, ADAPTER = "config.yaml", "adapter"


def run(config: Config, console: Console | None = None) -> report.Summary:
    """Trains, chooses the best epoch on validation, reports it on test and saves its adapter.

    The run's directory gets ``config.yaml``, ``metrics.jsonl``, TensorBoard files, checkpoints,
    ``report.md`` with ``curves.png``, and ``adapter/``. A run that was stopped goes on where its
    last checkpoint left off, and ends with the same numbers. Of several processes, which must all
    call it and see one directory, the first prints and writes.

    Args:
        config: The settings.
        console: Where to write; None is the first process's standard output.

    Returns:
        What the run came to.

    Raises:
        ConfigError, DataError, CheckpointError, ValueError: If settings, data and model do not
            fit; nothing has been written then.
        TrainingError: If the loss or the adapters are no longer finite.
        StoppedError: If SIGTERM asked the run to stop; a checkpoint was saved.
        OSError: If a file cannot be written; the last checkpoint stays.
    """
    console = console or processes.console()
    directory = Path(config.run.output)
    _check_directory(config, directory)
    task = load_task(config)
    mesh = make_mesh(config)
    with Display(console) as display:
        model, base, loaded = load_model(config, task, mesh, display.track)
    plan = make_plan(config, model, base, loaded.initialised)
    counted = cf.summarize(base, plan)
    _say(console, str(counted))
    placement = make_placement(mesh, plan, base)
    if mesh.size > 1:
        _say(console, placement.describe(base))
    workload = task.encode(loaded.directory, model)
    trainer = Trainer(
        config, model, base, plan, loaded.initialised, workload, task.metric, placement
    )

    # None may find the settings of this run where it looks for those of an earlier one.
    processes.meet("settings are checked")
    if processes.is_first():
        directory.mkdir(parents=True, exist_ok=True)
        settings.save(config, directory / CONFIG)
    before = {}
    if workload.compared:
        console.print(f"measuring {', '.join(workload.compared)} before the training")
        untrained = trainer.start()[0].small
        with Display(console) as display:
            before = {
                name: trainer.evaluate(untrained, name, display.track) for name in workload.compared
            }
    best, progress = trainer.train(directory, console)
    last = "test" if "test" in workload.splits else "validation"
    measured = dict.fromkeys((last, *workload.compared))
    with Display(console) as display:
        after = {name: trainer.evaluate(best, name, display.track) for name in measured}

    adapter = directory / ADAPTER
    name = config.model.name
    base_name = os.path.abspath(name) if os.path.isdir(name) else name
    cf.save_adapters(adapter, best, plan, base, base=base_name)

    summary = report.Summary(
        task=task.name,
        model=config.model.name,
        method=config.adapter.method,
        trainable={
            "adapters": counted.adapter_parameters,
            "in full": counted.trained_parameters,
        },
        total=counted.base_parameters + counted.adapter_parameters,
        metric=task.metric,
        best_epoch=progress.best_epoch,
        validation=progress.validation,
        test=after["test"].metrics if last == "test" else None,
        compared={name: (before[name].metrics, after[name].metrics) for name in before},
        seconds=progress.seconds,
        seed=config.run.seed,
        notes=workload.notes,
        files=after[last].save(directory) if processes.is_first() else (),
    )
    if processes.is_first():
        # With the model's own configuration beside it, the adapter can be merged without this run.
        model.config.architectures = [type(model).__name__.removeprefix("Flax")]
        model.config.save_pretrained(adapter)
        report.write(directory, summary)
    report.show(summary, console)
    return summary


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _check_directory(config: Config, directory: Path) -> None:
    """Refuses to resume a run that had other settings."""
    saved = directory / CONFIG
    if not config.run.resume or not saved.exists():
        return
    before = settings.load(["--config", str(saved)])
    for section in dataclasses.fields(Config):
        # Other devices go on with the same numbers, up to rounding.
        if section.name == "mesh":
            continue
        old, new = getattr(before, section.name), getattr(config, section.name)
        for field in dataclasses.fields(old):
            was, now = getattr(old, field.name), getattr(new, field.name)
            if was != now:
                raise ConfigError(
                    f"`{directory}` holds a run with `{section.name}.{field.name}` {was!r}, not"
                    f" {now!r}; choose another `run.output`, or set `run.resume` to false to"
                    " begin again"
                )
