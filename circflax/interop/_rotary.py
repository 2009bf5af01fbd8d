"""Rotary tables as a configuration asks for them, where a Flax class makes others.

The Flax classes of `transformers` with rotary positions make their tables with the base 10000
whatever `rope_theta` and `rope_scaling` say. A table is an attribute that a module's setup makes,
so the right one takes its place while the module is called.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from circflax.interop._tensors import CheckpointError
from circflax.linen._calls import intercept_calls
from circflax.linen._replaced import replaced

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_FLAX_BASE = 10000.0
_KNOWN = ("default", "linear", "llama3")


def with_rotary(module: nn.Module) -> nn.Module:
    """Makes a model's module use the rotary tables of its configuration.

    Args:
        module: The unbound linen module of a model whose tables are attributes named `sincos`.

    Returns:
        A module of a subclass of its class; itself where its own tables are right.

    Raises:
        CheckpointError: If the configuration asks for tables that are not known here.
    """
    config = module.config
    frequencies = rotary_frequencies(config)
    if np.array_equal(frequencies, _unscaled(_FLAX_BASE, 2 * len(frequencies))):
        return module

    class Rotary(type(module)):
        # Not wrapped, so that interceptors see one call of the model, its own class's.
        @nn.nowrap
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            table = jnp.asarray(rotary_table(frequencies, config.max_position_embeddings))
            with intercept_calls(partial(_rotate, table)):
                return super().__call__(*args, **kwargs)

    fields = (field.name for field in dataclasses.fields(module) if field.init)
    return Rotary(
        **{name: getattr(module, name) for name in fields if name not in ("name", "parent")}
    )


def head_size(config: "PretrainedConfig") -> int:
    """The features of one attention head, as PyTorch reads them off a configuration."""
    given = getattr(config, "head_dim", None)
    return given or config.hidden_size // config.num_attention_heads


def rotary_frequencies(config: "PretrainedConfig") -> np.ndarray:
    """Returns the angles by which features turn from one position to the next.

    Args:
        config: The model's configuration: `rope_theta`, and `rope_scaling` if there is any.

    Returns:
        Radians, float64 of shape (head size / 2,).

    Raises:
        CheckpointError: If the type of `rope_scaling` is not known, or a number of it is missing.
    """
    frequencies = _unscaled(config.rope_theta, head_size(config))
    scaling = getattr(config, "rope_scaling", None) or {"rope_type": "default"}
    match scaling.get("rope_type", scaling.get("type")):
        case "default":
            return frequencies
        case "linear":
            (factor,) = _numbers(scaling, "factor")
            return frequencies / factor
        case "llama3":
            factor, low, high, length = _numbers(
                scaling,
                "factor",
                "low_freq_factor",
                "high_freq_factor",
                "original_max_position_embeddings",
            )
            # Slow features are slowed down, fast ones kept, and those between them blended.
            turns = length * frequencies / (2 * math.pi)
            kept = np.clip((turns - low) / (high - low), 0, 1)
            return frequencies * (kept + (1 - kept) / factor)
        case kind:
            raise CheckpointError(
                f"`rope_scaling` is of the type `{kind}`, of which no rotary tables are known"
                f" here; those of {', '.join(_KNOWN)} are."
            )


def rotary_table(frequencies: np.ndarray, positions: int) -> np.ndarray:
    """Returns the sines, then the cosines, of every position's angles.

    Args:
        frequencies: Radians a position, float64 of shape (head size / 2,).
        positions: The number of positions.

    Returns:
        A float32 array of shape (positions, 1, 2 * head size), in Flax's order.
    """
    # Late positions have large angles, of which float32 keeps too little.
    angles = np.outer(np.arange(positions), frequencies)
    sine, cosine = np.sin(angles, dtype=np.float64), np.cos(angles, dtype=np.float64)
    return np.concatenate([sine, sine, cosine, cosine], -1).astype(np.float32)[:, None]


def _unscaled(base: float, size: int) -> np.ndarray:
    return 1 / base ** (np.arange(0, size, 2) / size)


def _numbers(scaling: Mapping[str, Any], *names: str) -> list[float]:
    for name in names:
        if not isinstance(scaling.get(name), int | float):
            raise CheckpointError(
                f"`rope_scaling` needs the number `{name}`, but it holds {dict(scaling)}."
            )
    return [scaling[name] for name in names]


def _rotate(
    table: jax.Array,
    module: nn.Module,
    layer: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Calls a module with the table, if it has one of its own, made in its setup."""
    if vars(module).get("sincos") is None:
        return layer(*args, **kwargs)
    with replaced(module, "sincos", table):
        return layer(*args, **kwargs)
