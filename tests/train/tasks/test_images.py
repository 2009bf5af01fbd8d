"""Batches of images."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import ViTImageProcessor

from train.config import Config, ImagesConfig, ModelConfig, OptimConfig
from train.tasks.image_files import Arrays, Files
from train.tasks.image_input import ImageInput
from train.tasks.image_splits import Split
from train.tasks.images import Images

SIZE = (12, 10)
COUNT, BATCH = 23, 4
PIXELS = np.random.default_rng(0).integers(0, 256, (COUNT, *SIZE, 3), np.uint8)
LABELS = np.arange(COUNT, dtype=np.int32)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    directory = tmp_path_factory.mktemp("images")
    paths = tuple(directory / f"{i}.png" for i in range(COUNT))
    for path, pixels in zip(paths, PIXELS, strict=True):
        Image.fromarray(pixels).save(path)
    return Files(paths)


def images(source, *augment: str, size: tuple[int, int] = SIZE) -> Images:
    """A workload of these images, whose labels are their numbers."""
    config = Config(
        ModelConfig("model"),
        images=ImagesConfig(train="x", augment=augment),
        optim=OptimConfig(batch_size=BATCH, eval_batch_size=BATCH),
    )
    processor = ViTImageProcessor(size={"height": size[0], "width": size[1]})
    split = Split(source, LABELS)
    parts = {"train": split, "validation": split}
    return Images(config, parts, (), ImageInput(processor, size), ())


def rows(batches) -> dict[int, np.ndarray]:
    """The images of batches by their labels; each must be there once."""
    found = {}
    for batch in batches:
        for image, label, weight in zip(
            *(batch[k] for k in ("images", "labels", "weights")), strict=True
        ):
            assert weight == 0 or int(label) not in found
            found[int(label)] = image
    return found


@pytest.mark.parametrize("in_files", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_every_image_once_as_it_is(in_files, training, files):
    workload = images(files if in_files else Arrays(PIXELS))
    batches = workload.train_batches(0, 0) if training else workload.eval_batches("validation")
    for number, batch in enumerate(batches):
        assert (batch["images"].shape, batch["images"].dtype) == ((BATCH, *SIZE, 3), np.uint8)
        assert (batch["labels"].dtype, batch["weights"].dtype) == (np.int32, np.float32)
        assert workload.size(batch) == (BATCH if number < 5 else COUNT - 5 * BATCH)
    found = rows(batches)
    assert len(batches) == 6
    np.testing.assert_array_equal(np.stack([found[i] for i in range(COUNT)]), PIXELS)
    assert (list(found) == list(range(COUNT))) == (not training)


@pytest.mark.parametrize("size", [SIZE, (8, 8)])
def test_half_of_the_images_are_mirrored(size, files):
    plain = rows(images(files, size=size).train_batches(3, 1))
    mirrored = 0
    for i, image in rows(images(files, "flip", size=size).train_batches(3, 1)).items():
        turned = not np.array_equal(image, plain[i])
        np.testing.assert_array_equal(image, plain[i][:, ::-1] if turned else plain[i])
        mirrored += turned
    assert 5 < mirrored < COUNT - 5


def test_files_and_arrays_give_the_same_random_parts(files):
    for augment in (("crop",), ("crop", "flip")):
        left = rows(images(files, *augment).train_batches(1, 2))
        right = rows(images(Arrays(PIXELS), *augment).train_batches(1, 2))
        assert all(np.array_equal(left[i], right[i]) for i in range(COUNT))
        assert sum(np.array_equal(left[i], PIXELS[i]) for i in range(COUNT)) < 5


def test_random_parts_depend_on_seed_epoch_and_example_alone():
    workload = images(Arrays(PIXELS), "crop", "flip")
    whole = rows(workload.train_batches(1, 2))
    for begin in (1, 4):
        for i, image in rows(workload.train_batches(1, 2)[begin:]).items():
            np.testing.assert_array_equal(image, whole[i])
    larger = dataclasses.replace(workload.config.optim, batch_size=COUNT)
    other = dataclasses.replace(workload, config=dataclasses.replace(workload.config, optim=larger))
    assert all(
        np.array_equal(image, whole[i]) for i, image in rows(other.train_batches(1, 2)).items()
    )
    for seed, epoch in ((1, 3), (2, 2)):
        changed = rows(workload.train_batches(seed, epoch))
        assert not any(np.array_equal(changed[i], whole[i]) for i in range(COUNT))


def test_evaluation_has_no_random_parts():
    found = rows(images(Arrays(PIXELS), "crop", "flip").eval_batches("validation"))
    np.testing.assert_array_equal(np.stack([found[i] for i in range(COUNT)]), PIXELS)


def test_a_file_that_vanished_is_an_error_of_its_batch(files):
    gone = Files((*files.paths[:5], Path("gone.png"), *files.paths[6:]))
    batches = iter(images(gone).eval_batches("validation"))
    next(batches)
    with pytest.raises(FileNotFoundError):
        next(batches)
