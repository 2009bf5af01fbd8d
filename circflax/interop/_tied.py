"""Heads that PyTorch ties to the embedding and Flax does not.

Where a configuration ties the word embeddings, PyTorch reads one tensor as both the embedding and
the head, and a checkpoint holds the embedding alone. Most Flax classes do the same; Llama's and
Mistral's have a leaf of their own for the head, whatever the configuration says.
"""

import copy
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from circflax.interop._names import leaf_shapes, place_tensors
from circflax.interop._tensors import LeafPath, Tensor

if TYPE_CHECKING:
    from transformers import FlaxPreTrainedModel, PretrainedConfig

_HEAD = ("lm_head", "kernel")
_HEAD_NAME = "lm_head.weight"


def tied_leaves(model: "FlaxPreTrainedModel") -> tuple[LeafPath, ...]:
    """Returns the leaves of a head and its embedding that are tied in PyTorch alone.

    Args:
        model: The Flax model.

    Returns:
        The two paths; none where Flax ties the two as well, or nothing is tied.
    """
    shapes = leaf_shapes(model)
    if not model.config.tie_word_embeddings or _HEAD not in shapes:
        return ()
    mirrored = shapes[_HEAD].shape[::-1]
    for path, leaf in shapes.items():
        if path[-1] == "embedding" and leaf.shape == mirrored:
            return _HEAD, path
    return ()


def tie_head(tensors: Mapping[str, Tensor], model: "FlaxPreTrainedModel") -> dict[str, Tensor]:
    """Adds the head that a checkpoint holds only as its embedding.

    Args:
        tensors: The checkpoint's tensors by PyTorch name.
        model: The Flax model.

    Returns:
        The tensors; with the head under its own name if PyTorch would read it off the embedding.
    """
    placements = place_tensors({name: len(each.shape) for name, each in tensors.items()}, model)
    names = {placement.path: name for name, placement in placements.items()}
    match tied_leaves(model):
        case (head, embedding) if head not in names and embedding in names:
            return {**tensors, _HEAD_NAME: tensors[names[embedding]]}
    return dict(tensors)


def written_config(model: "FlaxPreTrainedModel", names: Collection[str]) -> "PretrainedConfig":
    """Returns the configuration with which PyTorch reads what Flax does.

    Args:
        model: The Flax model.
        names: The PyTorch names of all tensors that are written.

    Returns:
        The model's own, or a copy that ties nothing if the head is written beside the embedding.
    """
    config = model.config
    if tied_leaves(model) and _HEAD_NAME in names:
        config = copy.deepcopy(config)
        config.tie_word_embeddings = False
    return config
