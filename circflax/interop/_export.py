"""Writing merged models as Hugging Face directories that any tool loads."""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from circflax.interop._checkpoint import match_tensors, read_tensors
from circflax.interop._names import (
    Placement,
    has_prefix,
    head_leaves,
    is_headless,
    leaf_shapes,
    name_leaves,
    nests_base,
    place_tensors,
)
from circflax.interop._tensors import CheckpointError, LeafPath, Tensor
from circflax.interop._tied import tie_head, tied_leaves, written_config
from circflax.interop._write import check_finite, copy_companions, write_directory

if TYPE_CHECKING:
    from transformers import FlaxPreTrainedModel


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

    Tied tensors stay as the base holds them: where it holds both, loading ties them again. A head
    that is tied in PyTorch but not in Flax (Llama's, Mistral's) parts from the embedding when one
    of them is changed: both are written then, and the configuration no longer ties them.

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
        added: The leaves of the model that the base lacks, such as a new head. A whole head takes
            the place of the base's own, whatever its size.
        max_shard_size: The largest size of a weights file, as a number of bytes or as `"5GB"`; more
            than that is written in shards with an index.

    Raises:
        CheckpointError: If a change or an addition does not fit the base, a result is not finite,
            the base cannot be read, or `output` is not empty.
        ValueError: If `max_shard_size` is no size.
    """
    tensors = _merged_tensors(read_tensors(base), model, changes, added or {})
    write_directory(
        output,
        written_config(model, tensors),
        type(model).__name__.removeprefix("Flax"),
        tensors,
        partial(copy_companions, Path(base)),
        max_shard_size,
    )


def _merged_tensors(
    tensors: Mapping[str, Tensor],
    model: "FlaxPreTrainedModel",
    changes: Mapping[LeafPath, Callable[[np.ndarray], np.ndarray]],
    added: Mapping[LeafPath, np.ndarray],
) -> dict[str, Tensor]:
    head = head_leaves(model)
    tied = tie_head(tensors, model)
    if head and added.keys() >= set(head):
        tensors = tied = _without_head(tied, model)
    placements = match_tensors(tied, model)
    held = {placement.path for placement in placements.values()}
    _check_paths(held, model, changes, added)
    if not changes.keys().isdisjoint(tied_leaves(model)):
        tensors = tied
    prefix = model.base_model_prefix
    headless = is_headless(tensors, model)
    merged: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        placement = placements.get(name)
        if placement is not None and placement.path in changes:
            tensor = tensor.map(_checked(changes[placement.path], placement))
        # PyTorch takes a file for a base model's or a head model's by the prefix of all its names.
        nested = headless and (placement is None or placement.path not in head)
        merged[f"{prefix}.{name}" if nested else name] = tensor
    ranks = {path: len(leaf.shape) for path, leaf in leaf_shapes(model).items()}
    extracted = not nests_base(model) and has_prefix(tensors, prefix)
    for name, placement in name_leaves(ranks).items():
        if placement.path in added:
            leaf = np.asarray(added[placement.path])
            check_finite(leaf, placement.path)
            merged[f"{prefix}.{name}" if extracted else name] = Tensor.of(placement.to_torch(leaf))
    return merged


def _without_head(tensors: Mapping[str, Tensor], model: "FlaxPreTrainedModel") -> dict[str, Tensor]:
    placements = place_tensors({name: len(each.shape) for name, each in tensors.items()}, model)
    head = head_leaves(model)
    old = {name for name, placement in placements.items() if placement.path in head}
    return {name: tensor for name, tensor in tensors.items() if name not in old}


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
        check_finite(result, placement.path)
        return placement.to_torch(result)

    return apply
