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
# A picture of more classes cannot be read.
_MOST_CLASSES = 100


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


def evaluate(
    batches: Batches, labels: np.ndarray, names: Sequence[str], runner: Runner
) -> Evaluation:
    """Predicts a split and compares with its labels.

    Args:
        batches: Its batches; the runner gives the logits of one.
        labels: The labels of its examples: indices, or numbers for regression.
        names: The classes; none for regression.
        runner: The model.

    Returns:
        The metrics, and for classes a picture of which were taken for which.
    """
    logits = batches.in_order([np.asarray(runner.predict(batch)) for batch in batches])
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
    from matplotlib.figure import Figure
    from sklearn.metrics import confusion_matrix

    classes = np.arange(len(names))
    counts = confusion_matrix(labels, predictions, labels=classes)
    parts = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    # Room for the names: more classes take a larger picture and smaller letters.
    size, letters = min(5 + 0.22 * len(names), 16), 9 if len(names) <= 20 else 6
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(parts, cmap="Blues", vmin=0, vmax=1)
    if len(names) <= 20:
        for row in classes:
            for column in np.flatnonzero(counts[row]):
                colour = "white" if parts[row, column] > 0.5 else "black"
                axes.text(column, row, counts[row, column], ha="center", va="center", color=colour)
    axes.set_xticks(classes, names, rotation=90, fontsize=letters)
    axes.set_yticks(classes, names, fontsize=letters)
    axes.set(xlabel="predicted", ylabel="true class", title="Examples by class")
    figure.colorbar(image, ax=axes, label="part of the true class", shrink=0.8)
    figure.savefig(path, dpi=120)
