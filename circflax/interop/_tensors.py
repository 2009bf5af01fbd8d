"""The tensors of a checkpoint directory: found by their headers, read and written one at a time."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from flax.serialization import msgpack_restore
from flax.traverse_util import flatten_dict
from safetensors import SafetensorError, safe_open

LeafPath = tuple[str, ...]

SAFETENSORS = "model.safetensors"
MSGPACK = "flax_model.msgpack"

_DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "U16": np.uint16,
        "I16": np.int16,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "U32": np.uint32,
        "I32": np.int32,
        "F32": np.float32,
        "U64": np.uint64,
        "I64": np.int64,
        "F64": np.float64,
        "C64": np.complex64,
    }.items()
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, does not fit its model, or cannot be written as asked."""


@dataclass(frozen=True)
class Tensor:
    """A tensor whose bytes are produced when asked for.

    Attributes:
        dtype: The type's name in the safetensors format, such as `"BF16"`.
        shape: The shape as stored.
        nbytes: The number of bytes `data` returns.
        data: Returns the elements in row-major order, as a flat array of bytes; where they lie in a
            file, a view of it that reads what is looked at.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    data: Callable[[], np.ndarray]

    @classmethod
    def of(cls, array: np.ndarray) -> "Tensor":
        """Wraps an array in memory."""
        array = np.asarray(array)
        if array.dtype not in _NAMES:
            raise CheckpointError(f"safetensors files cannot hold the dtype `{array.dtype}`.")
        return cls(_NAMES[array.dtype], array.shape, array.nbytes, lambda: _as_bytes(array))

    def map(self, function: Callable[[np.ndarray], np.ndarray]) -> "Tensor":
        """Returns the tensor with a function applied, one that keeps its shape and dtype."""
        return Tensor(self.dtype, self.shape, self.nbytes, lambda: _as_bytes(function(self.read())))

    @property
    def array_dtype(self) -> np.dtype:
        """The dtype of the array that `read` returns.

        Raises:
            CheckpointError: If NumPy has no such type (the packed types below 8 bits).
        """
        if self.dtype not in _DTYPES:
            raise CheckpointError(f"No array can be made of the packed dtype `{self.dtype}`.")
        return _DTYPES[self.dtype]

    def read(self) -> np.ndarray:
        """Returns the tensor as an array; `data` and `array_dtype` say of what kind."""
        return self.data().view(self.array_dtype).reshape(self.shape)


def _as_bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def read_safetensors(file: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Lists the tensors of a safetensors file; only the header is read.

    Args:
        file: A `.safetensors` file.

    Returns:
        The file's tensors by name.

    Raises:
        CheckpointError: If the file is missing, truncated or corrupt.
    """
    file = Path(file)
    if not file.is_file():
        raise CheckpointError(f"The checkpoint file `{file}` is missing.")
    try:
        # Opening checks the whole layout: header, types, offsets and the file's length.
        with safe_open(file, framework="np"):
            pass
    except SafetensorError as error:
        raise CheckpointError(f"`{file}` is truncated or corrupt: {error}.") from error
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return {name: _stored(file, 8 + length, entry) for name, entry in header.items()}


def _stored(file: Path, start: int, entry: dict) -> Tensor:
    begin, end = entry["data_offsets"]

    def data() -> np.ndarray:
        view = np.memmap(file, np.uint8, "r", offset=start + begin, shape=(end - begin,))
        return np.asarray(view)

    return Tensor(entry["dtype"], tuple(entry["shape"]), end - begin, data)


def write_safetensors(file: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file, holding one tensor in memory at a time.

    Args:
        file: The file to write.
        tensors: The tensors by name; each one's data is asked for once.
    """
    # Wide types first, as the reference implementation does, so that every tensor stays aligned.
    order = sorted(tensors, key=lambda name: (-_alignment(tensors[name]), name))
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": (offset, end),
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with Path(file).open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little"))
        stream.write(encoded)
        for name in order:
            stream.write(tensors[name].data())


def _alignment(tensor: Tensor) -> int:
    return _DTYPES[tensor.dtype].itemsize if tensor.dtype in _DTYPES else 1


def read_torch_tensors(directory: str | os.PathLike[str]) -> dict[str, Tensor] | None:
    """Lists the safetensors of a Hugging Face directory, in one file or in shards.

    Args:
        directory: The checkpoint's directory.

    Returns:
        The tensors by their PyTorch names, or `None` if the directory has no such files.

    Raises:
        CheckpointError: If a file is missing, truncated or corrupt.
    """
    directory = Path(directory)
    if (directory / SAFETENSORS).is_file():
        return read_safetensors(directory / SAFETENSORS)
    index = _weight_map(directory / f"{SAFETENSORS}.index.json")
    if index is None:
        return None
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(index.values())):
        tensors |= read_safetensors(directory / shard)
    _require(index, tensors, directory)
    return tensors


def read_flax_leaves(directory: str | os.PathLike[str]) -> dict[LeafPath, np.ndarray] | None:
    """Reads the Flax msgpack file (or shards) of a Hugging Face directory.

    The format has no table of contents, so unlike safetensors the arrays are read at once.

    Args:
        directory: The checkpoint's directory.

    Returns:
        The leaves by path, or `None` if the directory has no such files.

    Raises:
        CheckpointError: If a file is missing, truncated or corrupt.
    """
    directory = Path(directory)
    if (directory / MSGPACK).is_file():
        leaves = _read_msgpack(directory / MSGPACK)
    else:
        index = _weight_map(directory / f"{MSGPACK}.index.json")
        if index is None:
            return None
        leaves = {}
        for shard in sorted(set(index.values())):
            leaves |= _read_msgpack(directory / shard)
        _require(index, leaves, directory)
    return {tuple(name.split("/")): leaf for name, leaf in leaves.items()}


def _read_msgpack(file: Path) -> dict[str, np.ndarray]:
    if not file.is_file():
        raise CheckpointError(f"The checkpoint file `{file}` is missing.")
    try:
        return flatten_dict(msgpack_restore(file.read_bytes()), sep="/")
    # msgpack signals damage by many unrelated exception types.
    except Exception as error:
        raise CheckpointError(f"`{file}` is truncated or corrupt: {error}.") from error


def _weight_map(index: Path) -> dict[str, str] | None:
    if not index.is_file():
        return None
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"`{index}` is no index of checkpoint shards.") from error
    for shard in weight_map.values():
        if Path(shard).name != shard:
            raise CheckpointError(f"`{index}` names the shard `{shard}`, outside its directory.")
    return weight_map


def _require(index: Iterable[str], found: Iterable[str], directory: Path) -> None:
    missing = sorted(set(index) - set(found))
    if missing:
        raise CheckpointError(
            f"`{directory}` lacks tensors its index promises: {', '.join(missing)}."
        )
