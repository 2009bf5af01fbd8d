"""Adapters as a small tree beside the frozen one: make, combine, merge, unmerge, switch off."""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from circflax.methods import Additive, Params
from circflax.tree._paths import Path, Patterns, Tree, ends_with, flatten, join, unflatten
from circflax.tree._plan import ADAPTER, Plan, Target


def init_adapters(key: jax.Array, plan: Plan, params: Tree) -> dict[str, Any]:
    """Makes the small tree that trains: fresh adapters, and copies of the leaves trained in full.

    It nests like the frozen tree, an adapter's arrays under the name `adapter` inside its module.
    A stack of layers gets a stack of adapters, with the same leading axes. All its arrays are
    float32. An adapter's draw depends on the key and its own name alone.

    Args:
        key: PRNG key.
        plan: as `make_plan` finds it for these parameters.
        params: the model's parameters; `jax.ShapeDtypeStruct`s give a tree of the same.

    Returns:
        The small tree.

    Raises:
        ValueError: if the plan was made for other parameters.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from circflax import CDVFT, AdapterConfig, init_adapters, make_plan
        >>> params = {"query": {"kernel": jnp.zeros((8, 8))}}
        >>> plan = make_plan(params, AdapterConfig(method=CDVFT(), targets=("query",)))
        >>> adapters = init_adapters(jax.random.key(0), plan, params)
        >>> jax.tree.map(jnp.shape, adapters)
        {'query': {'adapter': {'a1': (8,), 'a3': (8,), 'c2': (1, 1, 8)}}}
    """
    leaves = flatten(params)
    check_plan(plan, leaves)
    abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves.values())
    if abstract:
        return jax.eval_shape(lambda key, leaves: _init(key, plan, leaves), key, leaves)
    return _init(key, plan, leaves)


def combine(params: Tree, adapters: Tree) -> dict[str, Any]:
    """Puts the small tree into the frozen one: the parameters that an adapted model takes.

    Leaves trained in full take the place of the base's, in the base's dtype; adapters stand
    beside their layers' arrays. Neither argument is changed or copied, so that inside a jitted
    function the call costs nothing.

    Args:
        params: the frozen parameters.
        adapters: the small tree.

    Returns:
        One tree of parameters.

    Raises:
        ValueError: if the small tree has a leaf whose place the frozen one lacks.

    Example:
        >>> combined = combine({"query": {"kernel": 1.0}}, {"query": {"adapter": {"w": 2.0}}})
        >>> combined
        {'query': {'kernel': 1.0, 'adapter': {'w': 2.0}}}
    """
    leaves = flatten(params)
    modules = {path[:-1] for path in leaves}
    for path, leaf in flatten(adapters).items():
        if path in leaves:
            leaves[path] = _as_in_base(path, leaf, leaves[path])
        elif ADAPTER in path and path[: path.index(ADAPTER)] in modules:
            leaves[path] = leaf
        else:
            raise ValueError(
                f"the adapters have a leaf {join(path)!r}, for which the base model has no place:"
                " they belong to another model."
            )
    return unflatten(leaves)


def merge(params: Tree, adapters: Tree, plan: Plan, *, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Folds the adapters into the kernels: parameters of the plain model with the same outputs.

    Each kernel is computed in `dtype` and rounded once to its own; methods that change what a layer
    does with its bias change the bias likewise. Kernels whose adapters were switched off stay as
    they are; leaves trained in full take their trained values.

    Args:
        params: the frozen parameters.
        adapters: the small tree.
        plan: as it was made for these parameters.
        dtype: float32, or float64 for the last digit.

    Returns:
        A tree like `params`, whose untouched leaves are the same arrays.

    Raises:
        ValueError: if a result is not finite, or the trees and the plan do not fit.
    """
    return _fold(params, adapters, plan, merge_kernel, merge_bias, dtype)


def unmerge(
    params: Tree, adapters: Tree, plan: Plan, *, dtype: Any = jnp.float32
) -> dict[str, Any]:
    """Takes adapters out of merged kernels again, up to the rounding of both ways.

    Leaves trained in full keep their trained values, since the merged tree does not hold the
    original ones.

    Args:
        params: merged parameters, as `merge` returns them.
        adapters: the small tree that was merged.
        plan: as it was made for the base.
        dtype: as given to `merge`.

    Returns:
        A tree like `params`.

    Raises:
        ValueError: if a result is not finite, or the trees and the plan do not fit.
    """
    return _fold(params, adapters, plan, unmerge_kernel, unmerge_bias, dtype)


def merge_kernel(
    target: Target, adapter: Params, kernel: jax.Array, *, dtype: Any = jnp.float32
) -> jax.Array:
    """One layer's kernel with its adapter folded in, in the kernel's own shape and dtype.

    Args:
        target: the layer, from a plan.
        adapter: the adapter's arrays.
        kernel: the layer's weights as the model stores them.
        dtype: of the computation; the result is rounded once.

    Returns:
        The merged kernel.

    Raises:
        ValueError: if the result is not finite.
    """
    return _fold_kernel(target.method.merge, target, adapter, kernel, dtype)


def unmerge_kernel(
    target: Target, adapter: Params, kernel: jax.Array, *, dtype: Any = jnp.float32
) -> jax.Array:
    """The inverse of `merge_kernel`, up to rounding."""
    return _fold_kernel(target.method.unmerge, target, adapter, kernel, dtype)


def merge_bias(
    target: Target, adapter: Params, bias: jax.Array, *, dtype: Any = jnp.float32
) -> jax.Array:
    """One layer's bias with its adapter folded in, as `merge_kernel` does the kernel."""
    return _fold_bias(target.method.merge_bias, target, adapter, bias, dtype)


def unmerge_bias(
    target: Target, adapter: Params, bias: jax.Array, *, dtype: Any = jnp.float32
) -> jax.Array:
    """The inverse of `merge_bias`, up to rounding."""
    return _fold_bias(target.method.unmerge_bias, target, adapter, bias, dtype)


def switch_off(adapters: Tree, targets: Patterns = ".*") -> dict[str, Any]:
    """The small tree without some of its adapters, whose layers then are the base model's.

    Args:
        adapters: the small tree.
        targets: names that a module's path ends with, or one regular expression that matches
            whole paths; by default all. Leaves trained in full stay.

    Returns:
        The smaller tree.

    Raises:
        ValueError: if no adapter is chosen.

    Example:
        >>> switch_off({"query": {"adapter": {"w": 1.0}}, "head": {"kernel": 2.0}})
        {'head': {'kernel': 2.0}}
    """
    leaves = flatten(adapters)
    off = {
        path
        for path in leaves
        if ADAPTER in path and ends_with(targets, path[: path.index(ADAPTER)])
    }
    if not off:
        raise ValueError(f"no adapter belongs to a module that matches {targets!r}.")
    return unflatten({path: leaf for path, leaf in leaves.items() if path not in off})


@dataclass(frozen=True)
class AdapterReport:
    """One adapter in numbers.

    Attributes:
        name: its layer's slash-joined name, with the layer's number in a stack.
        method: its method's name.
        parameter_count: number of trainable parameters.
        norm: Frobenius norm of the update; None if the method adds nothing to the kernel but
            multiplies it.
        rank: numerical rank of the update, or None likewise.
    """

    name: str
    method: str
    parameter_count: int
    norm: float | None
    rank: int | None


def report_adapters(adapters: Tree, plan: Plan) -> list[AdapterReport]:
    """Parameter count, norm and numerical rank of every adapter's update.

    The rank counts singular values above the largest times the larger width times float32's
    epsilon, as `numpy.linalg.matrix_rank` does for a float32 matrix.

    Args:
        adapters: the small tree.
        plan: as it was made for the base.

    Returns:
        A report for each layer with an adapter, stacked layers one by one.
    """
    reports = []
    for target, adapter in adapters_by_target(adapters, plan):
        deltas = None
        if isinstance(target.method, Additive):
            deltas = np.asarray(dense_delta(target, adapter))
        for index in np.ndindex(*target.layers):
            delta = None if deltas is None else deltas[index]
            suffix = "".join(f"[{i}]" for i in index)
            reports.append(
                AdapterReport(
                    name=target.name + suffix,
                    method=target.method.name,
                    parameter_count=target.parameter_count // max(1, int(np.prod(target.layers))),
                    norm=None if delta is None else float(np.linalg.norm(delta)),
                    rank=None if delta is None else int(np.linalg.matrix_rank(delta)),
                )
            )
    return reports


def dense_delta(target: Target, adapter: Params) -> jax.Array:
    """What an adapter of an additive method adds to its layer's kernel.

    Args:
        target: the layer.
        adapter: the adapter's arrays.

    Returns:
        Shape `(*layers, in_features, out_features)`.

    Raises:
        ValueError: if the method multiplies the kernel instead.
    """
    method = target.method
    if not isinstance(method, Additive):
        raise ValueError(
            f"{method.name} adds nothing to the kernel of {target.name!r}: it multiplies it."
        )
    delta = partial(method.delta, in_features=target.in_features, out_features=target.out_features)
    return _each_layer(delta, target)(dict(adapter))


def adapters_by_target(adapters: Tree, plan: Plan) -> list[tuple[Target, dict[str, jax.Array]]]:
    """Pairs the adapters of a small tree with their layers.

    Raises:
        ValueError: if a leaf belongs to no target and is not trained in full, or has another
            shape than the plan says.
    """
    grouped: dict[Path, dict[str, jax.Array]] = {}
    for path, leaf in flatten(adapters).items():
        if ADAPTER in path:
            grouped.setdefault(path[: path.index(ADAPTER)], {})[path[-1]] = leaf
        elif path not in plan.trained:
            raise ValueError(f"the adapters have a leaf {join(path)!r} that the plan lacks.")
    pairs = []
    for path, adapter in grouped.items():
        target = plan.by_path.get(path)
        if target is None:
            raise ValueError(f"the plan has no target {join(path)!r}, but there is its adapter.")
        found = {name: leaf.shape for name, leaf in adapter.items()}
        expected = {name: leaf.shape for name, leaf in target.shapes.items()}
        if found != expected:
            raise ValueError(
                f"the adapter of {target.name!r} has arrays {found}, but {target.method} needs"
                f" {expected}."
            )
        pairs.append((target, adapter))
    return pairs


def check_plan(plan: Plan, leaves: Mapping[Path, Any]) -> None:
    """Raises a ValueError if the leaves of a model are not those that a plan was made for."""
    for target in plan.targets:
        kernel = leaves.get(target.kernel_path)
        if kernel is None:
            raise ValueError(
                f"the model has no {join(target.kernel_path)!r}, which the adapters belong to."
            )
        if tuple(kernel.shape) != target.shape:
            raise ValueError(
                f"{join(target.kernel_path)!r} has shape {tuple(kernel.shape)}, but the adapters"
                f" belong to a model where it is {target.shape}."
            )
    for path in plan.trained:
        if path not in leaves:
            raise ValueError(f"the model has no {join(path)!r}, which the plan trains in full.")


def _init(key: jax.Array, plan: Plan, leaves: dict[Path, jax.Array]) -> dict[str, Any]:
    small: dict[Path, jax.Array] = {}
    for path in plan.trained:
        # A copy, since training donates its buffers and the base keeps its own.
        small[path] = jnp.array(leaves[path], dtype=jnp.float32, copy=True)
    for target in plan.targets:
        init = partial(_init_one, target.method, target.in_features, target.out_features)
        own_key = jax.random.fold_in(key, zlib.crc32(target.name.encode()))
        keys = jax.random.split(own_key, target.layers) if target.layers else own_key
        adapter = _each_layer(init, target)(keys, target.layout.matrix(leaves[target.kernel_path]))
        small |= {(*target.path, ADAPTER, name): array for name, array in adapter.items()}
    return unflatten(small)


def _init_one(
    method: Any, in_features: int, out_features: int, key: jax.Array, kernel: jax.Array
) -> Params:
    return method.init(key, in_features, out_features, kernel)


def _as_in_base(path: Path, leaf: Any, base: Any) -> Any:
    if jnp.shape(leaf) != jnp.shape(base):
        raise ValueError(
            f"the trained leaf {join(path)!r} has shape {jnp.shape(leaf)}, but the base model's"
            f" has {jnp.shape(base)}."
        )
    return leaf.astype(base.dtype)


_FoldLeaf = Callable[..., jax.Array]


def _fold(
    params: Tree,
    adapters: Tree,
    plan: Plan,
    fold_kernel: _FoldLeaf,
    fold_bias: _FoldLeaf,
    dtype: Any,
) -> dict[str, Any]:
    leaves = flatten(params)
    check_plan(plan, leaves)
    for path, leaf in flatten(adapters).items():
        if ADAPTER not in path and path in leaves:
            leaves[path] = _as_in_base(path, leaf, leaves[path])
            if not jnp.isfinite(leaves[path]).all():
                raise ValueError(f"the trained leaf {join(path)!r} is not finite.")
    for target, adapter in adapters_by_target(adapters, plan):
        kernel, bias = target.kernel_path, target.bias_path
        leaves[kernel] = fold_kernel(target, adapter, leaves[kernel], dtype=dtype)
        if target.method.changes_bias and bias is not None:
            leaves[bias] = fold_bias(target, adapter, leaves[bias], dtype=dtype)
    return unflatten(leaves)


def _fold_kernel(
    fold: Callable[[Params, jax.Array], jax.Array],
    target: Target,
    adapter: Params,
    kernel: jax.Array,
    dtype: Any,
) -> jax.Array:
    def folded(adapter: Params, kernel: jax.Array) -> jax.Array:
        matrix = _each_layer(fold, target)(adapter, target.layout.matrix(kernel))
        return target.layout.kernel(matrix, target.shape)

    return _computed(folded, adapter, kernel, dtype, f"the merged kernel of {target.name!r}")


def _fold_bias(
    fold: Callable[[Params, jax.Array], jax.Array],
    target: Target,
    adapter: Params,
    bias: jax.Array,
    dtype: Any,
) -> jax.Array:
    def folded(adapter: Params, bias: jax.Array) -> jax.Array:
        flat = bias.reshape(*target.layers, target.out_features)
        return _each_layer(fold, target)(adapter, flat).reshape(bias.shape)

    return _computed(folded, adapter, bias, dtype, f"the merged bias of {target.name!r}")


def _each_layer(function: Callable[..., jax.Array], target: Target) -> Callable[..., jax.Array]:
    """The function over the axes of arrays that stack layers."""
    for _ in target.layers:
        function = jax.vmap(function)
    return function


def _computed(
    folded: Callable[[Params, jax.Array], jax.Array],
    adapter: Params,
    leaf: jax.Array,
    dtype: Any,
    what: str,
) -> jax.Array:
    """A folded leaf in its own dtype, computed in another."""
    with jax.enable_x64(jnp.dtype(dtype) == np.float64):
        adapter = {name: jnp.asarray(array, dtype) for name, array in adapter.items()}
        # Checked in the leaf's dtype, whose range may be smaller than the computation's.
        result = folded(adapter, jnp.asarray(leaf, dtype)).astype(leaf.dtype)
        if not jnp.isfinite(result).all():
            raise ValueError(f"{what} is not finite.")
        return result
