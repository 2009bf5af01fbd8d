"""The loss and the evaluation of labels: classes or numbers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from train import metrics
from train.tasks.batches import Batches
from train.tasks.task import Evaluation, Runner

CONFUSION = "confusion.png"
# A picture of more classes cannot be read, nor numbers in one of more than a few.
_MOST_CLASSES, _MOST_NUMBERED = 100, 20


class Labelled:
    """What workloads of labelled examples share; see `train.tasks.task.Workload`.

    Attributes:
        label_names: The classes; none for regression.
    """

    label_names: tuple[str, ...]

    compared = ()
    generation = None

    def eval_batches(self, split: str) -> Batches:
        """The batches of a split, to be predicted."""
        raise NotImplementedError

    def labels(self, split: str) -> np.ndarray:
        """The labels of a split's examples."""
        raise NotImplementedError

    def losses(
        self, logits: jax.Array, batch: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """See `losses` beside this class."""
        return losses(logits, batch)

    def rows(self, logits: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
        """The logits as they are."""
        del batch
        return logits

    def evaluate(self, split: str, runner: Runner) -> Evaluation:
        """See `evaluate` beside this class."""
        batches = self.eval_batches(split)
        logits = batches.in_order(runner.predict_all(batches, split))
        return evaluate(logits, self.labels(split), self.label_names)


def head_config(names: Sequence[str]) -> dict[str, Any]:
    """What of a model's configuration a head for these labels needs.

    Args:
        names: The classes in the order of their indices; none for regression.

    Returns:
        Fields of the configuration.
    """
    if not names:
        return {"num_labels": 1, "problem_type": "regression"}
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
        "problem_type": "single_label_classification",
    }


def each_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Each example's loss: cross-entropy, or the squared error where labels are numbers.

    Args:
        logits: (batch, classes), or (batch, 1) for regression.
        labels: (batch,), integers or floating-point numbers.

    Returns:
        (batch,).
    """
    if jnp.issubdtype(labels.dtype, jnp.floating):
        return optax.squared_error(logits[:, 0], labels)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def losses(logits: jax.Array, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The loss of a batch.

    Args:
        logits: See `each_loss`.
        batch: ``labels`` (batch,) and ``weights`` (batch,), 0 for rows that do not count.

    Returns:
        The weighted sum of the losses, and the sum of the weights.
    """
    return jnp.sum(batch["weights"] * each_loss(logits, batch["labels"])), jnp.sum(batch["weights"])


def evaluate(logits: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Evaluation:
    """Compares the predictions of a split with its labels.

    Args:
        logits: (examples, classes), or (examples, 1) for regression.
        labels: (examples,), indices, or numbers for regression.
        names: The classes; none for regression.

    Returns:
        The metrics, and for classes a picture of which were taken for which.
    """
    result = metrics.compute(logits, labels)
    loss = float(np.mean(each_loss(jnp.asarray(logits), jnp.asarray(labels))))
    if not 2 <= len(names) <= _MOST_CLASSES:
        return Evaluation(result, loss)

    def save(directory: Path) -> tuple[str, ...]:
        _draw_confusion(logits.argmax(-1), labels, names, directory / CONFUSION)
        return (CONFUSION,)

    return Evaluation(result, loss, save)


def _draw_confusion(
    predictions: np.ndarray, labels: np.ndarray, names: Sequence[str], path: Path
) -> None:
    """Draws how often examples of each class were taken for each, as parts of the class."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter
    from sklearn.metrics import confusion_matrix

    classes = np.arange(len(names))
    counts = confusion_matrix(labels, predictions, labels=classes)
    parts = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    numbered = len(names) <= _MOST_NUMBERED
    # Inches of the square; what is written around it makes the picture as large as it must be.
    side = max(3.0, len(names) * (0.5 if numbered else 0.16))
    figure = Figure(figsize=(side, side))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    # The root shows the few that were mistaken beside the many that were not.
    scale = PowerNorm(0.5, vmin=0, vmax=1)
    image = axes.imshow(parts, cmap="Blues", norm=scale)
    if numbered:
        for row, column in np.argwhere(counts):
            colour = "white" if scale(parts[row, column]) > 0.6 else "black"
            count = counts[row, column]
            axes.text(column, row, count, ha="center", va="center", color=colour, fontsize=8)
    else:
        axes.set_xticks(classes - 0.5, minor=True)
        axes.set_yticks(classes - 0.5, minor=True)
        axes.grid(which="minor", color="0.9", linewidth=0.4)
        axes.tick_params(which="minor", length=0)
    letters = 9 if numbered else 7
    axes.set_xticks(classes, names, rotation=90, fontsize=letters, parse_math=False)
    axes.set_yticks(classes, names, fontsize=letters, parse_math=False)
    axes.set(xlabel="predicted", ylabel="true class", title="Examples by class")
    place = axes.inset_axes((1 + 0.15 / side, 0, 0.15 / side, 1))
    ticks = (0, 0.01, 0.05, 0.1, 0.2, 0.5, 1)
    figure.colorbar(
        image, place, ticks=ticks, format=PercentFormatter(1), label="of the true class"
    )
    figure.savefig(path, dpi=120, bbox_inches="tight")
