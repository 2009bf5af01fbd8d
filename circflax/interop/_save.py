"""Writing a Flax model of `transformers` with its parameters."""

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from flax.core import unfreeze
from flax.traverse_util import flatten_dict

from circflax.interop._names import leaf_shapes, name_leaves
from circflax.interop._tensors import CheckpointError, LeafPath, Tensor
from circflax.interop._tied import written_config
from circflax.interop._write import check_finite, copy_companions, write_directory

if TYPE_CHECKING:
    from transformers import FlaxPreTrainedModel


def save_model(
    output: str | os.PathLike[str],
    model: "FlaxPreTrainedModel",
    params: Mapping[str, Any],
    *,
    companions: str | os.PathLike[str] | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Writes a Flax model in Hugging Face's layout, loadable by PyTorch and by `load_model`.

    Where there is a base checkpoint, `export_merged` keeps what it holds besides the parameters.

    Example:
        >>> outline = outline_model("vit/config.json", "image-classification")  # doctest: +SKIP
        >>> save_model("new", outline.model, outline.init())  # doctest: +SKIP

    Args:
        output: The directory to write: new, or empty. It appears when it is complete.
        model: The Flax model; its configuration and its class are written.
        params: All of its parameters, in whatever floating-point dtypes.
        companions: A directory whose files of a tokenizer or image processor are copied along.
        max_shard_size: The largest size of a weights file, as a number of bytes or as `"5GB"`.

    Raises:
        CheckpointError: If the parameters are not the model's or not finite, or `output` is not
            empty; then nothing is written.
        ValueError: If `max_shard_size` is no size.
    """
    leaves = {path: np.asarray(leaf) for path, leaf in flatten_dict(unfreeze(params)).items()}
    _check_leaves(leaves, model)
    placements = name_leaves({path: leaf.ndim for path, leaf in leaves.items()})
    write_directory(
        output,
        written_config(model, placements),
        type(model).__name__.removeprefix("Flax"),
        {
            name: Tensor.of(placement.to_torch(leaves[placement.path]))
            for name, placement in placements.items()
        },
        None if companions is None else partial(copy_companions, Path(companions)),
        max_shard_size,
    )


def _check_leaves(leaves: Mapping[LeafPath, np.ndarray], model: "FlaxPreTrainedModel") -> None:
    shapes = leaf_shapes(model)
    for path in sorted(shapes.keys() ^ leaves.keys()):
        verb = "needs the" if path in shapes else "has no"
        raise CheckpointError(f"`{type(model).__name__}` {verb} parameter `{'/'.join(path)}`.")
    for path, leaf in leaves.items():
        if leaf.shape != shapes[path].shape:
            raise CheckpointError(
                f"`{'/'.join(path)}` has the shape {leaf.shape}, but `{type(model).__name__}`"
                f" needs {shapes[path].shape}."
            )
        check_finite(leaf, path)
