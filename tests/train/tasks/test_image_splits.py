"""Images from directories, arrays, the Hub and scikit-learn."""

import datasets
import numpy as np
import pytest
from PIL import Image

from train.config import ImagesConfig
from train.tasks.image_files import decode
from train.tasks.image_splits import load_splits
from train.tasks.records import DataError


def picture(number: int, mode: str = "RGB", size: tuple[int, int] = (6, 5)) -> Image.Image:
    """A picture that can be told by its first pixel."""
    return Image.new("RGB", size, (number, 255 - number, 7)).convert(mode)


def _fill(directory, counts: dict[str, int], end: str = "png") -> None:
    number = 0
    for name, count in counts.items():
        (directory / name).mkdir(parents=True)
        for _ in range(count):
            picture(number).save(directory / name / f"{number:03}.{end}")
            number += 1


def _load(root, **settings):
    return load_splits(ImagesConfig(root=str(root), **{"train": "train", **settings}))


class TestDirectories:
    def test_classes_are_directories(self, tmp_path):
        _fill(tmp_path / "train", {"dog": 10, "cat": 20})
        _fill(tmp_path / "test", {"cat": 3})
        splits = _load(tmp_path, test="test")
        assert splits.label_names == ("cat", "dog")
        assert {name: len(part) for name, part in splits.parts().items()} == {
            "train": 27,
            "validation": 3,
            "test": 3,
        }
        for i in range(len(splits.train)):
            assert (splits.train.images[i][0, 0, 0] < 10) == (splits.train.labels[i] == 1)
        assert splits.test.labels.tolist() == [0, 0, 0]

    def test_numbers_keep_their_order_and_images_may_lie_deeper(self, tmp_path):
        _fill(tmp_path / "train", {f"{i}/inner": 2 for i in (10, 9, 2)})
        splits = _load(tmp_path, validation="train")
        assert splits.label_names == ("2", "9", "10")
        assert (len(splits.train), splits.train.images[0].shape) == (6, (5, 6, 3))

    def test_chosen_classes_keep_their_order_and_others_are_counted(self, tmp_path):
        _fill(tmp_path / "train", {"ant": 4, "bee": 5, "cow": 6})
        splits = _load(tmp_path, validation="train", classes=("cow", "ant"))
        assert splits.label_names == ("cow", "ant")
        assert np.bincount(splits.train.labels).tolist() == [6, 4]
        assert "train: 5 of 15 images are of other classes (bee)" in splits.notes
        assert "validation: 5 of 15 images are of other classes (bee)" in splits.notes

    def test_files_that_are_no_images_are_named(self, tmp_path):
        _fill(tmp_path / "train", {"a": 9, "b": 9})
        (tmp_path / "train/a/notes.txt").write_text("x")
        file = tmp_path / "train/a/notes.txt"
        assert f"left out, as no images by their names: {file}" in _load(tmp_path).notes

    def test_broken_files_are_refused_or_left_out(self, tmp_path):
        _fill(tmp_path / "train", {"a": 4, "b": 4})
        whole = (tmp_path / "train/a/001.png").read_bytes()
        (tmp_path / "train/a/001.png").write_bytes(whole[: len(whole) // 2])
        (tmp_path / "train/b/005.png").write_bytes(b"")
        with pytest.raises(DataError, match=r"001\.png` \(and 1 more\) cannot be read as an image"):
            _load(tmp_path, validation="train")
        splits = _load(tmp_path, validation="train", broken="skip")
        assert (len(splits.train), len(splits.validation)) == (6, 6)
        (note,) = [n for n in splits.notes if n.startswith("train: 2 of 8 images cannot be read")]
        assert "001.png" in note and "005.png" in note
        assert {splits.train.images[i][0, 0, 0] for i in range(6)} == {0, 2, 3, 4, 6, 7}

    @pytest.mark.parametrize(("mode", "end"), [("I;16", "png"), ("F", "tiff"), ("I", "tiff")])
    def test_deep_images_are_refused_by_name(self, tmp_path, mode, end):
        _fill(tmp_path / "train", {"a": 2, "b": 2})
        Image.new(mode, (4, 4)).save(tmp_path / f"train/b/deep.{end}")
        with pytest.raises(DataError, match=rf"deep\.{end}` has the mode {mode}; images must have"):
            _load(tmp_path, validation="train", broken="skip")

    @pytest.mark.parametrize(
        ("counts", "settings", "message"),
        [
            ({"a": 2}, {}, "has images of the class 'a' alone"),
            ({"a": 2, "b": 0}, {}, "b` has no images"),
            ({}, {}, "has no directories, one for each class"),
            ({"a": 2, "b": 2}, {"classes": ("a", "c")}, "no images of the class 'c'"),
            ({"a": 2, "b": 2}, {"validation": "other"}, "classes that the training split lacks: c"),
            ({"a": 2, "b": 2}, {"validation": "none"}, "none` must be a directory with one"),
            (
                {"a": 2, "b": 2},
                {"validation": "other", "classes": ("a", "b")},
                "other` has no images of the classes in `images.classes`",
            ),
        ],
    )
    def test_what_does_not_fit_is_one_sentence(self, tmp_path, counts, settings, message):
        (tmp_path / "train").mkdir()
        _fill(tmp_path / "train", counts)
        _fill(tmp_path / "other", {"c": 1})
        with pytest.raises(DataError) as error:
            _load(tmp_path, **settings)
        assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_mode_of_eight_bits_becomes_rgb(tmp_path, mode):
    end = "tiff" if mode == "CMYK" else "png"
    original = picture(40, mode)
    original.save(tmp_path / f"x.{end}")
    pixels = decode(tmp_path / f"x.{end}", "x")
    assert (pixels.shape, pixels.dtype) == ((5, 6, 3), np.uint8)
    np.testing.assert_array_equal(pixels, np.asarray(original.convert("RGB")))


@pytest.mark.filterwarnings("error")
def test_transparent_palettes_and_turned_photographs(tmp_path):
    picture(40, "P").save(tmp_path / "p.png", transparency=bytes([0, 9]))
    assert decode(tmp_path / "p.png", "p").shape == (5, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be seen turned by a quarter
    picture(40).save(tmp_path / "x.jpg", exif=exif)
    assert decode(tmp_path / "x.jpg", "x").shape == (6, 5, 3)


class TestArrays:
    RNG = np.random.default_rng(0)
    IMAGES = RNG.integers(0, 256, (20, 4, 5, 3), np.uint8)

    @pytest.mark.parametrize("labels", [np.arange(20) % 2 + 8, np.array(["no", "yes"] * 10)])
    @pytest.mark.parametrize("grey", [False, True])
    def test_images_and_labels(self, tmp_path, labels, grey):
        images = self.IMAGES[..., 0] if grey else self.IMAGES
        np.savez(tmp_path / "t.npz", images=images, labels=labels)
        splits = _load(tmp_path, train="t.npz", validation="t.npz")
        assert splits.label_names == tuple(map(str, sorted(set(labels.tolist()))))
        assert splits.train.labels.tolist() == [0, 1] * 10
        expected = np.repeat(images[..., None], 3, -1) if grey else images
        np.testing.assert_array_equal(splits.train.images[np.arange(20)], expected)

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"images": IMAGES}, "must hold the arrays `images` and `labels`; it holds images"),
            ({"images": IMAGES / 255, "labels": np.arange(20)}, "must be uint8 of the shape (N,"),
            ({"images": IMAGES[..., :2], "labels": np.arange(20)}, "not uint8 (20, 4, 5, 2)"),
            ({"images": IMAGES, "labels": np.arange(19)}, "must be 20 whole numbers or names"),
            ({"images": IMAGES, "labels": np.arange(20.0)}, "not float64 (20,)"),
            ({"images": IMAGES, "labels": np.array([None] * 20)}, "allow_pickle=False"),
            ({"images": IMAGES[:0], "labels": np.arange(0)}, "holds no images"),
        ],
    )
    def test_what_does_not_fit_is_one_sentence(self, tmp_path, arrays, message):
        np.savez(tmp_path / "t.npz", **arrays)
        with pytest.raises(DataError) as error:
            _load(tmp_path, train="t.npz")
        assert message in str(error.value) and "\n" not in str(error.value)

    def test_damaged_file(self, tmp_path):
        (tmp_path / "t.npz").write_bytes(b"PK\x03\x04damaged")
        with pytest.raises(DataError, match=r"cannot read `.*t\.npz`"):
            _load(tmp_path, train="t.npz")


def test_digits_need_no_download_and_have_a_fixed_test_part():
    splits = load_splits(ImagesConfig(dataset="digits"))
    assert [len(part) for part in splits.parts().values()] == [1293, 144, 360]
    assert splits.label_names == tuple("0123456789")
    assert splits.train.images[0].shape == (8, 8, 3)
    assert splits.train.images[np.arange(99)].max() == 255
    assert np.ptp(np.bincount(splits.test.labels)) <= 2
    again = load_splits(ImagesConfig(dataset="digits", split_seed=1))
    np.testing.assert_array_equal(again.test.images.pixels, splits.test.images.pixels)


class TestHub:
    CLASSES = datasets.ClassLabel(names=["zebra", "ape", "fish"])

    @pytest.fixture
    def hub(self, monkeypatch):
        """Stands in for the Hub with the dataset put into it, split by split."""
        stored = datasets.DatasetDict()
        monkeypatch.setattr(datasets, "load_dataset", lambda name: stored)
        return stored

    def _rows(self, labels: list, kind=CLASSES) -> datasets.Dataset:
        columns = {"img": [picture(i) for i in range(len(labels))], "c": labels}
        features = datasets.Features({"img": datasets.Image(), "c": kind})
        return datasets.Dataset.from_dict(columns, features=features)

    def _load(self, **settings):
        return load_splits(ImagesConfig(dataset="some/set", image="img", label="c", **settings))

    def test_official_splits(self, hub):
        hub["train"] = self._rows([0, 1] * 20)
        hub["test"] = self._rows([1, 0])
        hub["extra"] = self._rows([1])
        splits = self._load(max_train_examples=10)
        assert splits.label_names == ("ape", "zebra")
        assert [len(part) for part in splits.parts().values()] == [10, 4, 2]
        for i in range(10):
            assert splits.train.images[i][0, 0, 0] % 2 == 1 - splits.train.labels[i]
        assert "split `extra` of `some/set` is not used" in splits.notes

    def test_names_and_numbers_as_labels(self, hub):
        hub["train"] = hub["validation"] = self._rows([7, 11] * 3, datasets.Value("int64"))
        assert self._load().label_names == ("7", "11")
        hub["train"] = hub["validation"] = self._rows(["x", "y"] * 3, datasets.Value("string"))
        assert self._load().label_names == ("x", "y")

    def test_hidden_labels(self, hub):
        hub["train"] = hub["validation"] = self._rows([0, 1, 2])
        hub["test"] = self._rows([-1, -1])
        splits = self._load()
        assert splits.test is None
        assert "split `test` of `some/set` is not used, as labels are hidden" in splits.notes

    def test_broken_images_are_named_by_their_row(self, hub):
        rows = [{"bytes": b"no image", "path": None} if i == 3 else picture(i) for i in range(6)]
        columns = {"img": rows, "c": [0, 1] * 3}
        features = datasets.Features({"img": datasets.Image(), "c": self.CLASSES})
        hub["train"] = datasets.Dataset.from_dict(columns, features=features)
        hub["validation"] = self._rows([0])
        with pytest.raises(DataError, match="row 3 of split `train` of `some/set` cannot be read"):
            self._load()
        assert len(self._load(broken="skip").train) == 5

    @pytest.mark.parametrize(
        ("labels", "kind", "message"),
        [
            ([0, -1], CLASSES, "split `train` of `some/set` has images without a label"),
            ([0.5, 1.0], datasets.Value("float32"), "holds neither classes nor names"),
        ],
    )
    def test_labels_that_do_not_fit(self, hub, labels, kind, message):
        hub["train"] = self._rows(labels, kind)
        with pytest.raises(DataError, match=message):
            self._load()

    def test_columns_and_splits_that_do_not_fit(self, hub):
        hub["test"] = self._rows([0, 1])
        with pytest.raises(DataError, match="has no split `train`, but test"):
            self._load()
        hub["train"] = hub["test"].rename_column("img", "picture")
        with pytest.raises(DataError, match="has no column `img`, but picture, c"):
            self._load()
        hub["train"] = hub["test"].remove_columns("img").add_column("img", ["a", "b"])
        with pytest.raises(
            DataError, match=r"column `img` of split `train` .* does not hold images"
        ):
            self._load()

    def test_no_connection(self, monkeypatch):
        def load_dataset(name):
            raise ConnectionError("no route\nto the Hub")

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        with pytest.raises(DataError, match="cannot load the dataset `some/set` from the Hub: no"):
            self._load()
