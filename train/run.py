"""One run from its settings to its report."""

import dataclasses
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import circflax as cf
from train import config as configuration
from train import metrics, report
from train.checkpoints import Checkpoints, Progress
from train.config import Config, ConfigError, DataConfig
from train.data import Batches, Encoded, Split, Splits, epoch_batches, load_splits, tokenize
from train.log import MetricsLog
from train.optimizer import make_optimizer
from train.progress import TrainingProgress
from train.steps import TrainState, losses, make_forward, make_train_step

if TYPE_CHECKING:
    from transformers import FlaxPreTrainedModel

CONFIG, ADAPTER, CHECKPOINTS = "config.yaml", "adapter", "checkpoints"


class TrainingError(RuntimeError):
    """A run that cannot go on; the message is one sentence."""


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
    console.print(str(cf.summarize(base, plan)), highlight=False, markup=False, soft_wrap=True)
    encoded = encode(config, splits, loaded.directory)

    directory.mkdir(parents=True, exist_ok=True)
    configuration.save(config, directory / CONFIG)
    trainer = _Trainer(config, model, base, plan, loaded.initialised, encoded, metric)
    best, progress = trainer.train(directory, console)
    test = trainer.evaluate(best, encoded["test"])[0] if "test" in encoded else None

    adapter = directory / ADAPTER
    name = config.model.name
    base_name = os.path.abspath(name) if os.path.isdir(name) else name
    cf.save_adapters(adapter, best, plan, base, base=base_name)
    # With the model's own configuration beside it, the adapter can be merged without this run.
    model.config.architectures = [type(model).__name__.removeprefix("Flax")]
    model.config.save_pretrained(adapter)

    counted = cf.summarize(base, plan)
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


class _Trainer:
    """The compiled functions of a run and the loop around them."""

    def __init__(
        self,
        config: Config,
        model: "FlaxPreTrainedModel",
        base: Any,
        plan: cf.Plan,
        head: tuple[tuple[str, ...], ...],
        encoded: Mapping[str, Encoded],
        metric: str,
    ) -> None:
        self._config, self._plan, self._base, self._metric = config, plan, base, metric
        self._encoded = encoded
        self._steps_per_epoch = len(self._batches(0))
        self._total = config.optim.epochs * self._steps_per_epoch
        fast = frozenset(plan.trained) - set(head) if config.adapter.method == "full" else ()
        self._optimizer = make_optimizer(config.optim, plan, self._total, frozenset(fast))
        forward = make_forward(model, plan)
        self._train_step = make_train_step(
            forward, self._optimizer, config.optim.accumulation_steps
        )
        self._predict = jax.jit(forward)
        self._finite = jax.jit(
            lambda tree: jnp.all(jnp.stack([jnp.isfinite(a).all() for a in jax.tree.leaves(tree)]))
        )

    def train(self, directory: Path, console: Console) -> tuple[Any, Progress]:
        """Runs to the last step, from the last checkpoint if there is one.

        Returns:
            The small tree of the best epoch and where the run stands.
        """
        config = self._config
        if not config.run.resume:
            shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)
        init_key, rng = jax.random.split(jax.random.key(config.run.seed))
        small = cf.init_adapters(init_key, self._plan, self._base)
        state = TrainState(small, self._optimizer.init(small), jnp.zeros((), jnp.int32))
        # Copies, here and below: an update donates the buffers of the state it is given.
        best, progress = jax.tree.map(jnp.copy, small), Progress()
        with Checkpoints(directory / CHECKPOINTS) as checkpoints:
            resumed = checkpoints.latest
            if resumed is not None:
                state, best, rng, progress = checkpoints.restore(state, rng)
            step = int(state.step)
            with (
                MetricsLog(directory, resumed) as log,
                TrainingProgress(self._total, step, console) as bar,
            ):
                if resumed is not None:
                    bar.say(f"resumed from step {step} of {self._total}")
                clock = time.monotonic() - progress.seconds
                while step < self._total:
                    epoch, start = divmod(step, self._steps_per_epoch)
                    for batch in self._batches(epoch)[start:]:
                        state, loss = self._train_step(state, self._base, batch, rng)
                        step += 1
                        self._check_loss(float(loss), step, checkpoints)
                        log.append(step=step, epoch=epoch + 1, split="train", loss=float(loss))
                        bar.update(step, float(loss), int(batch["attention_mask"].sum()))
                        every = config.run.checkpoint_every
                        if every and step % every == 0 and step % self._steps_per_epoch:
                            progress = dataclasses.replace(
                                progress,
                                epoch=epoch,
                                batch=step % self._steps_per_epoch,
                                seconds=time.monotonic() - clock,
                            )
                            self._save(checkpoints, log, state, best, rng, progress)
                    result, validation_loss = self.evaluate(
                        state.small, self._encoded["validation"]
                    )
                    log.append(
                        step=step,
                        epoch=epoch + 1,
                        split="validation",
                        loss=validation_loss,
                        **result,
                    )
                    better = (
                        not progress.best_epoch
                        or result[self._metric] > progress.validation[self._metric]
                    )
                    if better:
                        best = jax.tree.map(jnp.copy, state.small)
                        progress = dataclasses.replace(
                            progress, best_epoch=epoch + 1, validation=result
                        )
                    bar.say(
                        f"epoch {epoch + 1}/{config.optim.epochs}  validation"
                        f" {self._metric} {result[self._metric]:.4f}  loss {validation_loss:.4f}"
                        + ("  (best)" if better else "")
                    )
                    progress = dataclasses.replace(
                        progress, epoch=epoch + 1, batch=0, seconds=time.monotonic() - clock
                    )
                    self._save(checkpoints, log, state, best, rng, progress)
        return best, progress

    def evaluate(self, small: Any, encoded: Encoded) -> tuple[dict[str, float], float]:
        """Metrics and mean loss of a small tree on a split."""
        batches = epoch_batches(
            encoded,
            batch_size=self._config.optim.eval_batch_size,
            buckets=self._config.data.bucket_lengths,
            shuffle=False,
        )
        outputs = [np.asarray(self._predict(small, self._base, batch)) for batch in batches]
        logits = batches.in_order(outputs)
        result = metrics.compute(logits, encoded.labels)
        return result, float(np.mean(losses(jnp.asarray(logits), jnp.asarray(encoded.labels))))

    def _batches(self, epoch: int) -> Batches:
        return epoch_batches(
            self._encoded["train"],
            batch_size=self._config.optim.batch_size,
            buckets=self._config.data.bucket_lengths,
            seed=self._config.run.seed,
            epoch=epoch,
        )

    def _check_loss(self, loss: float, step: int, checkpoints: Checkpoints) -> None:
        if not np.isfinite(loss):
            raise TrainingError(f"the loss is {loss} at step {step}; {_kept(checkpoints)}")

    def _save(
        self,
        checkpoints: Checkpoints,
        log: MetricsLog,
        state: TrainState,
        best: Any,
        rng: jax.Array,
        progress: Progress,
    ) -> None:
        # A finite loss can still have given an update that is not.
        if not self._finite(state.small):
            raise TrainingError(
                f"the adapters are not finite after step {int(state.step)}; {_kept(checkpoints)}"
            )
        log.sync()
        checkpoints.save(state, best, rng, progress)


def _kept(checkpoints: Checkpoints) -> str:
    latest = checkpoints.latest
    kept = "there is no checkpoint yet" if latest is None else f"the one of step {latest} is kept"
    return f"a lower `optim.learning_rate` may help, and {kept}."


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
    if adapter.method == "none":
        return cf.make_plan(base, cf.AdapterConfig(train=train))
    overrides = {
        override.pattern: {**override.hyperparameters}
        | ({"method": override.method} if override.method else {})
        for override in adapter.overrides
    }
    chosen = cf.AdapterConfig(
        method=cf.make_method(adapter.method, adapter.hyperparameters),
        targets=adapter.targets,
        layers=adapter.layers,
        overrides=overrides,
        train=train,
    )
    ids = jnp.zeros((1, 8), jnp.int32)
    layouts = cf.linen.find_layouts(lambda params: model(ids, params=params), base)
    return cf.make_plan(base, chosen, layouts)


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
