"""Reading Hugging Face checkpoints into Flax models, without PyTorch and without pickle."""

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from circflax.interop._model import make_model
from circflax.interop._names import (
    Placement,
    head_leaves,
    leaf_shapes,
    name_leaves,
    place_tensors,
)
from circflax.interop._shards import Shard, place_leaves, read_leaf
from circflax.interop._tensors import (
    CheckpointError,
    LeafPath,
    Tensor,
    read_flax_leaves,
    read_torch_tensors,
)
from circflax.interop._tied import tie_head

if TYPE_CHECKING:
    from transformers import FlaxPreTrainedModel, PretrainedConfig

_LOGGER = logging.getLogger(__name__)

Progress = Callable[[Iterable[LeafPath], int], Iterable[LeafPath]]
"""Goes through the paths of leaves, and is told how many they are."""

_HEADS = {
    "base": "FLAX_MODEL_MAPPING",
    "causal-lm": "FLAX_MODEL_FOR_CAUSAL_LM_MAPPING",
    "image-classification": "FLAX_MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "masked-lm": "FLAX_MODEL_FOR_MASKED_LM_MAPPING",
    "multiple-choice": "FLAX_MODEL_FOR_MULTIPLE_CHOICE_MAPPING",
    "question-answering": "FLAX_MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    "seq2seq-lm": "FLAX_MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "sequence-classification": "FLAX_MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "speech-seq2seq": "FLAX_MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
    "token-classification": "FLAX_MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
}
# What is taken of a model when no head is asked for.
_FIRST = ("sequence-classification", "image-classification", "causal-lm", "seq2seq-lm", "base")
# Weights in pickle and code are never fetched.
_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
_TORCH_FILES = ("model.safetensors", "model-*.safetensors")
_FLAX_FILES = ("flax_model.msgpack", "flax_model-*.msgpack")


@dataclass(frozen=True)
class LoadReport:
    """What became of a checkpoint when it was loaded.

    Attributes:
        directory: The local directory it was read from.
        initialised: The leaves the checkpoint lacks, which got fresh random values.
        unused: The checkpoint's tensors, by PyTorch name, that are no parameter of the model.
    """

    directory: Path
    initialised: tuple[LeafPath, ...]
    unused: tuple[str, ...]


def load_model(
    source: str | os.PathLike[str],
    head: "str | type[FlaxPreTrainedModel]",
    *,
    revision: str | None = None,
    config: Mapping[str, Any] | None = None,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = jnp.float32,
    seed: int = 0,
    new_head: bool = False,
    shard: Shard | None = None,
    progress: Progress | None = None,
) -> tuple["FlaxPreTrainedModel", dict[str, Any], LoadReport]:
    """Reads a Hugging Face checkpoint into a Flax model of `transformers`.

    Weights come from safetensors files, one tensor at a time, or from Flax's msgpack files where
    there are no others. PyTorch is not needed; pickled weights and remote code are never used.
    A warning is logged if the checkpoint lacks leaves that are no part of a head.

    A head that the configuration ties to the embedding is the embedding's; where the Flax class has
    a leaf of its own for it (Llama's, Mistral's), the two are equal at first and train apart.

    Rotary positions (`rope_theta`, and `rope_scaling` of the types linear and llama3) and Mistral's
    `sliding_window` are the configuration's, as in PyTorch, where the Flax class knows others.

    Example:
        >>> model, params, report = load_model(  # doctest: +SKIP
        ...     "google-bert/bert-base-uncased", "sequence-classification", config={"num_labels": 3}
        ... )
        >>> report.initialised  # doctest: +SKIP
        (('classifier', 'bias'), ('classifier', 'kernel'))

    Args:
        source: A local directory, or the name of a repository on the Hugging Face Hub.
        head: The model's kind of head, such as `"sequence-classification"`, or its Flax class.
        revision: A branch, tag or commit of the Hub repository.
        config: Fields of the model's configuration to override, such as `num_labels`.
        dtype: The dtype the model computes in.
        param_dtype: The dtype of the floating-point parameters; `None` keeps each as stored.
        seed: The seed for leaves that the checkpoint lacks, such as a new head.
        new_head: Whether to leave the checkpoint's own head unread, whatever its size, and make a
            new one. Train all of it: of a head, an adapter's file holds what was trained.
        shard: From the shapes of all parameters (a tree of `jax.ShapeDtypeStruct` in the dtypes
            that they will have), says where each goes (a tree of `jax.sharding.Sharding`). A
            process then reads only what its devices hold, and the values do not depend on it. None
            puts all on the default device.
        progress: Goes through what is to be read, and is told how many leaves that are: a progress
            bar's function.

    Returns:
        The model, made with `_do_init=False`; its parameters as nested dictionaries; and a report
        of what was newly initialised and what was left unused.

    Raises:
        CheckpointError: If the checkpoint cannot be read or does not fit the model, or the Flax
            class cannot follow its configuration.
    """
    checkpoint = open_checkpoint(
        source,
        head,
        revision=revision,
        config=config,
        dtype=dtype,
        seed=seed,
        new_head=new_head,
    )
    unused = tuple(sorted(set(checkpoint.tensors) - set(checkpoint.placements)))
    report = LoadReport(checkpoint.directory, checkpoint.missing, unused)
    return checkpoint.model, checkpoint.load(param_dtype, shard, progress), report


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint beside the model that it is for; weights are read when asked for.

    Attributes:
        directory: The local directory.
        model: The Flax model, made with `_do_init=False`.
        tensors: The checkpoint's tensors by PyTorch name; see `tie_head`.
        placements: The leaf of each tensor that is a parameter of the model.
    """

    directory: Path
    model: "FlaxPreTrainedModel"
    tensors: Mapping[str, Tensor]
    placements: Mapping[str, Placement]

    @cached_property
    def names(self) -> dict[LeafPath, str]:
        """The PyTorch name of each leaf that the checkpoint holds."""
        return {placement.path: name for name, placement in self.placements.items()}

    @property
    def missing(self) -> tuple[LeafPath, ...]:
        """The model's leaves that the checkpoint lacks."""
        return tuple(sorted(set(leaf_shapes(self.model)) - set(self.names)))

    def read(self, path: LeafPath) -> np.ndarray:
        """Returns one leaf, in Flax's layout and the dtype it is stored in; see `Tensor.read`."""
        if path not in self.names:
            raise CheckpointError(f"`{self.directory}` lacks the leaf `{'/'.join(path)}`.")
        name = self.names[path]
        return self.placements[name].to_flax(self.tensors[name].read())

    def shapes(self, param_dtype: DTypeLike | None) -> dict[LeafPath, jax.ShapeDtypeStruct]:
        """The shapes of all leaves, with the dtypes that `load` gives them."""

        def shape(path: LeafPath, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            held = path in self.names
            dtype = self.tensors[self.names[path]].array_dtype if held else leaf.dtype
            if param_dtype is not None and jnp.issubdtype(dtype, jnp.floating):
                dtype = param_dtype
            return jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(dtype))

        return {path: shape(path, leaf) for path, leaf in leaf_shapes(self.model).items()}

    def load(
        self,
        param_dtype: DTypeLike | None,
        shard: Shard | None = None,
        progress: Progress | None = None,
    ) -> dict[str, Any]:
        """Reads all leaves, and makes those that the checkpoint lacks; see `load_model`."""
        shapes = place_leaves(self.shapes(param_dtype), shard)
        paths = self.names if progress is None else progress(self.names, len(self.names))
        leaves = {path: read_leaf(self.read(path), shapes[path]) for path in paths}
        made = {path: shapes[path] for path in self.missing}
        leaves |= initialise(self.model, made, self.model.key)
        head = head_leaves(self.model)
        untrained = ["/".join(path) for path in self.missing if path not in head]
        if untrained:
            _LOGGER.warning(
                "`%s` lacks, and random values replace: %s.", self.directory, ", ".join(untrained)
            )
        return unflatten_dict(leaves)


def open_checkpoint(
    source: str | os.PathLike[str],
    head: "str | type[FlaxPreTrainedModel]",
    *,
    revision: str | None = None,
    config: Mapping[str, Any] | None = None,
    dtype: DTypeLike = jnp.float32,
    seed: int = 0,
    new_head: bool | None = False,
) -> Checkpoint:
    """Finds a checkpoint and makes its model, without reading weights.

    The arguments are those of `load_model`, and `new_head` may be None: then the head is made anew
    if the checkpoint's own does not fit.
    """
    directory = find_checkpoint(source, revision)
    tensors = read_tensors(directory)
    configuration = read_config(directory / "config.json", config or {})
    model = make_model(find_model_class(configuration, head), configuration, dtype=dtype, seed=seed)
    if new_head and not head_leaves(model):
        raise CheckpointError(f"`{type(model).__name__}` has no head that could be made anew.")
    if not new_head:
        tensors = tie_head(tensors, model)
    return Checkpoint(directory, model, tensors, match_tensors(tensors, model, new_head=new_head))


def find_checkpoint(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Finds a checkpoint's local directory, downloading it from the Hub where needed.

    Args:
        source: A local directory, or the name of a repository on the Hugging Face Hub.
        revision: A branch, tag or commit of the Hub repository.

    Returns:
        The directory.

    Raises:
        CheckpointError: If there is no such directory or repository.
    """
    if Path(source).is_dir():
        if revision is not None:
            raise CheckpointError(f"`{source}` is a local directory and has no `revision`.")
        return Path(source)
    from huggingface_hub import snapshot_download

    def download(*patterns: str) -> Path:
        return Path(
            snapshot_download(
                str(source),
                revision=revision,
                allow_patterns=[*_SMALL_FILES, *patterns],
                ignore_patterns=["*/*"],
            )
        )

    try:
        directory = download(*_TORCH_FILES)
        if not any(directory.glob("model*.safetensors")):
            directory = download(*_FLAX_FILES)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"`{source}` is neither a local directory nor a Hub repository within reach: "
            f"{_first_line(error)}"
        ) from error
    return directory


def read_tensors(directory: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Lists the tensors of a checkpoint under their PyTorch names.

    Args:
        directory: The checkpoint's directory.

    Returns:
        The tensors by name.

    Raises:
        CheckpointError: If there are no weights in a format that is read here, or they are damaged.
    """
    tensors = read_torch_tensors(directory)
    if tensors is not None:
        return tensors
    leaves = read_flax_leaves(directory)
    if leaves is not None:
        placements = name_leaves({path: np.ndim(leaf) for path, leaf in leaves.items()})
        return {
            name: Tensor.of(placement.to_torch(np.asarray(leaves[placement.path])))
            for name, placement in placements.items()
        }
    if any(Path(directory).glob("pytorch_model*.bin*")):
        raise CheckpointError(
            f"`{directory}` holds only pickled weights (`pytorch_model.bin`), which can run code "
            "and are never read; convert them in PyTorch with "
            "`save_pretrained(…, safe_serialization=True)`."
        )
    raise CheckpointError(
        f"`{directory}` holds no weights: expected `model.safetensors`, its shards with "
        "`model.safetensors.index.json`, or `flax_model.msgpack`."
    )


def match_tensors(
    tensors: Mapping[str, Tensor], model: "FlaxPreTrainedModel", *, new_head: bool | None = False
) -> dict[str, Placement]:
    """Finds the Flax leaf of each tensor and checks that the shapes agree.

    Args:
        tensors: A checkpoint's tensors by PyTorch name.
        model: The Flax model.
        new_head: Whether to leave out the tensors of the head; None does so if they do not fit.

    Returns:
        The placements of the tensors that are parameters of the model.

    Raises:
        CheckpointError: If a tensor's shape is not its leaf's.
    """
    placements = place_tensors({name: len(each.shape) for name, each in tensors.items()}, model)
    shapes, head_paths = leaf_shapes(model), head_leaves(model)
    head = {name for name, placement in placements.items() if placement.path in head_paths}
    misfits = {}
    for name, placement in placements.items():
        stored = tuple(tensors[name].shape[axis] for axis in placement.axes)
        if stored != (needed := shapes[placement.path].shape):
            misfits[name] = stored, needed
    if new_head or (new_head is None and head & misfits.keys()):
        placements = {name: each for name, each in placements.items() if name not in head}
    for name in filter(misfits.__contains__, placements):
        stored, needed = misfits[name]
        labels, hint = "", ""
        if name in head:
            labels = f" with `num_labels={model.config.num_labels}`"
            hint = "; `new_head=True` leaves this head unread and makes a new one"
        raise CheckpointError(
            f"`{name}` has the shape {stored} (in Flax's layout) in the checkpoint, but "
            f"`{type(model).__name__}`{labels} needs {needed}{hint}."
        )
    return placements


def read_config(file: Path, overrides: Mapping[str, Any]) -> "PretrainedConfig":
    """Reads a model's `config.json`; raises a CheckpointError if it is none."""
    from transformers import AutoConfig

    # Without this file `transformers` would guess the architecture from the directory's name.
    directory = file.parent
    if not file.is_file():
        raise CheckpointError(f"`{directory}` lacks the model's configuration, `{file.name}`.")
    try:
        kind = json.loads(file.read_text()).get("model_type")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"`{file}` is not a model's JSON.") from error
    if kind is None:
        raise CheckpointError(f"`{file}` names no `model_type`.")
    try:
        config, unused = AutoConfig.from_pretrained(
            file, trust_remote_code=False, return_unused_kwargs=True, **overrides
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"The configuration in `{directory}` cannot be read: {_first_line(error)}"
        ) from error
    unknown = sorted(set(unused) & set(overrides))
    if unknown:
        raise CheckpointError(f"`{type(config).__name__}` has no field `{unknown[0]}` to override.")
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(
            f"`{directory}` holds quantised weights; load the checkpoint they were made from."
        )
    return config


def find_model_class(
    config: "PretrainedConfig", head: "str | type[FlaxPreTrainedModel] | None"
) -> "type[FlaxPreTrainedModel]":
    """The Flax class of a configuration with a head; None takes the first head that there is."""
    from transformers import FlaxPreTrainedModel
    from transformers.models.auto import modeling_flax_auto

    if head is not None and not isinstance(head, str):
        if not (issubclass(head, FlaxPreTrainedModel) and isinstance(config, head.config_class)):
            raise CheckpointError(
                f"`{head.__name__}` is no Flax class for the checkpoint's `{config.model_type}`."
            )
        return head
    if head is not None and head not in _HEADS:
        raise CheckpointError(f"`{head}` is no kind of head; choose from {', '.join(_HEADS)}.")
    classes = {
        kind: found
        for kind, mapping in _HEADS.items()
        if (found := getattr(modeling_flax_auto, mapping).get(type(config), None)) is not None
    }
    for kind in _FIRST if head is None else (head,):
        if kind in classes:
            return classes[kind]
    wanted = "" if head is None else f" with the head `{head}`"
    raise CheckpointError(
        f"`transformers` has no Flax model for `{config.model_type}`{wanted}; "
        f"it has {', '.join(classes) or 'none at all'}."
    )


def initialise(
    model: "FlaxPreTrainedModel", leaves: Mapping[LeafPath, jax.ShapeDtypeStruct], key: jax.Array
) -> dict[LeafPath, jax.Array]:
    """Makes random leaves, as the model's own initialisers do, in their dtypes and shardings."""
    if not leaves:
        return {}

    def init(key: jax.Array) -> list[jax.Array]:
        made = flatten_dict(model.init_weights(key, model.input_shape))
        return [made[path].astype(leaf.dtype) for path, leaf in leaves.items()]

    # Under `jit` the leaves that are not returned are never made, nor what other devices hold.
    compiled = jax.jit(init, out_shardings=[leaf.sharding for leaf in leaves.values()])
    return dict(zip(leaves, compiled(key), strict=True))


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
