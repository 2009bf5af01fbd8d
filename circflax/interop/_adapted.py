"""Adapters with the Hugging Face checkpoint they belong to: load, export merged."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from circflax.interop._checkpoint import Checkpoint, Progress, open_checkpoint
from circflax.interop._export import export_merged
from circflax.interop._names import head_leaves, leaf_shapes
from circflax.interop._shards import Shard
from circflax.interop._tensors import CheckpointError, LeafPath
from circflax.methods import Params
from circflax.tree import AdapterFile, Target, load_adapters, merge_bias, merge_kernel
from circflax.tree._adapters import adapters_by_target
from circflax.tree._paths import flatten

if TYPE_CHECKING:
    from transformers import FlaxPreTrainedModel

_Change = Callable[[np.ndarray], np.ndarray]
_HEAD_FIELDS = ("num_labels", "id2label", "label2id", "problem_type")


@dataclass(frozen=True)
class Adapted:
    """A base model with the adapters that were trained on it.

    Attributes:
        model: the Flax model, made with `_do_init=False`.
        params: the base model's parameters.
        file: the adapters with their plan.
    """

    model: "FlaxPreTrainedModel"
    params: dict[str, Any]
    file: AdapterFile


def load_adapted(
    directory: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = jnp.float32,
    shard: Shard | None = None,
    progress: Progress | None = None,
) -> Adapted:
    """Loads adapters and the base model that they were trained on.

    Args:
        directory: holds `adapter_model.safetensors`, `adapter_config.json` and the adapted
            model's `config.json`; or a run's directory with these in `adapter/`.
        base: the base model's directory or Hub name; None for the one the adapters name.
        dtype: the dtype that the model computes in.
        param_dtype: the dtype of the base's parameters; None keeps each as stored.
        shard: says where each parameter goes, as for `load_model`.
        progress: goes through what is to be read, as for `load_model`.

    Returns:
        Model, parameters and adapters.

    Raises:
        CheckpointError: if the base cannot be read, or lacks a layer that the adapters adapt or a
            head that they do not train.
        ValueError: if the adapters cannot be read or were trained on another base.
        FileNotFoundError: if files of the adapter are missing.
    """
    file, checkpoint = _open(directory, base, dtype)
    file.check_kernels(leaf_shapes(checkpoint.model), checkpoint.read)
    return Adapted(checkpoint.model, checkpoint.load(param_dtype, shard, progress), file)


def export_adapted(
    directory: str | os.PathLike[str],
    output: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    dtype: DTypeLike = jnp.float32,
    max_shard_size: int | str = "5GB",
) -> None:
    """Writes the merged model in Hugging Face's layout, loadable by PyTorch and by Flax.

    Tensors that no adapter touches are copied byte by byte from the base checkpoint; of the base,
    one tensor at a time is in memory.

    Args:
        directory: the adapters', as for `load_adapted`.
        output: the directory to write: new, or empty.
        base: the base model's directory or Hub name; None for the one the adapters name.
        dtype: float32 or float64, of the merging; results are rounded once to the base's own.
        max_shard_size: as for `export_merged`.

    Raises:
        CheckpointError: if something does not fit or a merged kernel is not finite; then nothing
            is written.
        ValueError: if the adapters cannot be read or were trained on another base.
        FileNotFoundError: if files of the adapter are missing.
    """
    file, checkpoint = _open(directory, base, jnp.float32)
    file.check_kernels(leaf_shapes(checkpoint.model), checkpoint.read)
    changes: dict[LeafPath, _Change] = {}
    added: dict[LeafPath, np.ndarray] = {}
    trained = flatten(file.adapters)
    for path in file.plan.trained:
        if path in checkpoint.names:
            changes[path] = partial(_replaced, trained[path])
        else:
            added[path] = trained[path]
    for target, adapter in adapters_by_target(file.adapters, file.plan):
        changes[target.kernel_path] = partial(_merged, merge_kernel, target, adapter, dtype)
        if target.method.changes_bias and (path := target.bias_path) is not None:
            merged = partial(_merged, merge_bias, target, adapter, dtype)
            # A bias may have been trained in full besides.
            changes[path] = _then(changes[path], merged) if path in changes else merged
    export_merged(
        checkpoint.directory,
        output,
        checkpoint.model,
        changes,
        added,
        max_shard_size=max_shard_size,
    )


def _open(
    directory: str | os.PathLike[str], base: str | os.PathLike[str] | None, dtype: DTypeLike
) -> tuple[AdapterFile, Checkpoint]:
    """The adapters, and the base's checkpoint beside the adapted model."""
    import transformers

    directory = Path(directory)
    if (directory / "adapter").is_dir():
        directory = directory / "adapter"
    file = load_adapters(directory)
    source = base or file.base
    if source is None:
        raise CheckpointError(f"`{directory}` does not name its base model: give one.")
    try:
        config = json.loads((directory / "config.json").read_text())
        head = {name: config[name] for name in _HEAD_FIELDS if name in config}
        if "id2label" in head:
            head["id2label"] = {int(index): name for index, name in head["id2label"].items()}
        architecture = config["architectures"][0]
    except (OSError, KeyError, IndexError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"`{directory}` holds no whole `config.json` of the adapted model ({error!r})."
        ) from error
    model_class = getattr(transformers, f"Flax{architecture}", None)
    if model_class is None:
        raise CheckpointError(f"`transformers` has no Flax class for `{architecture}`.")
    # A head that was trained with another number of labels than the base's takes its place.
    checkpoint = open_checkpoint(source, model_class, config=head, dtype=dtype, new_head=None)
    trained = set(file.plan.trained)
    for path in head_leaves(checkpoint.model):
        if path not in checkpoint.names and path not in trained:
            raise CheckpointError(
                f"The adapters do not train `{'/'.join(path)}`, which the base in"
                f" `{checkpoint.directory}` does not hold for a model of their size."
            )
    return file, checkpoint


def _merged(
    merge: Callable[..., jax.Array],
    target: Target,
    adapter: Params,
    dtype: DTypeLike,
    leaf: np.ndarray,
) -> np.ndarray:
    return np.asarray(merge(target, adapter, jnp.asarray(leaf), dtype=dtype))


def _replaced(trained: np.ndarray, base: np.ndarray) -> np.ndarray:
    return trained.astype(base.dtype)


def _then(first: _Change, second: _Change) -> _Change:
    return lambda leaf: second(first(leaf))
