"""Keeping the examples that share a row of a causal language model apart."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from circflax.linen._calls import intercept_calls
from circflax.linen._inputs import first_input
from circflax.linen._replaced import replaced

R = TypeVar("R")


def keep_apart(run: Callable[..., R]) -> Callable[..., R]:
    """Makes a function that runs a causal linen model take examples packed into rows.

    Training on short examples wastes little where several of them share a row, provided that none
    attends to another. Given `segment_ids`, every attention that holds its causal mask as the
    attribute `causal_mask`, as the decoders of Hugging Face do, is kept within each example. An
    encoder, and a decoder's attention to it, are left alone.

    Positions are the caller's: give the model `position_ids` that begin again at 0 with each
    example, if it takes any.

    Wrap first, transform afterwards, in either order with `circflax.linen.attach`:
    `jax.jit(attach(keep_apart(model), plan))`.

    Args:
        run: anything that calls the model, except for generation with a cache: `module.apply`, a
            Hugging Face model, or a function of your own.

    Returns:
        A function of the same arguments and the keyword `segment_ids`: integers, (batch, length),
        equal where two tokens belong to one example, with a number of its own for padding. None
        leaves the model as it is.

    Raises:
        ValueError: when called, if `segment_ids` are no integers of the shape of the tokens, if
            the model calls no attention with a causal mask, or if it does so with a cache.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> import circflax as cf
        >>> class Mean(nn.Module):  # attends alike to what it may see
        ...     def setup(self):
        ...         self.causal_mask = nn.make_causal_mask(jnp.ones((1, 8)))
        ...     def __call__(self, x):
        ...         length = x.shape[1]
        ...         mask = self.causal_mask[:, 0, :length, :length]
        ...         return mask @ x / mask.sum(-1, keepdims=True)
        >>> x, segment_ids = jnp.array([[[2.0], [4.0], [8.0]]]), jnp.array([[1, 1, 2]])
        >>> apply = jax.jit(cf.linen.keep_apart(Mean().apply))
        >>> apply({}, x, segment_ids=segment_ids).ravel().tolist()
        [2.0, 3.0, 8.0]
    """

    @functools.wraps(run)
    def packed(*args: Any, segment_ids: jax.Array | None = None, **kwargs: Any) -> R:
        if segment_ids is None:
            return run(*args, **kwargs)
        separate = _Separate(jnp.asarray(segment_ids))
        with intercept_calls(separate):
            result = run(*args, **kwargs)
        if not separate.met:
            raise ValueError(
                "`run` called no attention that holds a causal mask, so that this model's examples"
                " cannot be kept apart: give it one example a row, and to `keep_apart` the function"
                " itself, not one that `jax.jit` has compiled before."
            )
        return result

    return packed


class _Separate:
    """The interceptor of one run of a model."""

    def __init__(self, segment_ids: jax.Array) -> None:
        if segment_ids.ndim != 2 or not jnp.issubdtype(segment_ids.dtype, jnp.integer):
            raise ValueError(
                "`segment_ids` must be integers of shape (batch, length), not"
                f" {segment_ids.dtype} of shape {segment_ids.shape}."
            )
        self._shape = segment_ids.shape
        self._same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        self.met = False

    def __call__(
        self,
        module: nn.Module,
        layer: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        # Made in the module's setup, which has run by now; an attribute of another kind is not it.
        causal = vars(module).get("causal_mask")
        if getattr(causal, "ndim", None) != 4:
            return layer(*args, **kwargs)
        self.met = True
        self._check(module, first_input(args, kwargs))
        length = self._shape[1]
        mask = jnp.logical_and(causal[:, :, :length, :length], self._same).astype(causal.dtype)
        with replaced(module, "causal_mask", mask):
            return layer(*args, **kwargs)

    def _check(self, module: nn.Module, x: jax.Array) -> None:
        name = "/".join(module.path)
        if jnp.shape(x)[:2] != self._shape:
            raise ValueError(
                f"`segment_ids` have shape {self._shape}, but `{name}` attends within"
                f" {jnp.shape(x)[:2]}: give a number to each token of each row."
            )
        if module.variables.get("cache"):
            raise ValueError(
                f"`{name}` attends with a cache, as in generation, where `segment_ids` cannot"
                " be kept apart: leave them out."
            )
