"""Writing Hugging Face directories: whole, or not at all."""

import copy
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from circflax.interop._tensors import (
    SAFETENSORS,
    CheckpointError,
    LeafPath,
    Tensor,
    write_safetensors,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_COPIED_SUFFIXES = (".json", ".txt", ".model", ".jinja")
_NOT_COPIED = ("config.json", "adapter_config.json")
_CONFIG_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def write_directory(
    output: str | os.PathLike[str],
    config: "PretrainedConfig",
    architecture: str,
    tensors: Mapping[str, Tensor],
    add_companions: Callable[[Path], object] | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Writes a model's configuration and weights; the directory gets its name when it is complete.

    Args:
        output: The directory to write: new, or empty.
        config: The model's configuration.
        architecture: The name of the model's PyTorch class.
        tensors: The tensors by PyTorch name; each one's data is asked for once.
        add_companions: Writes what belongs beside the weights, such as a tokenizer's files, into
            the directory it is given; None if nothing does.
        max_shard_size: The largest size of a weights file, as a number of bytes or as `"5GB"`.

    Raises:
        CheckpointError: If `output` is not empty.
        ValueError: If `max_shard_size` is no size.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    output = Path(output).resolve()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"`{output}` exists and is not an empty directory.")
    shards = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    # A sibling lies on the same file system, so that the last step is a plain rename.
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch:
        staged = Path(scratch) / output.name
        staged.mkdir()
        if add_companions is not None:
            add_companions(staged)
        _write_config(staged, config, architecture, tensors)
        for file, names in shards.filename_to_tensors.items():
            write_safetensors(staged / file, {name: tensors[name] for name in names})
        if shards.is_sharded:
            index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            (staged / f"{SAFETENSORS}.index.json").write_text(json.dumps(index, indent=2) + "\n")
        if output.exists():
            output.rmdir()
        staged.rename(output)


def copy_companions(source: Path, target: Path) -> None:
    """Copies what lies beside a model's weights: files of its tokenizer or image processor."""
    for file in source.iterdir():
        is_index = file.name.endswith(".index.json")
        if file.suffix in _COPIED_SUFFIXES and file.name not in _NOT_COPIED and not is_index:
            shutil.copyfile(file, target / file.name)


def check_finite(leaf: np.ndarray, path: LeafPath) -> None:
    """Raises a CheckpointError if a leaf that is to be written is not finite."""
    if not np.isfinite(leaf).all():
        raise CheckpointError(f"`{'/'.join(path)}` holds values that are not finite.")


def _write_config(
    directory: Path, config: "PretrainedConfig", architecture: str, tensors: Mapping[str, Tensor]
) -> None:
    config = copy.deepcopy(config)
    config.architectures = [architecture]
    # The class written is the library's own: code that the base brought along is not carried on.
    vars(config).pop("auto_map", None)
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        if tensor.dtype in _CONFIG_DTYPES:
            sizes[_CONFIG_DTYPES[tensor.dtype]] += tensor.nbytes
    config.dtype = max(sizes, key=sizes.__getitem__, default=None)
    config.to_json_file(directory / "config.json")
