"""Writing merged models as Hugging Face directories that any tool loads."""

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

from circflax.interop._checkpoint import match_tensors, read_tensors
from circflax.interop._names import (
    Placement,
    has_prefix,
    in_head,
    is_headless,
    leaf_shapes,
    name_leaves,
    nests_base,
)
from circflax.interop._tensors import (
    SAFETENSORS,
    CheckpointError,
    LeafPath,
    Tensor,
    write_safetensors,
)

if TYPE_CHECKING:
    from transformers import FlaxPreTrainedModel

_COPIED_SUFFIXES = (".json", ".txt", ".model", ".jinja")
_NOT_COPIED = ("config.json", "adapter_config.json")
_CONFIG_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def export_merged(
    base: str | os.PathLike[str],
    output: str | os.PathLike[str],
    model: "FlaxPreTrainedModel",
    changes: Mapping[LeafPath, Callable[[np.ndarray], np.ndarray]],
    added: Mapping[LeafPath, np.ndarray] | None = None,
    *,
    max_shard_size: int | str = "5GB",
) -> None:
    """Writes a base checkpoint with some of its leaves changed, for PyTorch's `from_pretrained`.

    One tensor at a time is read, changed if asked, and written; the bytes of all others are copied
    as they are, whatever their type. The directory appears under its name when it is complete.

    Tied tensors stay as the base holds them: where it holds both, loading ties them again.

    Example:
        >>> path = ("bert", "encoder", "layer", "0", "attention", "self", "query", "kernel")
        >>> export_merged(  # doctest: +SKIP
        ...     "base", "merged", model, {path: lambda kernel: kernel + delta}
        ... )

    Args:
        base: The directory the model was loaded from (`LoadReport.directory`).
        output: The directory to write: new, or empty.
        model: The Flax model; its configuration and its class are written.
        changes: For each leaf to change, a function from the base's array to the merged one, both
            in Flax's layout and of the same shape and dtype.
        added: The leaves of the model that the base lacks, such as a new head.
        max_shard_size: The largest size of a weights file, as a number of bytes or as `"5GB"`; more
            than that is written in shards with an index.

    Raises:
        CheckpointError: If a change or an addition does not fit the base, a result is not finite,
            the base cannot be read, or `output` is not empty.
        ValueError: If `max_shard_size` is no size.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    base, output = Path(base), Path(output).resolve()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"`{output}` exists and is not an empty directory.")
    tensors = _merged_tensors(read_tensors(base), model, changes, added or {})
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
        _copy_companions(base, staged)
        _write_config(staged, model, tensors)
        for file, names in shards.filename_to_tensors.items():
            write_safetensors(staged / file, {name: tensors[name] for name in names})
        if shards.is_sharded:
            index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            (staged / f"{SAFETENSORS}.index.json").write_text(json.dumps(index, indent=2) + "\n")
        if output.exists():
            output.rmdir()
        staged.rename(output)


def _merged_tensors(
    tensors: Mapping[str, Tensor],
    model: "FlaxPreTrainedModel",
    changes: Mapping[LeafPath, Callable[[np.ndarray], np.ndarray]],
    added: Mapping[LeafPath, np.ndarray],
) -> dict[str, Tensor]:
    placements = match_tensors(tensors, model)
    held = {placement.path for placement in placements.values()}
    _check_paths(held, model, changes, added)
    prefix = model.base_model_prefix
    headless = is_headless(tensors, model)
    merged: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        placement = placements.get(name)
        if placement is not None and placement.path in changes:
            tensor = tensor.map(_checked(changes[placement.path], placement))
        # PyTorch takes a file for a base model's or a head model's by the prefix of all its names.
        nested = headless and (placement is None or not in_head(placement.path, model))
        merged[f"{prefix}.{name}" if nested else name] = tensor
    ranks = {path: len(leaf.shape) for path, leaf in leaf_shapes(model).items()}
    extracted = not nests_base(model) and has_prefix(tensors, prefix)
    for name, placement in name_leaves(ranks).items():
        if placement.path in added:
            leaf = np.asarray(added[placement.path])
            _check_finite(leaf, placement.path)
            merged[f"{prefix}.{name}" if extracted else name] = Tensor.of(placement.to_torch(leaf))
    return merged


def _check_paths(
    held: set[LeafPath],
    model: "FlaxPreTrainedModel",
    changes: Mapping[LeafPath, object],
    added: Mapping[LeafPath, np.ndarray],
) -> None:
    shapes = leaf_shapes(model)
    for path in changes:
        if path not in held:
            raise CheckpointError(f"The base holds no leaf `{'/'.join(path)}` to change.")
    for path, leaf in added.items():
        if path not in shapes:
            raise CheckpointError(f"`{type(model).__name__}` has no leaf `{'/'.join(path)}`.")
        if path in held:
            raise CheckpointError(
                f"The base already holds `{'/'.join(path)}`; pass it in `changes`, not in `added`."
            )
        if np.shape(leaf) != shapes[path].shape:
            raise CheckpointError(
                f"The added `{'/'.join(path)}` has the shape {np.shape(leaf)}, but "
                f"`{type(model).__name__}` needs {shapes[path].shape}."
            )
    missing = sorted(set(shapes) - held - set(added))
    if missing:
        raise CheckpointError(f"The base lacks `{'/'.join(missing[0])}`; pass it in `added`.")


def _checked(
    change: Callable[[np.ndarray], np.ndarray], placement: Placement
) -> Callable[[np.ndarray], np.ndarray]:
    def apply(tensor: np.ndarray) -> np.ndarray:
        leaf = placement.to_flax(tensor)
        result = np.asarray(change(leaf))
        if (result.shape, result.dtype) != (leaf.shape, leaf.dtype):
            raise CheckpointError(
                f"The change of `{'/'.join(placement.path)}` made {leaf.dtype}{leaf.shape} into "
                f"{result.dtype}{result.shape}; both must stay the same."
            )
        _check_finite(result, placement.path)
        return placement.to_torch(result)

    return apply


def _check_finite(leaf: np.ndarray, path: LeafPath) -> None:
    if not np.isfinite(leaf).all():
        raise CheckpointError(f"The merged `{'/'.join(path)}` holds values that are not finite.")


def _copy_companions(source: Path, target: Path) -> None:
    for file in source.iterdir():
        is_index = file.name.endswith(".index.json")
        if file.suffix in _COPIED_SUFFIXES and file.name not in _NOT_COPIED and not is_index:
            shutil.copyfile(file, target / file.name)


def _write_config(
    directory: Path, model: "FlaxPreTrainedModel", tensors: Mapping[str, Tensor]
) -> None:
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__.removeprefix("Flax")]
    # The class written is the library's own: code that the base brought along is not carried on.
    vars(config).pop("auto_map", None)
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        if tensor.dtype in _CONFIG_DTYPES:
            sizes[_CONFIG_DTYPES[tensor.dtype]] += tensor.nbytes
    config.dtype = max(sizes, key=sizes.__getitem__, default=None)
    config.to_json_file(directory / "config.json")
