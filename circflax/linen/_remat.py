"""Recomputing a linen model's layers in the backward pass instead of keeping what they computed."""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import jax
from flax import linen as nn

from circflax.linen._calls import intercept_calls

P = ParamSpec("P")
R = TypeVar("R")


def rematerialize(run: Callable[P, R]) -> Callable[P, R]:
    """Makes a function that runs a linen model keep less for its gradient.

    What each of the model's repeated layers computes inside is computed again in the backward pass
    (gradient checkpointing, `nn.remat`): the memory for activations shrinks to about one layer's
    plus every layer's input, for about a third more time. Values and gradients stay the same.

    A repeated layer is a module made of modules whose name is a number (`layers/0`), or ends in
    one that tells it from another module beside it (`block_0`, `block_1`); what it has inside is
    part of it. A model that scans its layers has none: transform these with `nn.remat_scan`.

    Wrap first, transform afterwards, in either order with `circflax.linen.attach` and
    `circflax.linen.keep_apart`: `jax.grad(rematerialize(attach(model.apply, plan)))`.

    Args:
        run: anything that calls the model to train it: `module.apply`, a Hugging Face model, or
            a function of your own.

    Returns:
        A function of the same arguments.

    Raises:
        ValueError: when called, if the model calls no such layer.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> import circflax as cf
        >>> model = nn.Sequential([nn.Sequential([nn.Dense(4), nn.gelu]) for _ in range(3)])
        >>> x = jnp.ones((2, 4))
        >>> variables = model.init(jax.random.key(0), x)
        >>> def saved(apply):
        ...     vjp = jax.eval_shape(lambda v: jax.vjp(lambda v: apply(v, x), v)[1], variables)
        ...     return sum(leaf.size for leaf in jax.tree.leaves(vjp))
        >>> saved(cf.linen.rematerialize(model.apply)) < saved(model.apply)
        True
    """

    @functools.wraps(run)
    def rematerialized(*args: P.args, **kwargs: P.kwargs) -> R:
        recompute = _Recompute()
        with intercept_calls(recompute):
            result = run(*args, **kwargs)
        if not recompute.met:
            raise ValueError(
                "`run` called no numbered layer made of modules, such as `layers/0` or `block_0`"
                " beside `block_1`, so that there is nothing to rematerialize: give the function"
                " itself, not one that `jax.jit` has compiled before."
            )
        return result

    return rematerialized


class _Recompute:
    """The interceptor of one run of a model."""

    def __init__(self) -> None:
        self._inside = False
        self.met = False

    def __call__(
        self,
        module: nn.Module,
        layer: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if self._inside or not _is_repeated(module):
            return layer(*args, **kwargs)
        leaves, tree = jax.tree.flatten((args, kwargs))
        # Flags and the like stay what they are: the layer may branch on them.
        traced = [isinstance(leaf, jax.Array) for leaf in leaves]

        def call(copy: nn.Module, arrays: list[jax.Array]) -> Any:
            known = iter(arrays)
            filled = [
                next(known) if is_traced else leaf
                for leaf, is_traced in zip(leaves, traced, strict=True)
            ]
            args, kwargs = jax.tree.unflatten(tree, filled)
            # Called as a module, so that interceptors see the copy that linen makes for lifting.
            return copy(*args, **kwargs)

        self.met = self._inside = True
        try:
            return nn.remat(call)(module, [x for x, yes in zip(leaves, traced, strict=True) if yes])
        finally:
            self._inside = False


def _is_repeated(module: nn.Module) -> bool:
    """Whether a module is one of several alike, itself made of modules."""
    name = module.path[-1] if module.path else ""
    stem = _stem(name)
    params = module.variables.get("params", {})
    if stem is None or not any(isinstance(leaf, Mapping) for leaf in params.values()):
        return False
    # A number alone is a place in a list, but a lone `Encoder_0` a name that linen gave. Beside a
    # module that the model itself transforms nothing can be seen.
    if not stem or not isinstance(module.parent, nn.Module):
        return True
    return any(
        other != name and _stem(other) == stem for other in module.parent.variables["params"]
    )


def _stem(name: str) -> str | None:
    """What stands before the number that a module's name ends in; None without a number."""
    match = re.fullmatch(r"(?:(.*)_)?\d+", name)
    return match and (match[1] or "")
