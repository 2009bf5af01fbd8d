"""Pixel values as image processors make them, and random parts as torchvision takes them."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from transformers import (
    AutoImageProcessor,
    BeitImageProcessor,
    BitImageProcessor,
    Dinov2Config,
    FlaxDinov2ForImageClassification,
    FlaxViTForImageClassification,
    ViTConfig,
    ViTImageProcessor,
)

from train.tasks.image_input import BOX_NUMBERS, PROCESSOR, random_box, read_input
from train.tasks.records import DataError

SMALL = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "patch_size": 7,
}
SQUARE, LARGER = {"height": 28, "width": 28}, {"height": 32, "width": 32}
PROCESSORS = {
    "vit": ViTImageProcessor(size=SQUARE),
    "vit-bicubic-imagenet": ViTImageProcessor(
        size=SQUARE, resample=3, image_mean=[0.48, 0.46, 0.4], image_std=[0.23, 0.22, 0.21]
    ),
    "beit": BeitImageProcessor(size=LARGER, crop_size=SQUARE, do_center_crop=True),
    "dinov2": BitImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE),
    "crop alone": BitImageProcessor(do_resize=False, crop_size=SQUARE),
    "neither scaled nor normalised": ViTImageProcessor(
        size=SQUARE, do_rescale=False, do_normalize=False
    ),
}


def vit(**changes) -> FlaxViTForImageClassification:
    return FlaxViTForImageClassification(
        ViTConfig(**SMALL, image_size=28, **changes), _do_init=False
    )


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)


@pytest.mark.parametrize("shape", [(28, 28), (40, 60), (61, 33), (8, 8), (20, 90)])
@pytest.mark.parametrize("name", PROCESSORS)
def test_pixel_values_are_the_processors(name, shape, tmp_path):
    PROCESSORS[name].save_pretrained(tmp_path)
    found, notes = read_input(tmp_path, vit())
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
    expected = AutoImageProcessor.from_pretrained(tmp_path, use_fast=False)(
        image, input_data_format="channels_last", return_tensors="np"
    )["pixel_values"]
    values = np.asarray(found.pixel_values(jnp.asarray(found.fit(image)[None])))
    assert values.dtype == np.float32 and not notes
    np.testing.assert_allclose(values, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "keeps"), [("vit", True), ("crop alone", True), ("beit", False), ("dinov2", False)]
)
def test_images_of_the_inputs_size_are_kept_where_the_processor_keeps_them(name, keeps, tmp_path):
    PROCESSORS[name].save_pretrained(tmp_path)
    found, _ = read_input(tmp_path, vit())
    assert (found.keeps((28, 28)), found.keeps((28, 27))) == (keeps, False)


def test_old_files_of_feature_extractors(tmp_path, image):
    old = {"feature_extractor_type": "ViTFeatureExtractor", "do_resize": True, "size": 28}
    (tmp_path / PROCESSOR).write_text(json.dumps({**old, "do_normalize": True, "resample": 2}))
    found, _ = read_input(tmp_path, vit())
    np.testing.assert_array_equal(
        found.fit(image), read_input(tmp_path / "none", vit())[0].fit(image)
    )


def test_without_a_file_the_model_decides(tmp_path, image):
    found, (note,) = read_input(tmp_path, vit())
    assert (
        f"has no `{PROCESSOR}`: images are resized to 28 x 28, with mean and deviation 0.5" in note
    )
    values = np.asarray(found.pixel_values(found.fit(image)[None]))
    np.testing.assert_allclose(
        values[0].transpose(1, 2, 0) * 127.5 + 127.5, found.fit(image), atol=0.01
    )


def test_a_model_may_take_other_sizes(tmp_path):
    config = Dinov2Config(**SMALL, image_size=35)
    PROCESSORS["dinov2"].save_pretrained(tmp_path)
    found, _ = read_input(tmp_path, FlaxDinov2ForImageClassification(config, _do_init=False))
    assert found.size == (28, 28)


@pytest.mark.parametrize(
    ("processor", "model", "message"),
    [
        (
            ViTImageProcessor(size={"height": 42, "width": 42}),
            {},
            "makes images of 42 x 42, but the model takes 28 x 28",
        ),
        (
            BitImageProcessor(size={"shortest_edge": 28}, do_center_crop=False),
            {},
            "does not bring images to one size",
        ),
        (ViTImageProcessor(size=SQUARE), {"num_channels": 1}, "takes images of 1 channels, not 3"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(processor, model, message, tmp_path):
    processor.save_pretrained(tmp_path)
    with pytest.raises(DataError, match=message):
        read_input(tmp_path, vit(**model))


@pytest.mark.parametrize("content", ["{", '{"image_processor_type": "NoImageProcessor"}'])
def test_a_file_that_cannot_be_read(content, tmp_path):
    (tmp_path / PROCESSOR).write_text(content)
    with pytest.raises(DataError, match="cannot read the image processor of") as error:
        read_input(tmp_path, vit())
    assert "\n" not in str(error.value)


class TestRandomBox:
    NUMBERS = np.random.default_rng(0).random((4000, BOX_NUMBERS), np.float32).tolist()

    @pytest.mark.parametrize(("height", "width"), [(100, 100), (300, 400), (31, 32), (1, 1)])
    def test_boxes_lie_within_the_image(self, height, width):
        for numbers in self.NUMBERS:
            left, top, right, bottom = random_box(numbers, height, width)
            assert 0 <= left < right <= width and 0 <= top < bottom <= height

    def test_areas_shapes_and_places(self):
        boxes = np.array([random_box(numbers, 1000, 1000) for numbers in self.NUMBERS])
        across, down = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
        areas, shapes = across * down / 1e6, across / down
        assert 0.079 < areas.min() < 0.09 and 0.98 < areas.max() <= 1
        # Below the mean of all areas, 0.54, since large ones are tried in vain more often.
        assert abs(areas.mean() - 0.478) < 0.012
        assert 0.745 < shapes.min() < 0.76 and 1.32 < shapes.max() < 1.34
        assert abs(np.log(shapes).mean()) < 0.01
        free = across < 900
        place = boxes[free, 0] / (1000 - across[free])
        assert place.min() < 0.01 and place.max() > 0.99 and abs(place.mean() - 0.5) < 0.02

    @pytest.mark.parametrize(
        ("height", "width", "expected"),
        [(30, 3000, (1480, 0, 1520, 30)), (3000, 30, (0, 1480, 30, 1520))],
    )
    def test_the_middle_of_long_images(self, height, width, expected):
        assert {random_box([0.99] * BOX_NUMBERS, height, width)} == {expected}

    def test_a_box_is_resized_as_a_cut_out_image(self, tmp_path, image):
        found, _ = read_input(tmp_path, vit())
        whole = found.resize(image, (0, 0, 60, 40))
        np.testing.assert_array_equal(whole, found.fit(image))
        cut = found.fit(image[5:30, 10:50]).astype(int)
        # Beyond the box the filter reads what there is; a cut-out image ends.
        assert np.abs(found.resize(image, (10, 5, 50, 30)) - cut)[2:-2, 2:-2].max() <= 1
