"""Where what trains lies: adapters, leaves trained in full, and the optimizer's state."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from circflax.sharding._mesh import TENSOR, replicated
from circflax.sharding._rules import names_of
from circflax.tree import ADAPTER, Plan, Target, Tree
from circflax.tree._paths import Path, flatten, unflatten


def shard_adapters(plan: Plan, base: Tree) -> dict[str, Any]:
    """Says where each array of the small tree lies.

    Adapters are small, so that every device holds them whole, save where their kernel is used in
    parts (`tensor`): an array's axis that runs along the layer's inputs or outputs is then cut up
    as the kernel's is, if it divides, so that no device makes or reduces more than its part. An
    axis of stacked layers lies as the kernel's does. Leaves trained in full lie as in the base.

    Args:
        plan: as `make_plan` made it.
        base: shardings of the frozen parameters, as `shard_params` gives them.

    Returns:
        A tree like the small tree of shardings.

    Example:
        >>> import circflax as cf, jax, jax.numpy as jnp
        >>> params = {"query": {"kernel": jnp.zeros((8, 8))}}
        >>> config = cf.AdapterConfig(method=cf.CDVFT(), targets=("query",))
        >>> plan = cf.make_plan(params, config)
        >>> mesh = cf.sharding.make_mesh(devices=jax.devices()[:1])
        >>> base = cf.sharding.shard_params(params, mesh)
        >>> tuple(cf.sharding.shard_adapters(plan, base)["query"]["adapter"]["a1"].spec)
        (None,)
    """
    known = flatten(base)
    shardings = {path: known[path] for path in plan.trained}
    for target in plan.targets:
        kernel = known[target.kernel_path]
        for name, shape in target.shapes.items():
            spec = _spec(target, name, shape, kernel)
            shardings[(*target.path, ADAPTER, name)] = NamedSharding(kernel.mesh, spec)
    return unflatten(shardings)


def _spec(
    target: Target, name: str, shape: jax.ShapeDtypeStruct, kernel: NamedSharding
) -> PartitionSpec:
    """How one array of an adapter is cut up, after its kernel."""
    entries = (*kernel.spec, *(None,) * (len(target.shape) - len(kernel.spec)))
    roles = target.layout.roles
    stacked = entries[: len(target.layers)]
    split = {role for role, entry in zip(roles, entries, strict=True) if TENSOR in names_of(entry)}
    parts = kernel.mesh.shape.get(TENSOR, 1)
    own = target.method.axes().get(name, (None,) * (len(shape.shape) - len(stacked)))
    sizes = shape.shape[len(stacked) :]
    cut = (
        TENSOR if role in split and size % parts == 0 else None
        for role, size in zip(own, sizes, strict=True)
    )
    return PartitionSpec(*stacked, *cut)


def shard_like(tree: Any, small: Tree, shardings: Tree, mesh: Mesh) -> Any:
    """Says where an optimizer's state lies: moments as what they are of, all else on every device.

    Args:
        tree: any tree of arrays or `jax.ShapeDtypeStruct`s, such as an `optax` state, that holds
            trees of the small tree's names.
        small: the small tree, or its shapes.
        shardings: where its arrays lie, as `shard_adapters` gives it.
        mesh: the mesh.

    Returns:
        A tree like `tree` of shardings.
    """
    shapes, known = flatten(small), flatten(shardings)

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        for start in range(len(names)):
            own: Path = names[start:]
            if own in shapes and shapes[own].shape == leaf.shape:
                return known[own]
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, tree)
