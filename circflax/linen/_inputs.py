"""A layer's input among the arguments of a call: its first argument, by position or keyword."""

from typing import Any

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The layer's input, or None if the call has no arguments."""
    return args[0] if args else next(iter(kwargs.values()), None)


def with_first_input(args: tuple[Any, ...], kwargs: dict[str, Any], x: Any) -> Arguments:
    """The arguments with another input."""
    if args:
        return (x, *args[1:]), kwargs
    return args, {**kwargs, next(iter(kwargs)): x}
