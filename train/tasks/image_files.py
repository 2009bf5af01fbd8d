"""Images in memory, in files and in datasets, each read when it is asked for."""

import functools
import io
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol, Self, TypeVar

import numpy as np
from PIL import Image, ImageOps

from train.processes import console
from train.progress import Display
from train.tasks.records import DataError

if TYPE_CHECKING:
    import datasets

T = TypeVar("T")

# Modes of 8 bits that have a colour for every pixel.
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
# What Pillow raises for files that it cannot make an image of.
_BROKEN = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)
# How many images a thread takes at a time.
_PART = 8


class ImageSource(Protocol):
    """Images that are read when they are asked for."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, index: int) -> np.ndarray:
        """An image: (height, width, 3), uint8."""

    def take(self, indices: np.ndarray) -> Self:
        """The images at these positions."""


@dataclass(frozen=True)
class Arrays:
    """Images of one size, in memory.

    Attributes:
        pixels: (images, height, width, 3), or without the last axis for grey ones; uint8.
    """

    pixels: np.ndarray

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int | np.ndarray) -> np.ndarray:
        chosen = self.pixels[index]
        return chosen if self.pixels.ndim == 4 else np.repeat(chosen[..., None], 3, axis=-1)

    def take(self, indices: np.ndarray) -> "Arrays":
        """The images at these positions."""
        return Arrays(self.pixels[indices])


@dataclass(frozen=True)
class Files:
    """Images in files.

    Attributes:
        paths: The files.
    """

    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        return decode(self.paths[index], self.name(index))

    def take(self, indices: np.ndarray) -> "Files":
        """The images at these positions."""
        return Files(tuple(self.paths[i] for i in indices))

    def name(self, index: int) -> str:
        """What an image is called in messages."""
        return f"`{self.paths[index]}`"


@dataclass(frozen=True)
class Rows:
    """Images of a dataset of Hugging Face.

    Attributes:
        dataset: Its one column has the contents of the images' files.
        numbers: The rows to take.
        of: What to call the dataset in messages.
    """

    dataset: "datasets.Dataset"
    numbers: np.ndarray
    of: str

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> np.ndarray:
        (content,) = self.dataset[int(self.numbers[index])].values()
        if content is None:
            raise OSError("there is none")
        file = content["path"] if content["bytes"] is None else io.BytesIO(content["bytes"])
        return decode(file, self.name(index))

    def take(self, indices: np.ndarray) -> "Rows":
        """The images at these positions."""
        return replace(self, numbers=self.numbers[indices])

    def name(self, index: int) -> str:
        """What an image is called in messages."""
        return f"row {self.numbers[index]} of {self.of}"


def decode(file: str | Path | BinaryIO, name: str) -> np.ndarray:
    """Reads an image in colour: grey, palettes and CMYK become RGB, and transparency is dropped.

    Args:
        file: A file in one of the formats that Pillow knows.
        name: What to call it in messages.

    Returns:
        (height, width, 3), uint8, turned as the file says that it is to be seen.

    Raises:
        DataError: If pixels have more than 8 bits, or another meaning.
        OSError, ValueError, SyntaxError, EOFError: If the file is broken.
    """
    with Image.open(file) as image:
        if image.mode not in _MODES:
            raise DataError(
                f"{name} has the mode {image.mode}; images must have 8 bits a channel, as RGB"
                " or grey"
            )
        turned = ImageOps.exif_transpose(image)
        if turned.mode == "P" and "transparency" in turned.info:
            # Pillow warns where transparency is dropped in one step.
            turned = turned.convert("RGBA")
        return np.asarray(turned.convert("RGB"))


def find_broken(images: Files | Rows) -> dict[int, str]:
    """Reads every image once.

    Args:
        images: The images.

    Returns:
        The position of each that cannot be read, and why.

    Raises:
        DataError: If pixels have more than 8 bits, or another meaning.
    """

    def problem(index: int) -> str | None:
        try:
            images[index]
        except DataError:
            raise
        except _BROKEN as error:
            return " ".join(str(error).split())
        return None

    found = in_threads(problem, range(len(images)))
    with Display(console()) as display:
        problems = list(display.track(found, len(images), "checking image"))
    return {index: why for index, why in enumerate(problems) if why is not None}


def in_threads(function: Callable[[int], T], indices: Sequence[int]) -> Iterator[T]:
    """Calls a function in several threads, since Pillow leaves Python free while it works.

    Args:
        function: The function.
        indices: What to call it with.

    Yields:
        What it returns, in the order of the indices.
    """

    def several(part: Sequence[int]) -> list[T]:
        return [function(index) for index in part]

    parts = [indices[start : start + _PART] for start in range(0, len(indices), _PART)]
    for results in _pool().map(several, parts):
        yield from results


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor()
