"""The correspondence between the tensors of a PyTorch checkpoint and the leaves of a Flax model.

The rules are those of `transformers` itself: every name goes through the function that the library
uses to load PyTorch weights in Flax, and the way back proposes names and keeps the one that this
function maps to the leaf in question.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import numpy as np
from flax.core import unfreeze
from flax.traverse_util import flatten_dict

from circflax.interop._tensors import CheckpointError, LeafPath

if TYPE_CHECKING:
    from transformers import FlaxPreTrainedModel

_TORCH_NAMES = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "mean": "running_mean",
    "var": "running_var",
}


@dataclass(frozen=True)
class Placement:
    """The Flax leaf that a PyTorch tensor holds.

    Attributes:
        path: The leaf's path in the parameters.
        axes: The leaf is `tensor.transpose(axes)`.
    """

    path: LeafPath
    axes: tuple[int, ...]

    def to_flax(self, tensor: np.ndarray) -> np.ndarray:
        """Returns a tensor in the leaf's layout."""
        return tensor.transpose(self.axes)

    def to_torch(self, leaf: np.ndarray) -> np.ndarray:
        """Returns a leaf in the tensor's layout."""
        return leaf.transpose(np.argsort(self.axes))


def leaf_shapes(model: "FlaxPreTrainedModel") -> dict[LeafPath, jax.ShapeDtypeStruct]:
    """Returns the shapes and dtypes of a model's leaves by path; no array is made."""
    return flatten_dict(unfreeze(model.params_shape_tree))


def has_prefix(names: Iterable[str], prefix: str) -> bool:
    """Tells whether any of the dotted names lies under a prefix."""
    return any(name.split(".")[0] == prefix for name in names)


def nests_base(model: "FlaxPreTrainedModel") -> bool:
    """Tells whether a model keeps a base model under its prefix, and a head beside it."""
    leaves = _without_collections(leaf_shapes(model))
    return any(path[0] == model.base_model_prefix for path in leaves)


def head_leaves(model: "FlaxPreTrainedModel") -> tuple[LeafPath, ...]:
    """Returns the paths of the leaves beside the base model that a model nests."""
    if not nests_base(model):
        return ()
    # A path's first component may be one of Flax's collections.
    return tuple(path for path in leaf_shapes(model) if model.base_model_prefix not in path[:2])


def is_headless(names: Iterable[str], model: "FlaxPreTrainedModel") -> bool:
    """Tells a base model's checkpoint from one of a model with a head.

    Args:
        names: The checkpoint's tensor names.
        model: The Flax model.

    Returns:
        Whether the model nests a base model under a prefix that no name in the checkpoint carries.
    """
    return nests_base(model) and not has_prefix(names, model.base_model_prefix)


def place_tensors(ranks: Mapping[str, int], model: "FlaxPreTrainedModel") -> dict[str, Placement]:
    """Finds the leaf of a Flax model that each tensor of a PyTorch checkpoint holds.

    Args:
        ranks: The number of axes of every tensor in the checkpoint, by name.
        model: The Flax model.

    Returns:
        The placements by tensor name. A tensor that is no parameter of this model is left out.

    Raises:
        CheckpointError: If two tensors claim the same leaf.
    """
    prefix = model.base_model_prefix
    leaves = _without_collections(leaf_shapes(model))
    nests = nests_base(model)
    headless = is_headless(ranks, model)
    owners: dict[LeafPath, str] = {}
    placements: dict[str, Placement] = {}
    for name, rank in ranks.items():
        parts = tuple(name.split("."))
        if not nests and parts[0] == prefix:
            parts = parts[1:]
        path, axes = _to_flax(parts, rank, leaves, prefix)
        if headless and (prefix, *path) in leaves:
            path = (prefix, *path)
        if path not in leaves:
            continue
        if path in owners:
            raise CheckpointError(
                f"The tensors `{owners[path]}` and `{name}` both hold the leaf `{'/'.join(path)}`."
            )
        owners[path] = name
        placements[name] = Placement(leaves[path], axes)
    return placements


def name_leaves(ranks: Mapping[LeafPath, int]) -> dict[str, Placement]:
    """Finds the PyTorch names of the leaves of a Flax model.

    Args:
        ranks: The number of axes of every leaf of the model, by path.

    Returns:
        The placements by the names that the tensors have in the PyTorch class of the same name.

    Raises:
        CheckpointError: If no PyTorch name maps to a leaf.
    """
    leaves = _without_collections(ranks)
    placements: dict[str, Placement] = {}
    for inner, path in leaves.items():
        name, axes = _to_torch(inner, ranks[path], leaves)
        placements[name] = Placement(path, axes)
    return placements


def _to_torch(
    path: LeafPath, rank: int, leaves: Collection[LeafPath]
) -> tuple[str, tuple[int, ...]]:
    for last in dict.fromkeys((_TORCH_NAMES.get(path[-1], path[-1]), path[-1])):
        parts = (*path[:-1], last)
        found, axes = _to_flax(parts, rank, leaves)
        if found == path:
            return ".".join(parts), axes
    raise CheckpointError(f"No PyTorch name is known for the leaf `{'/'.join(path)}`.")


def _to_flax(
    parts: LeafPath, rank: int, leaves: Collection[LeafPath], prefix: str = ""
) -> tuple[LeafPath, tuple[int, ...]]:
    from transformers.modeling_flax_pytorch_utils import rename_key_and_reshape_tensor

    # Axis i of the probe has i + 1 entries, so the result's shape spells out the transposition.
    probe = np.empty(range(1, rank + 1), np.bool_)
    path, moved = rename_key_and_reshape_tensor(parts, probe, leaves, prefix)
    return path, tuple(size - 1 for size in moved.shape)


def _without_collections(paths: Collection[LeafPath]) -> dict[LeafPath, LeafPath]:
    # Models with batch norms keep Flax's collections atop their tree; PyTorch's names know none.
    if {path[0] for path in paths} != {"params", "batch_stats"}:
        return {path: path for path in paths}
    return {path[1:]: path for path in paths}
