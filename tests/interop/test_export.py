"""Writing: what is refused, and that a failure leaves nothing behind."""

from pathlib import Path

import numpy as np
import pytest

from circflax.interop import CheckpointError, export_merged, load_model
from circflax.interop import _write as write_module
from tests.architectures import architecture

QUERY = ("bert", "encoder", "layer", "0", "attention", "self", "query", "kernel")


@pytest.fixture(scope="module")
def base(checkpoint) -> Path:
    return checkpoint("bert")


@pytest.fixture(scope="module")
def model(base: Path):
    return load_model(base, "sequence-classification")[0]


def unchanged(leaf: np.ndarray) -> np.ndarray:
    return leaf


def fail(leaf: np.ndarray) -> np.ndarray:
    raise RuntimeError("out of luck")


@pytest.mark.parametrize(
    ("changes", "added", "message"),
    [
        ({("bert", "query"): unchanged}, {}, "The base holds no leaf `bert/query` to change"),
        ({}, {("head",): np.ones(3)}, "`FlaxBertForSequenceClassification` has no leaf `head`"),
        ({}, {("classifier", "bias"): np.ones(3)}, "already holds `classifier/bias`"),
        ({QUERY: lambda leaf: leaf[1:]}, {}, r"made float32\(32, 32\) into float32\(31, 32\)"),
        ({QUERY: lambda leaf: leaf.astype("f2")}, {}, "into float16"),
        (
            {QUERY: lambda leaf: leaf + np.float32("nan")},
            {},
            "query/kernel` holds values that are not",
        ),
    ],
)
def test_refusals(base, model, tmp_path, changes, added, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        export_merged(base, tmp_path / "out", model, changes, added)
    assert not list(tmp_path.iterdir())


def test_failures_leave_nothing(base, model, tmp_path, monkeypatch) -> None:
    with pytest.raises(RuntimeError, match="out of luck"):
        export_merged(base, tmp_path / "out", model, {QUERY: fail}, max_shard_size="10KB")
    assert not list(tmp_path.iterdir())

    def no_space(file, tensors) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(write_module, "write_safetensors", no_space)
    with pytest.raises(OSError, match="No space left"):
        export_merged(base, tmp_path / "out", model, {})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not list((tmp_path / "out").iterdir())


def test_output_directory(base, model, tmp_path) -> None:
    export_merged(base, tmp_path / "some" / "where", model, {})
    assert [path.name for path in (tmp_path / "some").iterdir()] == ["where"]
    with pytest.raises(CheckpointError, match="is not an empty directory"):
        export_merged(base, tmp_path / "some" / "where", model, {})
    (tmp_path / "empty").mkdir()
    export_merged(base, tmp_path / "empty", model, {})
    assert (tmp_path / "empty" / "model.safetensors").is_file()


def test_shard_sizes(base, model, tmp_path) -> None:
    for name, size in (("text", "20KB"), ("number", 20_000)):
        export_merged(base, tmp_path / name, model, {}, max_shard_size=size)
    names = [
        sorted(file.name for file in (tmp_path / name).iterdir()) for name in ("text", "number")
    ]
    assert names[0] == names[1]
    with pytest.raises(ValueError, match="20 kilos"):
        export_merged(base, tmp_path / "out", model, {}, max_shard_size="20 kilos")


def test_only_one_tensor_is_held(base, model, tmp_path, monkeypatch) -> None:
    """Data is asked for tensor by tensor, in the order it is written."""
    written: list[int] = []
    write = write_module.write_safetensors

    def watched(file, tensors) -> None:
        def count(tensor):
            def data():
                written.append(Path(file).stat().st_size)
                return tensor.data()

            return data

        write(
            file,
            {
                name: type(tensor)(tensor.dtype, tensor.shape, tensor.nbytes, count(tensor))
                for name, tensor in tensors.items()
            },
        )

    monkeypatch.setattr(write_module, "write_safetensors", watched)
    export_merged(base, tmp_path / "out", model, {QUERY: unchanged})
    assert written == sorted(written)
    assert len(set(written)) > 2


def test_leaf_that_is_missing_must_be_added(tmp_path) -> None:
    oracle = pytest.importorskip("tests.interop.oracle", exc_type=ImportError)
    entry = architecture("bert")
    base = oracle.save(oracle.torch_model(entry, torch_class="BertModel"), tmp_path / "base")
    model, params, _ = load_model(base, entry.head)
    with pytest.raises(
        CheckpointError, match="The base lacks `classifier/bias`; pass it in `added`"
    ):
        export_merged(base, tmp_path / "out", model, {})
    head = {("classifier", name): leaf for name, leaf in params["classifier"].items()}
    wrong = head | {("classifier", "bias"): np.ones(4)}
    with pytest.raises(CheckpointError, match=r"has the shape \(4,\), but .* needs \(3,\)"):
        export_merged(base, tmp_path / "out", model, {}, wrong)
    infinite = head | {("classifier", "bias"): np.full(3, np.inf)}
    with pytest.raises(CheckpointError, match="`classifier/bias` holds values that are not finite"):
        export_merged(base, tmp_path / "out", model, {}, infinite)
