"""Another value for what a module's setup made, while the module is called."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flax import linen as nn


@contextmanager
def replaced(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Gives a module's attribute another value for a while.

    Args:
        module: a bound module whose setup has run, as it has when a method is intercepted.
        name: the attribute.
        value: its value meanwhile.
    """
    own = vars(module)[name]
    # Linen freezes a module after its setup; its own value is back before anyone else looks.
    object.__setattr__(module, name, value)
    try:
        yield
    finally:
        object.__setattr__(module, name, own)
