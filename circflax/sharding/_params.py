"""Where the frozen parameters lie."""

import logging
import math
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from circflax.sharding._mesh import FSDP
from circflax.sharding._rules import RULES, Rule, check_rules, find_axes, names_of
from circflax.tree import Tree
from circflax.tree._paths import flatten, join, starred, unflatten

_LOGGER = logging.getLogger(__name__)


def shard_params(params: Tree, mesh: Mesh, rules: Sequence[Rule] = RULES) -> dict[str, Any]:
    """Says where each of a model's frozen parameters lies.

    The rules cut up what is used in parts. Of each array with two axes or more, `fsdp` then cuts
    up the longest axis that it divides and that no rule has cut up, unless the rule names `fsdp`
    itself; biases and scales are on every device. What an axis of the mesh does not divide is not
    cut up by it, which is logged.

    Args:
        params: the model's parameters, arrays or `jax.ShapeDtypeStruct`s.
        mesh: as `make_mesh` makes it.
        rules: the first that matches a leaf's name counts.

    Returns:
        A tree like `params` of shardings.

    Raises:
        ShardingError: if a rule is no regular expression, names an axis that the mesh lacks, or
            is for arrays with more axes than it matches.

    Example:
        >>> import circflax as cf, jax, jax.numpy as jnp
        >>> mesh = cf.sharding.make_mesh(devices=jax.devices()[:1])
        >>> params = {"mlp": {"up_proj": {"kernel": jnp.zeros((8, 16)), "bias": jnp.zeros(16)}}}
        >>> shardings = cf.sharding.shard_params(params, mesh)
        >>> tuple(shardings["mlp"]["up_proj"]["kernel"].spec)
        ('fsdp', 'tensor')
    """
    check_rules(rules, mesh)
    shardings, whole = {}, {}
    for path, leaf in flatten(params).items():
        name = join(path)
        axes = list(find_axes(rules, name, len(leaf.shape)))
        for axis, entry in enumerate(axes):
            parts = math.prod(mesh.shape[one] for one in names_of(entry))
            if leaf.shape[axis] % parts:
                axes[axis] = None
                _note(whole, name, leaf.shape, names_of(entry), parts)
        if not any(FSDP in names_of(entry) for entry in axes) and len(axes) > 1:
            parts = mesh.shape[FSDP]
            free = [a for a, entry in enumerate(axes) if entry is None]
            if fitting := [a for a in free if leaf.shape[a] % parts == 0]:
                axes[max(fitting, key=leaf.shape.__getitem__)] = FSDP
            else:
                _note(whole, name, leaf.shape, (FSDP,), parts)
        shardings[path] = NamedSharding(mesh, PartitionSpec(*axes))
    for (name, shape, mesh_axes, parts), count in whole.items():
        times = f" ({count} of them)" if count > 1 else ""
        _LOGGER.warning(
            "`%s` of shape %s%s is not cut up over `%s`, whose %d devices do not divide it.",
            *(name, shape, times, "`, `".join(mesh_axes), parts),
        )
    return unflatten(shardings)


def _note(
    whole: dict[tuple, int],
    name: str,
    shape: tuple[int, ...],
    mesh_axes: tuple[str, ...],
    parts: int,
) -> None:
    """Counts an array that is not cut up; those of other layers with it."""
    key = (starred(name), shape, mesh_axes, parts)
    whole[key] = whole.get(key, 0) + 1
