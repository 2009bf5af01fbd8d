"""A Flax model from a Hugging Face configuration alone: shapes, and no weights."""

import inspect
import os
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from circflax.interop._checkpoint import find_model_class, initialise, read_config
from circflax.interop._model import make_model
from circflax.interop._names import head_leaves
from circflax.interop._tensors import CheckpointError
from circflax.linen import find_layouts
from circflax.tree import Layouts, Path

if TYPE_CHECKING:
    from transformers import FlaxPreTrainedModel, PretrainedConfig


@dataclass(frozen=True)
class Outline:
    """A Flax model without weights.

    Attributes:
        model: the model, made with `_do_init=False`.
        params: shapes of its parameters.
    """

    model: "FlaxPreTrainedModel"
    params: dict[str, Any]

    @property
    def new_leaves(self) -> tuple[Path, ...]:
        """Paths of what fine-tuning makes anew and trains in full: a head that classifies."""
        if not type(self.model).__name__.endswith("Classification"):
            return ()
        return head_leaves(self.model)

    def init(self, seed: int = 0) -> dict[str, Any]:
        """Random parameters, as the model's own initialisers make them.

        Args:
            seed: decides them.

        Returns:
            Arrays of the shapes and dtypes of `params`.
        """
        key = jax.random.PRNGKey(seed)
        return unflatten_dict(initialise(self.model, flatten_dict(self.params), key))

    def layouts(self) -> Layouts:
        """How the model's kernels are read as matrices; see `circflax.linen.find_layouts`."""
        inputs = {
            name: jnp.zeros(shape.shape, shape.dtype) for name, shape in self.inputs(1, 1).items()
        }
        return find_layouts(lambda params: self.run(params, inputs), self.params)

    def run(self, params: Any, inputs: Any) -> jax.Array:
        """The model's first output: its logits, where it has a head."""
        return self.model(**inputs, params=params)[0]

    def inputs(self, batch: int, length: int | None = None) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a batch: token ids with their mask, or images.

        Args:
            batch: number of examples.
            length: tokens of each, or None for 128 or the most that the model reads; images have
                the size that the configuration gives them.

        Returns:
            The model's arguments.

        Raises:
            CheckpointError: if the model reads something else, or not that many tokens.
        """
        most = getattr(self.model.config, "max_position_embeddings", None)
        length = min(128, most or 128) if length is None else length
        if batch < 1 or length < 1:
            raise CheckpointError(
                f"a batch has at least one example of one token, but it is {batch} × {length}."
            )
        match _inputs(self.model):
            case ["input_ids"]:
                if most is not None and length > most:
                    raise CheckpointError(f"the model reads {most} tokens at most, not {length}.")
                ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)
                return {"input_ids": ids, "attention_mask": ids}
            case ["pixel_values"]:
                # The model's own shape has the channels last, its argument in front.
                _, height, width, channels = self.model.input_shape
                shape = (batch, channels, height, width)
                return {"pixel_values": jax.ShapeDtypeStruct(shape, jnp.float32)}
            case names:
                raise CheckpointError(
                    f"`{type(self.model).__name__}` reads {', '.join(names)}: only models that"
                    " read tokens or images alone have shapes known here."
                )


def outline_model(
    source: "str | os.PathLike[str] | PretrainedConfig",
    head: str | None = None,
    *,
    dtype: DTypeLike = jnp.float32,
    revision: str | None = None,
) -> Outline:
    """Makes a Flax model of `transformers` from its configuration alone, without weights.

    Args:
        source: a `config.json`, a directory with one, the name of a repository on the Hugging Face
            Hub, or the configuration itself.
        head: the kind of head, as for `load_model`; "named" is the one that the configuration
            names; None takes one for classification, else one for language, else none.
        dtype: of the parameters, and of what the model computes in.
        revision: branch, tag or commit of a repository on the Hub; None is its default branch.

    Returns:
        The model and the shapes of its parameters.

    Raises:
        CheckpointError: if there is no such configuration, or no Flax model that follows it.

    Example:
        >>> from circflax.interop import outline_model
        >>> outline = outline_model("FacebookAI/roberta-large")  # doctest: +SKIP
        >>> outline.params["classifier"]["dense"]["kernel"]  # doctest: +SKIP
        ShapeDtypeStruct(shape=(1024, 1024), dtype=float32)
    """
    config = _read(source, revision) if isinstance(source, str | os.PathLike) else source
    found = _named_class(config) if head == "named" else find_model_class(config, head)
    model = make_model(found, config, dtype=jnp.dtype(dtype))

    def shape(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype) if floating else leaf.dtype)

    return Outline(model, jax.tree.map(shape, unfreeze(model.params_shape_tree)))


def _read(source: str | os.PathLike[str], revision: str | None) -> "PretrainedConfig":
    from huggingface_hub import hf_hub_download

    path = FilePath(source)
    if path.is_dir():
        path = path / "config.json"
    elif not path.is_file():
        try:
            path = FilePath(hf_hub_download(str(source), "config.json", revision=revision))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"`{source}` is neither a local file or directory nor a Hub repository within "
                f"reach: {str(error).splitlines()[0]}"
            ) from error
    return read_config(path, {})


def _named_class(config: "PretrainedConfig") -> "type[FlaxPreTrainedModel]":
    import transformers

    for name in config.architectures or ():
        if (found := getattr(transformers, f"Flax{name}", None)) is not None:
            return found
    raise CheckpointError(
        f"`transformers` has no Flax class for the architectures {config.architectures} that the"
        " configuration names."
    )


def _inputs(model: "FlaxPreTrainedModel") -> list[str]:
    """The arguments that a model cannot be called without."""
    parameters = inspect.signature(type(model).__call__).parameters.values()
    needed = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
    return needed[1:]
