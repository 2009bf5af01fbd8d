"""Flax models that follow their configuration where their class does not."""

import copy
from typing import TYPE_CHECKING

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from circflax.interop._rotary import head_size, with_rotary
from circflax.interop._tensors import CheckpointError

if TYPE_CHECKING:
    from transformers import FlaxPreTrainedModel, PretrainedConfig


def make_model(
    model_class: "type[FlaxPreTrainedModel]",
    config: "PretrainedConfig",
    *,
    dtype: DTypeLike = jnp.float32,
    seed: int = 0,
) -> "FlaxPreTrainedModel":
    """Makes a Flax model that computes what PyTorch does with the same configuration.

    The classes of Llama, Mistral and Gemma know one rotary table (see `with_rotary`), and
    Mistral's reads `sliding_window` in a way of its own. Their module is replaced where that
    matters; the configuration stays what it is.

    Args:
        model_class: The Flax class.
        config: The configuration.
        dtype: The dtype the model computes in.
        seed: The seed of the model's own random numbers.

    Returns:
        The model, made with `_do_init=False`.

    Raises:
        CheckpointError: If the class cannot follow the configuration.
    """
    from transformers import (
        FlaxGemmaPreTrainedModel,
        FlaxLlamaPreTrainedModel,
        FlaxMistralPreTrainedModel,
    )

    if issubclass(model_class, FlaxLlamaPreTrainedModel | FlaxMistralPreTrainedModel):
        _check_heads(model_class, config)
    model = model_class(config, seed=seed, dtype=dtype, _do_init=False)
    module = model.module
    if isinstance(model, FlaxMistralPreTrainedModel):
        module = _with_window(module)
    if isinstance(
        model, FlaxLlamaPreTrainedModel | FlaxMistralPreTrainedModel | FlaxGemmaPreTrainedModel
    ):
        module = with_rotary(module)
    # `model.module` reads this attribute, and has no setter.
    model._module = module
    return model


def _check_heads(model_class: "type[FlaxPreTrainedModel]", config: "PretrainedConfig") -> None:
    size, heads = config.hidden_size, config.num_attention_heads
    if size != heads * head_size(config):
        raise CheckpointError(
            f"The configuration has `head_dim={head_size(config)}`, but `{model_class.__name__}`"
            f" splits its {size} features among {heads} heads, which makes {size / heads:g} each."
        )


def _with_window(module: nn.Module) -> nn.Module:
    """Makes Mistral's attention reach as far as PyTorch's.

    In PyTorch a window of w holds w tokens, and None all before; in Flax it holds w + 1, and with
    None the token alone.
    """
    config = copy.copy(module.config)
    window = config.sliding_window
    config.sliding_window = config.max_position_embeddings if window is None else window - 1
    return module.clone(config=config)
