"""Images with classes: from directories, arrays, the Hub and scikit-learn to splits."""

import os
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from train.config import DIGITS, ImagesConfig
from train.tasks.hub import load_dataset
from train.tasks.image_files import Arrays, Files, ImageSource, Rows, find_broken
from train.tasks.records import DataError
from train.tasks.splits import Given, Splits, complete, listed, sorted_names

if TYPE_CHECKING:
    import datasets

_SPLITS = ("train", "validation", "test")
_HIDDEN = ""


@dataclass(frozen=True)
class Split:
    """Images with classes.

    Attributes:
        images: The images, of any size.
        labels: Class indices (int32).
    """

    images: ImageSource
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> "Split":
        """The examples at these positions."""
        return Split(self.images.take(indices), self.labels[indices])


@dataclass(frozen=True)
class _Labelled:
    """Images with the names of their classes, and what to call them in messages."""

    name: str
    images: ImageSource
    labels: np.ndarray


def load_splits(config: ImagesConfig) -> Splits[Split]:
    """Reads which images there are, and those in files once, to find broken ones.

    Args:
        config: Where they are.

    Returns:
        The splits. Without a validation split, it is held out from the training split.

    Raises:
        DataError: If a file or dataset is missing, empty or unreadable, or an image or a label
            does not fit.
    """
    if config.dataset == DIGITS:
        sources, notes = _read_digits()
    elif config.dataset is not None:
        sources, notes = _read_hub(config.dataset, config)
    else:
        sources, notes = _read_local(config)
    names = _class_names(sources["train"], config)
    given = {name: _choose(name, part, names, config, notes) for name, part in sources.items()}
    splits = complete(
        Given(*(given.get(name) for name in _SPLITS), label_names=names, notes=tuple(notes)), config
    )
    return _without_broken(splits, config)


def _class_names(train: _Labelled, config: ImagesConfig) -> tuple[str, ...]:
    found = sorted_names(train.labels.tolist())
    for name in config.classes or ():
        if name not in found:
            raise DataError(
                f"{train.name} has no images of the class {name!r} in `images.classes`; it has"
                f" {listed(found)}"
            )
    if len(found) < 2:
        raise DataError(f"{train.name} has images of the class {found[0]!r} alone")
    return config.classes or found


def _choose(
    name: str, source: _Labelled, names: tuple[str, ...], config: ImagesConfig, notes: list[str]
) -> Split:
    """Takes the images of the classes in use; others are an error unless classes were chosen."""
    index = {label: i for i, label in enumerate(names)}
    labels = np.asarray([index.get(label, -1) for label in source.labels.tolist()], np.int32)
    kept = np.flatnonzero(labels >= 0)
    others = listed(sorted_names(source.labels[labels < 0].tolist()))
    if len(kept) == len(labels):
        return Split(source.images, labels)
    if config.classes is None:
        raise DataError(f"{source.name} has classes that the training split lacks: {others}")
    if not len(kept):
        raise DataError(f"{source.name} has no images of the classes in `images.classes`")
    left = len(labels) - len(kept)
    notes.append(f"{name}: {left} of {len(labels)} images are of other classes ({others})")
    return Split(source.images.take(kept), labels[kept])


def _without_broken(splits: Splits[Split], config: ImagesConfig) -> Splits[Split]:
    """Refuses images that cannot be read, or leaves them out."""
    parts, notes = splits.parts(), []
    for name, split in parts.items():
        images = split.images
        broken = {} if isinstance(images, Arrays) else find_broken(images)
        if not broken:
            continue
        first, why = next(iter(broken.items()))
        if config.broken == "refuse":
            more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
            raise DataError(
                f"{images.name(first)}{more} cannot be read as an image: {why};"
                " `images.broken` skip leaves such files out"
            )
        if len(broken) == len(split):
            raise DataError(f"{name}: no image can be read, such as {images.name(first)}: {why}")
        named = listed([images.name(index) for index in broken], 3)
        notes.append(f"{name}: {len(broken)} of {len(split)} images cannot be read: {named}")
        parts[name] = split.take(np.setdiff1d(np.arange(len(split)), list(broken)))
    return replace(splits, **parts, notes=(*splits.notes, *notes))


def _read_local(config: ImagesConfig) -> tuple[dict[str, _Labelled], list[str]]:
    sources, notes = {}, []
    for name in _SPLITS:
        given = getattr(config, name)
        if given is None:
            continue
        path = Path(config.root or ".", given)
        if path.is_dir():
            sources[name] = _read_directory(path, notes)
        elif path.suffix == ".npz":
            sources[name] = _read_arrays(path)
        else:
            raise DataError(
                f"`{path}` must be a directory with one directory of images for each class, or an"
                " .npz file"
            )
    return sources, notes


def _read_directory(path: Path, notes: list[str]) -> _Labelled:
    formats = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    paths, labels, others = [], [], []
    for directory in sorted(each for each in path.iterdir() if each.is_dir()):
        # At any depth, as torchvision's ImageFolder does.
        walk = os.walk(directory)
        files = sorted(os.path.join(folder, file) for folder, _, files in walk for file in files)
        found = [file for file in files if os.path.splitext(file)[1].lower() in formats]
        if not found:
            raise DataError(f"`{directory}` has no images")
        others += sorted(set(files) - set(found))
        paths += map(Path, found)
        labels += [directory.name] * len(found)
    if not paths:
        raise DataError(f"`{path}` has no directories, one for each class")
    if others:
        notes.append(f"left out, as no images by their names: {listed(others, 3)}")
    return _Labelled(f"`{path}`", Files(tuple(paths)), np.asarray(labels))


def _read_arrays(path: Path) -> _Labelled:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = arrays.files
            images, labels = arrays["images"], arrays["labels"]
    except KeyError:
        raise DataError(
            f"`{path}` must hold the arrays `images` and `labels`; it holds {listed(names)}"
        ) from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"cannot read `{path}`: {' '.join(str(error).split())}") from None
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in ((), (3,)):
        raise DataError(
            f"`images` in `{path}` must be uint8 of the shape (N, height, width, 3) or (N, height,"
            f" width), not {images.dtype} {images.shape}"
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iuU":
        raise DataError(
            f"`labels` in `{path}` must be {len(images)} whole numbers or names, one for each"
            f" image, not {labels.dtype} {labels.shape}"
        )
    if not images.size:
        raise DataError(f"`{path}` holds no images")
    return _Labelled(f"`{path}`", Arrays(images), labels.astype(str))


def _read_digits() -> tuple[dict[str, _Labelled], list[str]]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    # Their 17 shades are 0 to 16.
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(str)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels
    )
    sources = {
        name: _Labelled(f"the {name} part of the digits", Arrays(pixels[part]), labels[part])
        for name, part in (("train", np.sort(train)), ("test", np.sort(test)))
    }
    return sources, [f"test: {len(test)} of {len(labels)} digits, always the same"]


def _read_hub(name: str, config: ImagesConfig) -> tuple[dict[str, _Labelled], list[str]]:
    dataset = load_dataset(f"the dataset `{name}`", name)
    if "train" not in dataset:
        raise DataError(f"the dataset `{name}` has no split `train`, but {listed(list(dataset))}")
    sources, notes = {}, []
    for split, rows in dataset.items():
        source = _read_rows(rows, f"split `{split}` of `{name}`", config)
        if split not in _SPLITS:
            notes.append(f"{source.name} is not used")
        elif _HIDDEN not in source.labels:
            sources[split] = source
        elif split != "train":
            notes.append(f"{source.name} is not used, as labels are hidden")
        else:
            raise DataError(f"{source.name} has images without a label")
    return sources, notes


def _read_rows(rows: "datasets.Dataset", name: str, config: ImagesConfig) -> _Labelled:
    import datasets

    for column in (config.image, config.label):
        if column not in rows.features:
            raise DataError(f"{name} has no column `{column}`, but {listed(list(rows.features))}")
    if not isinstance(rows.features[config.image], datasets.Image):
        raise DataError(f"column `{config.image}` of {name} does not hold images")
    labels, kind = np.asarray(rows[config.label]), rows.features[config.label]
    if labels.dtype.kind not in "iuU" or labels.ndim != 1:
        raise DataError(f"column `{config.label}` of {name} holds neither classes nor names")
    if isinstance(kind, datasets.ClassLabel):
        # A dataset's sign of a hidden label is -1, which takes the last name here.
        labels = np.asarray([*kind.names, _HIDDEN])[labels]
    # The files as they are: they are decoded in threads, when they are asked for.
    files = rows.select_columns([config.image]).cast_column(
        config.image, datasets.Image(decode=False)
    )
    return _Labelled(name, Rows(files, np.arange(len(rows)), name), labels.astype(str))
