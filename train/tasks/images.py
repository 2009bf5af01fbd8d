"""Images with classes: the task, and its batches."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from train import metrics
from train.config import Config, ImagesConfig
from train.tasks import classification
from train.tasks.batches import Batch, Batches, PlannedBatch, filled, plan, weights
from train.tasks.image_files import Arrays, in_threads
from train.tasks.image_input import BOX_NUMBERS, ImageInput, random_box, read_input
from train.tasks.image_splits import Split, load_splits

if TYPE_CHECKING:
    from transformers import FlaxPreTrainedModel


class ImageClassification:
    """Images with classes, from files, arrays or the Hub; see `train.tasks.task.Task`."""

    head = "image-classification"

    def __init__(self, config: Config) -> None:
        """Reads which examples there are, and the images in files once.

        Args:
            config: The settings of the run.

        Raises:
            DataError: If examples cannot be read, or do not fit.
            ValueError: If the metric that is asked for is not computed for them.
        """
        self._config = config
        self.splits = load_splits(config.images)
        names = self.splits.label_names
        self.metric = metrics.choose(config.run.metric, None, len(names))
        self.name = _name(config.images)
        self.head_config = classification.head_config(names)

    def encode(self, directory: Path, model: "FlaxPreTrainedModel") -> "Images":
        """Finds out what input the model takes.

        Args:
            directory: The base model's, with its image processor.
            model: The model.

        Returns:
            The images.

        Raises:
            DataError: If image processor and model do not fit.
        """
        model_input, notes = read_input(directory, model)
        splits = self.splits
        return Images(
            self._config, splits.parts(), splits.label_names, model_input, (*splits.notes, *notes)
        )


@dataclass(frozen=True)
class Images(classification.Labelled):
    """Images with classes for a model; see `train.tasks.task.Workload`.

    Attributes:
        config: The settings of the run.
        parts: The examples of each split.
        label_names: The classes.
        input: What the model takes.
        notes: Sentences on the splits and the input.
    """

    config: Config
    parts: Mapping[str, Split]
    label_names: tuple[str, ...]
    input: ImageInput
    notes: tuple[str, ...]

    unit = "images"

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits that there are."""
        return tuple(self.parts)

    def train_batches(self, seed: int, epoch: int) -> Batches:
        """The batches of one pass, shuffled and cut out by seed and epoch."""
        split, augment = self.parts["train"], self.config.images.augment
        # An example's numbers depend on its position alone, so that a resumed run has the same.
        numbers = np.random.default_rng([seed, epoch, 1]).random(
            (len(split), 1 + BOX_NUMBERS), np.float32
        )
        views = Views(
            flipped=numbers[:, 0] < 0.5 if "flip" in augment else None,
            boxes=numbers[:, 1:] if "crop" in augment else None,
        )
        rng = np.random.default_rng([seed, epoch])
        return _batches(split, self.input, self.config.optim.batch_size, views, rng)

    def eval_batches(self, split: str) -> Batches:
        """The batches of a split, to be predicted."""
        return _batches(self.parts[split], self.input, self.config.optim.eval_batch_size, Views())

    def size(self, batch: Batch) -> int:
        """The images of a batch."""
        return int(batch["weights"].sum())

    def inputs(self, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """The images' values; as bytes they are a quarter of the size on their way here."""
        return {"pixel_values": self.input.pixel_values(batch["images"])}

    def labels(self, split: str) -> np.ndarray:
        """The labels of a split's examples."""
        return self.parts[split].labels


@dataclass(frozen=True)
class Views:
    """How the images of a split are seen in one pass.

    Attributes:
        flipped: Which are mirrored, (images,); None mirrors none.
        boxes: Random numbers of the part of each, see `random_box`; None takes what the image
            processor does.
    """

    flipped: np.ndarray | None = None
    boxes: np.ndarray | None = None


def collate(
    split: Split, planned: PlannedBatch, batch_size: int, model_input: ImageInput, views: Views
) -> Batch:
    """Makes the arrays of one batch.

    Args:
        split: The examples.
        planned: Which of them.
        batch_size: Rows of the batch.
        model_input: What the model takes.
        views: How they are seen.

    Returns:
        ``images`` (batch, height, width, 3), uint8, ``labels`` (int32) and ``weights`` (float32):
        1 for examples, 0 for the rows that fill up a partial batch.
    """
    # The rows that fill up are examples again, which are decoded once.
    indices, places = np.unique(filled(planned, batch_size), return_inverse=True)
    images = _images(split, indices, model_input, views)
    if views.flipped is not None:
        flipped = views.flipped[indices]
        images[flipped] = images[flipped, :, ::-1]
    return {
        "images": images[places],
        "labels": split.labels[indices[places]],
        "weights": weights(planned, batch_size),
    }


def _images(split: Split, indices: np.ndarray, model_input: ImageInput, views: Views) -> np.ndarray:
    images = split.images
    if (
        views.boxes is None
        and isinstance(images, Arrays)
        and model_input.keeps(images.pixels.shape[1:3])
    ):
        return images[indices]

    def image(index: int) -> np.ndarray:
        if views.boxes is None:
            return model_input.fit(images[index])
        whole = images[index]
        box = random_box(views.boxes[index].tolist(), *whole.shape[:2])
        return model_input.resize(whole, box)

    return np.stack(list(in_threads(image, indices)))


def _batches(
    split: Split,
    model_input: ImageInput,
    batch_size: int,
    views: Views,
    rng: np.random.Generator | None = None,
) -> Batches:
    # All images have one size, thus one bucket.
    planned = plan(np.zeros(len(split), int), batch_size, (0,), rng)
    return Batches(lambda batch: collate(split, batch, batch_size, model_input, views), planned)


def _name(images: ImagesConfig) -> str:
    """The dataset's name, or that of the local directory."""
    path = Path(images.root or ".", images.train or "")
    return images.dataset or path.parent.name or path.stem
