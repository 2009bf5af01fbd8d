"""The training loop: updates, an evaluation each epoch, checkpoints."""

import dataclasses
import functools
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

import circflax as cf
from circflax.tree import Path as LeafPath
from train import metrics, processes
from train.checkpoints import Checkpoints, Progress
from train.config import Config
from train.failures import StoppedError, TrainingError
from train.feed import Feed
from train.log import MetricsLog, NoLog
from train.methods import IN_PLACE
from train.optimizer import make_optimizer
from train.parts import learning_rate
from train.placement import Placement
from train.progress import Track, TrainingProgress, untracked
from train.steps import TrainState, make_forward, make_generate, make_train_step
from train.stopping import StopRequest
from train.tasks.batches import Batch
from train.tasks.task import Evaluation, Runner, Workload

if TYPE_CHECKING:
    from transformers import FlaxPreTrainedModel

CHECKPOINTS = "checkpoints"


@dataclass
class _Run:
    """All that changes during a run, and that a checkpoint holds."""

    state: TrainState
    best: Any
    rng: jax.Array
    progress: Progress


class Observer(Protocol):
    """Is told of every update and evaluation of a run that leaves no files.

    Attributes:
        track: Shows how far an evaluation has come.
    """

    track: Track

    def append(self, *, step: int, epoch: int, split: str, **values: float) -> None:
        """Takes one record, as `MetricsLog.append` does."""

    def update(self, step: int, loss: float, size: int) -> None:
        """Takes one update, as `TrainingProgress.update` does."""

    def say(self, message: str) -> None:
        """Takes a line for the screen."""


@dataclass(frozen=True)
class _Outlets:
    """Where a run writes to; one without checkpoints is kept in memory alone."""

    checkpoints: Checkpoints | None
    log: MetricsLog | NoLog | Observer
    bar: TrainingProgress | Observer
    began: float
    stop: Callable[[int], bool] = lambda step: False


@dataclass(frozen=True)
class _Update:
    """An update whose loss the devices may still be computing."""

    step: int
    epoch: int
    loss: jax.Array
    size: int

    def tell(self, outlets: _Outlets) -> None:
        """Waits for the loss and tells of it."""
        loss = float(self.loss)
        if not np.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss} at step {self.step}; {_kept(outlets.checkpoints)}"
            )
        outlets.log.append(step=self.step, epoch=self.epoch + 1, split="train", loss=loss)
        outlets.bar.update(self.step, loss, self.size)


class Compiled(NamedTuple):
    """The compiled functions of a run.

    They serve every run with the same model, plan and settings, whatever its seed, its peak
    learning rates and its number of steps.
    """

    train_step: Callable[..., tuple[TrainState, jax.Array]]
    predict: Callable[..., jax.Array]
    generate: Callable[..., jax.Array] | None
    finite: Callable[[Any], jax.Array]


class Trainer:
    """The loop around the compiled functions of a run."""

    def __init__(
        self,
        config: Config,
        model: "FlaxPreTrainedModel",
        base: Any,
        plan: cf.Plan,
        head: tuple[LeafPath, ...],
        workload: Workload,
        metric: str,
        placement: Placement,
        compiled: Compiled | None = None,
    ) -> None:
        """Prepares a run; nothing is compiled or written yet.

        Args:
            config: The settings.
            model: A Flax model of transformers with a head for the task.
            base: Its frozen parameters, where `placement` puts them.
            plan: The adapters and the leaves trained in full.
            head: The leaves that the checkpoint did not have.
            workload: The examples.
            metric: The validation metric that chooses the best epoch.
            placement: Where arrays lie on the devices.
            compiled: Functions of another trainer that this one can share; None makes them.
        """
        self._placement = placement
        self._training = Feed(placement.batch, config.optim.batch_size)
        self._evaluation = Feed(placement.batch, config.optim.eval_batch_size)
        self._config, self._plan, self._base, self._metric = config, plan, base, metric
        self._workload = workload
        self._steps_per_epoch = len(workload.train_batches(config.run.seed, 0))
        self._total = config.optim.epochs * self._steps_per_epoch
        in_place = config.adapter.method in IN_PLACE
        fast = frozenset(plan.trained) - frozenset(head) if in_place else frozenset()
        rate = learning_rate(config)
        self._optimizer = make_optimizer(config.optim, rate, plan, self._total, fast)
        self.compiled = compiled or _compiled(
            config, model, plan, workload, self._optimizer, placement
        )

    def train(self, directory: Path, console: Console) -> tuple[Any, Progress]:
        """Runs to the last step, from the last checkpoint if there is one.

        Args:
            directory: The run's directory.
            console: Where to write.

        Returns:
            The small tree of the best epoch, and where the run stands.

        Raises:
            TrainingError: If the loss or the small tree is no longer finite.
            StoppedError: If SIGTERM asked the run to stop; a checkpoint was saved.
            CheckpointError: If the last checkpoint is of another model or other adapters.
            OSError: If a file cannot be written.
        """
        first = processes.is_first()
        if first and not self._config.run.resume:
            shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)
        processes.meet("old checkpoints are gone")
        with Checkpoints(directory / CHECKPOINTS) as checkpoints:
            resumed = checkpoints.latest
            run = self._begin(checkpoints)
            step = int(run.state.step)
            with (
                MetricsLog(directory, resumed) if first else nullcontext(NoLog()) as log,
                TrainingProgress(self._total, step, console, self._workload.unit) as bar,
                StopRequest(step) as stop,
            ):
                if resumed is not None:
                    bar.say(f"resumed from step {step} of {self._total}")
                began = time.monotonic() - run.progress.seconds
                self._go_on(run, _Outlets(checkpoints, log, bar, began, stop.heard))
        return run.best, run.progress

    def train_in_memory(self, observer: Observer) -> tuple[Any, Progress]:
        """Runs from the first step to the last and writes nothing.

        Args:
            observer: Is told of every update and evaluation.

        Returns:
            The small tree of the best epoch, and where the run stands.

        Raises:
            TrainingError: If the loss or the small tree is no longer finite.
        """
        run = self._begin(None)
        self._go_on(run, _Outlets(None, observer, observer, time.monotonic()))
        return run.best, run.progress

    def start(self) -> tuple[TrainState, jax.Array]:
        """The state before the first update.

        Returns:
            The state, and the key that dropout's keys are made from.
        """
        return self._start(self._base)

    @functools.cached_property
    def _start(self) -> Callable[[Any], tuple[TrainState, jax.Array]]:
        def make(base: Any) -> tuple[TrainState, jax.Array]:
            init_key, rng = jax.random.split(jax.random.key(self._config.run.seed))
            small = cf.init_adapters(init_key, self._plan, base)
            return TrainState(small, self._optimizer.init(small), jnp.zeros((), jnp.int32)), rng

        shardings = self._placement.like_small(jax.eval_shape(make, self._base))
        return jax.jit(make, out_shardings=shardings)

    def evaluate(self, small: Any, split: str, track: Track = untracked) -> Evaluation:
        """Measures a split.

        Args:
            small: A small tree.
            split: The split's name.
            track: Shows how far it has come.

        Returns:
            Its metrics and loss.
        """
        compiled, feed = self.compiled, self._evaluation

        def predict(own: Batch) -> jax.Array:
            return compiled.predict(small, self._base, feed.place(own))

        def generate(ids: np.ndarray, mask: np.ndarray, key: jax.Array) -> jax.Array:
            prompts = feed.place({"ids": ids[feed.rows], "mask": mask[feed.rows]})
            # Only plain arrays can be put on devices of other processes.
            data = jax.device_put(np.asarray(jax.random.key_data(key)), self._placement.replicated)
            key = jax.random.wrap_key_data(data)
            return compiled.generate(small, self._base, prompts["ids"], prompts["mask"], key)

        runner = Runner(predict, compiled.generate and generate, track, feed.rows)
        return self._workload.evaluate(split, runner)

    def _go_on(self, run: _Run, outlets: _Outlets) -> None:
        start = int(run.state.step) // self._steps_per_epoch
        for epoch in range(start, self._config.optim.epochs):
            stop = self._train_epoch(run, epoch, outlets)
            self._close_epoch(run, epoch, outlets)
            if stop and epoch + 1 < self._config.optim.epochs:
                raise self._stopped((epoch + 1) * self._steps_per_epoch)

    def _begin(self, checkpoints: Checkpoints | None) -> _Run:
        state, rng = self.start()
        if checkpoints is not None and checkpoints.latest is not None:
            return _Run(*checkpoints.restore(state, rng))
        # A copy, here and below: an update donates the buffers of the state it is given.
        return _Run(state, jax.tree.map(jnp.copy, state.small), rng, Progress())

    def _train_epoch(self, run: _Run, epoch: int, outlets: _Outlets) -> bool:
        """Makes the updates of a pass, and says whether the run is to stop after it."""
        start = int(run.state.step) - epoch * self._steps_per_epoch
        every = self._config.run.checkpoint_every
        batches = self._workload.train_batches(self._config.run.seed, epoch)
        feed, last, stop = self._training, None, False
        for number, own in enumerate(batches[start:].share(feed.rows), start=start + 1):
            batch = feed.place(own)
            run.state, loss = self.compiled.train_step(run.state, self._base, batch, run.rng)
            step = epoch * self._steps_per_epoch + number
            # The devices have this step to do while the loss of the one before is looked at.
            if last is not None:
                last.tell(outlets)
            last = _Update(step, epoch, loss, round(self._workload.size(own) / feed.share))
            stop = outlets.stop(step)
            within = number < self._steps_per_epoch
            save = within and (stop or (every and step % every == 0))
            if save or not within:
                last.tell(outlets)
                last = None
            if save:
                self._save(run, outlets, epoch=epoch, batch=number)
            if within and stop:
                raise self._stopped(step)
        return stop

    def _stopped(self, step: int) -> StoppedError:
        return StoppedError(f"SIGTERM came, and step {step} of {self._total} is saved")

    def _close_epoch(self, run: _Run, epoch: int, outlets: _Outlets) -> None:
        """Evaluates, keeps the best, and saves."""
        self._check(run, outlets)
        evaluation = self.evaluate(run.state.small, "validation", outlets.bar.track)
        result, loss = evaluation.metrics, evaluation.loss
        step, value = int(run.state.step), result[self._metric]
        outlets.log.append(step=step, epoch=epoch + 1, split="validation", loss=loss, **result)
        before = run.progress.validation
        better = before is None or metrics.better(self._metric, value, before[self._metric])
        if better:
            run.best = jax.tree.map(jnp.copy, run.state.small)
            run.progress = dataclasses.replace(
                run.progress, best_epoch=epoch + 1, validation=result
            )
        outlets.bar.say(
            f"epoch {epoch + 1}/{self._config.optim.epochs}  validation {self._metric}"
            f" {value:.4f}  loss {loss:.4f}" + ("  (best)" if better else "")
        )
        self._save(run, outlets, epoch=epoch + 1, batch=0)

    def _save(self, run: _Run, outlets: _Outlets, epoch: int, batch: int) -> None:
        self._check(run, outlets)
        seconds = time.monotonic() - outlets.began
        run.progress = dataclasses.replace(run.progress, epoch=epoch, batch=batch, seconds=seconds)
        if outlets.checkpoints is not None:
            outlets.log.sync()
            outlets.checkpoints.save(run.state, run.best, run.rng, run.progress)

    def _check(self, run: _Run, outlets: _Outlets) -> None:
        # A finite loss can still have given an update that is not.
        if not self.compiled.finite(run.state.small):
            raise TrainingError(
                f"the adapters are not finite after step {int(run.state.step)};"
                f" {_kept(outlets.checkpoints)}"
            )


def _compiled(
    config: Config,
    model: "FlaxPreTrainedModel",
    plan: cf.Plan,
    workload: Workload,
    optimizer: optax.GradientTransformation,
    placement: Placement,
) -> Compiled:
    # Without a gradient to compute, recomputing changes nothing: one function serves both.
    remake = config.model.gradient_checkpointing
    forward = make_forward(model, plan, workload.inputs, remake, placement)
    steps = config.optim.accumulation_steps
    settings = workload.generation
    return Compiled(
        train_step=make_train_step(forward, workload.losses, optimizer, steps, placement),
        predict=jax.jit(
            lambda small, base, batch: workload.rows(forward(small, base, batch), batch),
            # All processes have all rows, to come to the same numbers.
            out_shardings=placement.replicated,
        ),
        generate=settings and make_generate(model, plan, settings, placement),
        finite=jax.jit(
            lambda tree: jnp.all(jnp.stack([jnp.isfinite(a).all() for a in jax.tree.leaves(tree)]))
        ),
    )


def _kept(checkpoints: Checkpoints | None) -> str:
    hint = "a lower `optim.learning_rate` may help"
    if checkpoints is None:
        return f"{hint}."
    latest = checkpoints.latest
    kept = "there is no checkpoint yet" if latest is None else f"the one of step {latest} is kept"
    return f"{hint}, and {kept}."
