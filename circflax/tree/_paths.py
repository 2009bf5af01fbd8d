"""Names of modules and leaves in a tree of parameters, and the patterns that choose among them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from flax import traverse_util

Path = tuple[str, ...]
Tree = Mapping[str, Any]
"""A nested mapping of parameters, as Flax makes it."""

Patterns = str | Sequence[str]
"""A regular expression over slash-joined names, or several runs of whole name components."""


def flatten(tree: Tree) -> dict[Path, Any]:
    """The leaves of a nested mapping by their paths."""
    return traverse_util.flatten_dict(_plain(tree))


def unflatten(leaves: Mapping[Path, Any]) -> dict[str, Any]:
    """The nested dict of leaves given by their paths."""
    return traverse_util.unflatten_dict(dict(leaves))


def join(path: Path) -> str:
    """The slash-joined name of a path."""
    return "/".join(path)


def split(name: str) -> Path:
    """The path of a slash-joined name."""
    return tuple(name.split("/")) if name else ()


def natural_order(path: Path) -> list[tuple[int, str]]:
    """A sort key by which layer 2 comes before layer 10."""
    return [(int(c), "") if c.isdecimal() else (-1, c) for c in path]


def starred(name: str) -> str:
    """A name without the numbers of its layers.

    Example:
        >>> starred("layers_11/fc1/kernel")
        'layers_*/fc1/kernel'
    """
    return re.sub(r"(?<![^\W_])\d+(?![^\W_])", "*", name)


def ends_with(patterns: Patterns, path: Path) -> bool:
    """Whether a module is chosen: a regular expression matches all of its name, or it ends so."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, join(path)) is not None
    return any(path[-len(run) :] == run for run in map(split, patterns))


def contains(patterns: Patterns, path: Path) -> bool:
    """Whether a leaf is chosen: a regular expression matches all of its name, or it has a run."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, join(path)) is not None
    return any(f"/{pattern}/" in f"/{join(path)}/" for pattern in patterns)


def layer_index(path: Path) -> int | None:
    """The number of the layer that a module belongs to, if any.

    It is the first component that is a number, or else the first that ends in one.

    Example:
        >>> layer_index(("encoder", "layer", "3", "query")), layer_index(("layers_11", "mlp"))
        (3, 11)
    """
    for component in path:
        if component.isdecimal():
            return int(component)
    for component in path:
        if match := re.fullmatch(r"(?:.*\D)?(\d+)", component):
            return int(match[1])
    return None


def check_pattern(pattern: str) -> None:
    """Raises a ValueError if a string is not a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}.") from error


def _plain(tree: Tree) -> dict[str, Any]:
    # Older checkpoints come as FrozenDict, which flatten_dict takes for a leaf when nested.
    return {key: _plain(v) if isinstance(v, Mapping) else v for key, v in tree.items()}
