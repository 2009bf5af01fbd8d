"""What every task offers to the loop that trains for it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any, Protocol

import jax
import numpy as np

from train.progress import Track, untracked
from train.tasks.batches import Batch, Batches

if TYPE_CHECKING:
    from transformers import FlaxPreTrainedModel


def _nothing(directory: Path) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True)
class Evaluation:
    """What a split came to.

    Attributes:
        metrics: The metrics by name.
        loss: The mean loss.
        save: Writes what numbers cannot show, a picture or answers, into a directory, and returns
            the names of the files.
    """

    metrics: dict[str, float]
    loss: float
    save: Callable[[Path], tuple[str, ...]] = _nothing


@dataclass(frozen=True)
class Runner:
    """The compiled model in one state of its training.

    Attributes:
        predict: What `Workload.rows` keeps of a batch, all of it, given some of its rows.
        generate: Continues token ids (batch, length), padded on the left, with their attention
            mask and a key; returns the ids of both. None if the workload does not generate.
        track: Shows how far an evaluation has come.
        rows: Which rows `predict` is to be given; other processes give it the rest.
    """

    predict: Callable[[Batch], jax.Array]
    generate: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] | None = None
    track: Track = untracked
    rows: np.ndarray | EllipsisType = ...

    def predict_all(self, batches: Batches, split: str) -> list[np.ndarray]:
        """Predicts a split.

        Args:
            batches: Its batches.
            split: Its name.

        Returns:
            What `predict` gives of each batch.
        """
        tracked = self.track(batches.share(self.rows), len(batches), f"evaluating {split}, batch")
        return [np.asarray(self.predict(batch)) for batch in tracked]


class Workload(Protocol):
    """Examples in the form that a model takes, with their loss and metrics.

    Attributes:
        unit: What the examples consist of, such as "tokens", for the speed of training.
        notes: Sentences on what became of the examples, for the report.
        splits: Names of the splits that there are.
        compared: Those that are measured before the training as well.
        generation: Settings of generation, as `generate` of transformers takes them; None if
            there is none.
    """

    unit: str
    notes: tuple[str, ...]
    splits: tuple[str, ...]
    compared: tuple[str, ...]
    generation: Mapping[str, Any] | None

    def train_batches(self, seed: int, epoch: int) -> Batches:
        """The batches of one pass over the training split."""

    def size(self, batch: Batch) -> int:
        """How many units a batch has."""

    def inputs(self, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """What the model may take of a batch; compiled into the step."""

    def losses(
        self, logits: jax.Array, batch: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """The sum of a batch's losses and how many there are; compiled into the step."""

    def rows(self, logits: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
        """What evaluation needs of each row of a batch; compiled with the model."""

    def evaluate(self, split: str, runner: Runner) -> Evaluation:
        """Measures a split."""


class Task(Protocol):
    """Examples that are read, and the head that a model needs for them.

    Attributes:
        name: For tables and titles.
        metric: The validation metric that chooses the best epoch.
        head: Kind of head, for `circflax.interop.load_model`.
        head_config: What of the model's configuration the head depends on.
    """

    name: str
    metric: str
    head: str
    head_config: Mapping[str, Any]

    def encode(self, directory: Path, model: "FlaxPreTrainedModel") -> Workload:
        """Brings the examples into the form that the model takes.

        Args:
            directory: The base model's, with its tokenizer or image processor.
            model: The model.

        Returns:
            The examples.

        Raises:
            DataError: If examples, settings and model do not fit.
        """
