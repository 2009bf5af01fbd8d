"""Seeing every module of a linen model called."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from flax import linen as nn

Intercept = Callable[[nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""From a module, its call and the call's arguments to what the call is to give."""


def intercept_calls(intercept: Intercept) -> AbstractContextManager[None]:
    """Puts a function in the place of every module's `__call__` for a while.

    Args:
        intercept: is given the bound module, whose setup has run, the function that it would have
            called, and the positional and keyword arguments; other methods it does not see.

    Returns:
        A context manager.
    """

    def interceptor(
        layer: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        if context.method_name != "__call__":
            return layer(*args, **kwargs)
        return intercept(context.module, layer, args, kwargs)

    return nn.intercept_methods(interceptor)
