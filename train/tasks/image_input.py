"""What a model's image processor makes of images, and the random parts that training takes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from train.tasks.records import DataError

if TYPE_CHECKING:
    from transformers import FlaxPreTrainedModel
    from transformers.image_processing_utils import BaseImageProcessor

PROCESSOR = "preprocessor_config.json"
# How many numbers `random_box` takes: areas and shapes to try, and a place.
_TRIES = 10
BOX_NUMBERS = 2 * _TRIES + 2
# torchvision's RandomResizedCrop: parts of the area, and width by height.
_AREAS, _SHAPES = (0.08, 1.0), (3 / 4, 4 / 3)
# An image processor's first half: sizes are brought into line, values stay bytes.
_BYTES = {
    "do_rescale": False,
    "do_normalize": False,
    "data_format": "channels_last",
    "input_data_format": "channels_last",
}

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class ImageInput:
    """The input of a model, as its image processor makes it.

    Attributes:
        processor: The image processor.
        size: Height and width of the input.
    """

    processor: "BaseImageProcessor"
    size: tuple[int, int]

    def fit(self, image: np.ndarray) -> np.ndarray:
        """Resizes and crops an image as the processor does.

        Args:
            image: (height, width, 3), uint8.

        Returns:
            The same of the input's size.
        """
        return image if self.keeps(image.shape[:2]) else _fit(self.processor, image)

    def keeps(self, size: tuple[int, ...]) -> bool:
        """Whether `fit` leaves images of a size as they are."""
        return size == self.size and self._keeps_own

    @cached_property
    def _keeps_own(self) -> bool:
        # Not so where the processor resizes to more than it crops to.
        noise = np.random.default_rng(0).integers(0, 256, (*self.size, 3), np.uint8)
        return np.array_equal(_fit(self.processor, noise), noise)

    def resize(self, image: np.ndarray, box: Box) -> np.ndarray:
        """Resizes a part of an image with the processor's filter.

        Args:
            image: (height, width, 3), uint8.
            box: Left, top, right and bottom of the part.

        Returns:
            The same of the input's size.
        """
        height, width = self.size
        resized = Image.fromarray(image).resize((width, height), self.processor.resample, box)
        return np.asarray(resized)

    def pixel_values(self, images: jax.Array) -> jax.Array:
        """Scales and normalises images as the processor does.

        Args:
            images: (batch, height, width, 3), uint8.

        Returns:
            (batch, 3, height, width), float32.
        """
        values = images.astype(jnp.float32)
        if self.processor.do_rescale:
            values = values * self.processor.rescale_factor
        if self.processor.do_normalize:
            mean, std = self.processor.image_mean, self.processor.image_std
            values = (values - jnp.asarray(mean)) / jnp.asarray(std)
        return values.transpose(0, 3, 1, 2)


def read_input(directory: Path, model: "FlaxPreTrainedModel") -> tuple[ImageInput, tuple[str, ...]]:
    """Finds out what input a model takes.

    Args:
        directory: The model's, with its image processor.
        model: The model.

    Returns:
        The input, and sentences on what had to be assumed.

    Raises:
        DataError: If the image processor cannot be read, or does not make what the model takes.
    """
    _, *own, channels = model.input_shape
    taken = f"{own[0]} x {own[1]}"
    if channels != 3:
        raise DataError(f"the model in `{directory}` takes images of {channels} channels, not 3")
    if (directory / PROCESSOR).is_file():
        processor, notes = _read_processor(directory), ()
    else:
        from transformers import ViTImageProcessor

        processor = ViTImageProcessor(size={"height": own[0], "width": own[1]})
        notes = (
            f"`{directory}` has no `{PROCESSOR}`: images are resized to {taken}, with mean and"
            " deviation 0.5",
        )
    wide, high = (
        _fit(processor, np.zeros(shape, np.uint8)) for shape in ((64, 96, 3), (96, 64, 3))
    )
    if wide.shape != high.shape:
        raise DataError(f"the image processor of `{directory}` does not bring images to one size")
    size = wide.shape[:2]
    if list(size) != own and not _takes(model, size):
        raise DataError(
            f"the image processor of `{directory}` makes images of {size[0]} x {size[1]}, but the"
            f" model takes {taken}"
        )
    return ImageInput(processor, size), notes


def random_box(numbers: Sequence[float], height: int, width: int) -> Box:
    """A random part of an image, as torchvision's RandomResizedCrop takes it.

    Args:
        numbers: `BOX_NUMBERS` random numbers from 0 to 1.
        height: The image's.
        width: The image's.

    Returns:
        Left, top, right and bottom.
    """
    *tries, x, y = numbers
    for part, shape in zip(tries[::2], tries[1::2], strict=True):
        area = height * width * (_AREAS[0] + part * (_AREAS[1] - _AREAS[0]))
        ratio = _SHAPES[0] * (_SHAPES[1] / _SHAPES[0]) ** shape
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            # Any of the places; the numbers are below 1.
            left, top = int(x * (width - across + 1)), int(y * (height - down + 1))
            return left, top, left + across, top + down
    # The image is too long for these shapes: the most of its middle.
    across = min(width, round(height * _SHAPES[1]))
    down = min(height, round(width / _SHAPES[0]))
    left, top = (width - across) // 2, (height - down) // 2
    return left, top, left + across, top + down


def _read_processor(directory: Path) -> "BaseImageProcessor":
    from transformers import AutoImageProcessor

    try:
        # The slow processors need Pillow alone, the fast ones PyTorch.
        return AutoImageProcessor.from_pretrained(
            directory, use_fast=False, trust_remote_code=False
        )
    except (OSError, ValueError, ImportError) as error:
        raise DataError(
            f"cannot read the image processor of `{directory}`: {' '.join(str(error).split())}"
        ) from None


def _fit(processor: "BaseImageProcessor", image: np.ndarray) -> np.ndarray:
    return processor(image, **_BYTES)["pixel_values"][0]


def _takes(model: "FlaxPreTrainedModel", size: tuple[int, int]) -> bool:
    """Whether a model takes another size than its own, as DINOv2 does."""
    pixels = jnp.zeros((1, 3, *size))
    try:
        jax.eval_shape(lambda params: model(pixels, params=params).logits, model.params_shape_tree)
    except (TypeError, ValueError):
        return False
    return True
