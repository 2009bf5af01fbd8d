"""The primitive behind every product: a multilinear form and its gradients.

Every product here, and each of its derivatives, is a gradient of one scalar,

    <g, diag(left) B(kernel) diag(right) x>,

with respect to one of its five arguments, each of which it is linear in: the gradient with respect
to `g` is the product, to `x` the transposed product, to `kernel`, `left` and `right` what training
needs. The derivative of one is another, so that one rule serves both modes to any order, and
nothing but the arguments is kept for the backward pass: matrices are cut to the sizes of vectors
and diagonals, and vectors keep their leading axes, until a gradient is computed. Vectors may be in
parts, side by side: so matrices that read the same vectors share what is computed of them. A
differential is one operation, so that its transpose, the gradients of a backward pass, is one too.
How a gradient is computed is chosen where it is lowered, when shapes, dtype and platform are known.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from circflax.ops._checks import Convention
from circflax.ops._evaluate import NAMES, by_name, evaluate, evaluate_together, rank_of


def fitted_product(
    kernel: jax.Array,
    x: jax.Array,
    left: jax.Array,
    right: jax.Array | None,
    strategy: str | None,
) -> jax.Array:
    """`diag(left) B(kernel) diag(right) x`, the matrix cut to the sizes of its neighbours.

    Args:
        kernel: first columns, `(out_blocks, in_blocks, block)`.
        x: `(..., in_features)`, the last block cut.
        left: `(out_features,)`, the last block cut.
        right: `(in_features,)`, or None for ones.
        strategy: how to compute it and its derivatives, or None for what `choose_form` chooses.

    Returns:
        `(..., out_features)`, in the dtype of `x`.
    """
    block = kernel.shape[2]
    # Spare blocks multiply nothing.
    kernel = kernel[: math.ceil(left.size / block), : math.ceil(x.shape[-1] / block)]
    factors = {"left": left, "kernel": kernel}
    if right is not None:
        factors["right"] = right
    (y,) = _apply(factors, x, "x", (left.size,), strategy)
    return y


def stacked_products(
    kernels: Sequence[jax.Array],
    x: jax.Array,
    out_features: Sequence[int],
    convention: Convention,
    strategy: str | None,
) -> list[jax.Array]:
    """The products of several block-circulant matrices with the same vectors.

    Args:
        kernels: each `(out_blocks, in_blocks, block)`, alike but for `out_blocks`.
        x: `(..., in_features)`, the last block cut.
        out_features: of each matrix, the last block cut.
        convention: whether kernels hold first columns or first rows.
        strategy: as in `fitted_product`.

    Returns:
        For each matrix `(..., out_features)`, in the dtype of `x`.
    """
    kernel = jnp.concatenate(kernels)
    if convention == "column":
        return _apply({"kernel": kernel}, x, "x", out_features, strategy)
    # Blocks given by their rows are those given by their columns, transposed.
    return _apply({"kernel": kernel.swapaxes(0, 1)}, x, "g", out_features, strategy)


def _apply(
    factors: dict[str, jax.Array],
    vectors: jax.Array,
    side: str,
    sizes: Sequence[int],
    strategy: str | None,
) -> list[jax.Array]:
    """What the factors make of vectors that stand on one side of them, in parts of these sizes."""
    arguments = {name: [array] for name, array in factors.items()} | {side: [vectors]}
    shapes = tuple((*vectors.shape[:-1], size) for size in sizes)
    wrt = "g" if side == "x" else "x"
    return _bind(arguments, wrt, shapes, vectors.dtype, rank=vectors.ndim, strategy=strategy)


_form_p = Primitive("circulant_form")
_form_p.multiple_results = True


def _bind(
    arguments: Mapping[str, Sequence[Any]],
    wrt: str,
    shapes: tuple[tuple[int, ...], ...],
    dtype: Any,
    **params: Any,
) -> list[jax.Array]:
    """The gradient with respect to one argument, part by part, given the parts of the others."""
    names, parts = zip(
        *((name, part) for name in NAMES for part in arguments.get(name, ())), strict=True
    )
    return _form_p.bind(*parts, names=names, wrt=wrt, shapes=shapes, dtype=dtype, **params)


@_form_p.def_abstract_eval
def _abstract(
    *operands: Any, names: tuple[str, ...], shapes: tuple, dtype: Any, rank: int, **_: Any
) -> list[Any]:
    batch = operands[0].shape[: operands[0].ndim - rank_of(names[0], rank)]
    return [jax.core.ShapedArray((*batch, *shape), dtype) for shape in shapes]


@_form_p.def_impl
def _run(*operands: jax.Array, **params: Any) -> list[jax.Array]:
    backend = jax.default_backend()
    platform = "cuda" if backend == "gpu" else backend
    return evaluate(platform, False, *operands, **params)


def _jvp(primals: tuple, tangents: tuple, *, names: tuple[str, ...], **params: Any) -> tuple:
    # It is linear in an argument, that is, in all parts of it together.
    nonzero = (type(tangent) is not ad.Zero for tangent in tangents)
    moved = tuple(dict.fromkeys(itertools.compress(names, nonzero)))
    own = [
        ad.instantiate_zeros(tangent)
        for name, tangent in zip(names, tangents, strict=True)
        if name in moved
    ]
    tangents = _differential_p.bind(*primals, *own, names=names, moved=moved, **params)
    return _form_p.bind(*primals, names=names, **params), tangents


def _transpose(
    cotangents: Sequence[Any],
    *operands: Any,
    names: tuple[str, ...],
    wrt: str,
    rank: int,
    strategy: str | None,
    **_: Any,
) -> list[Any]:
    unknown = [ad.is_undefined_primal(operand) for operand in operands]
    sought = names[unknown.index(True)]
    arguments = by_name(names, operands)
    # Not each part of what is sought need be unknown.
    avals = [
        part.aval if ad.is_undefined_primal(part) else jax.typeof(part)
        for part in arguments.pop(sought)
    ]
    if all(type(cotangent) is ad.Zero for cotangent in cotangents):
        gradients = [ad.Zero(aval) for aval in avals]
    else:
        arguments[wrt] = [ad.instantiate_zeros(cotangent) for cotangent in cotangents]
        shapes = tuple(aval.shape[aval.ndim - rank_of(sought, rank) :] for aval in avals)
        dtype = avals[0].dtype
        gradients = _bind(arguments, sought, shapes, dtype, rank=rank, strategy=strategy)
    found = iter(gradients)
    gradients = [next(found) if name == sought else None for name in names]
    return [
        gradient if is_unknown else None
        for gradient, is_unknown in zip(gradients, unknown, strict=True)
    ]


def _batch(operands: tuple, axes: tuple, **params: Any) -> tuple:
    names, wrt, shapes, rank = (params[key] for key in ("names", "wrt", "shapes", "rank"))
    size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
    batched = {name for name, axis in zip(names, axes, strict=True) if axis is not None}
    # Where vectors alone are batched, they are more tokens.
    tokens = wrt in ("x", "g") and batched in ({"x"}, {"g"})
    tokens = tokens and operands[0].ndim == rank_of(names[0], rank)
    moved = [
        x if tokens and name not in batched else _leading(x, axis, size)
        for name, x, axis in zip(names, operands, axes, strict=True)
    ]
    if tokens:
        params |= {"rank": rank + 1, "shapes": tuple((size, *shape) for shape in shapes)}
    return _form_p.bind(*moved, **params), [0] * len(shapes)


def _leading(x: jax.Array, axis: int | None, size: int) -> jax.Array:
    """The array with the batch's axis first."""
    return jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)


ad.primitive_jvps[_form_p] = _jvp
ad.primitive_transposes[_form_p] = _transpose
batching.primitive_batchers[_form_p] = _batch


_differential_p = Primitive("circulant_differential")
_differential_p.multiple_results = True
_differential_p.def_abstract_eval(_abstract)


def _differential(
    *operands: Any, names: tuple[str, ...], moved: tuple[str, ...], **params: Any
) -> list[jax.Array]:
    """The sum of the form with one argument at a time replaced by its tangent."""
    primals, tangents = operands[: len(names)], iter(operands[len(names) :])
    terms = []
    for name in moved:
        own = [
            next(tangents) if other == name else primal
            for other, primal in zip(names, primals, strict=True)
        ]
        terms.append(_form_p.bind(*own, names=names, **params))
    return [sum(parts[1:], parts[0]) for parts in zip(*terms, strict=True)]


def _transpose_differential(
    cotangents: Sequence[Any],
    *operands: Any,
    names: tuple[str, ...],
    moved: tuple[str, ...],
    wrt: str,
    rank: int,
    strategy: str | None,
    **_: Any,
) -> list[Any]:
    primals, tangents = operands[: len(names)], operands[len(names) :]
    unknown = [ad.is_undefined_primal(tangent) for tangent in tangents]
    if all(type(cotangent) is ad.Zero for cotangent in cotangents):
        found = iter([ad.Zero(tangent.aval) for tangent in itertools.compress(tangents, unknown)])
        gradients = [next(found) if is_unknown else None for is_unknown in unknown]
        return [*[None] * len(names), *gradients]
    owners = [name for name in names if name in moved]
    sought = tuple(dict.fromkeys(itertools.compress(owners, unknown)))
    cotangents = [ad.instantiate_zeros(cotangent) for cotangent in cotangents]
    found = iter(
        _gradients_p.bind(
            *primals, *cotangents, names=names, wrt=wrt, sought=sought, rank=rank, strategy=strategy
        )
    )
    # Not each part of what is sought need be unknown.
    gradients = [next(found) if name in sought else None for name in owners]
    gradients = [
        gradient if is_unknown else None
        for gradient, is_unknown in zip(gradients, unknown, strict=True)
    ]
    return [*[None] * len(names), *gradients]


_gradients_p = Primitive("circulant_gradients")
_gradients_p.multiple_results = True


@_gradients_p.def_abstract_eval
def _abstract_gradients(
    *operands: Any, names: tuple[str, ...], sought: tuple[str, ...], **_: Any
) -> list[Any]:
    own = zip(names, operands, strict=False)
    return [jax.core.ShapedArray(part.shape, part.dtype) for name, part in own if name in sought]


def _gradients(
    *operands: Any,
    names: tuple[str, ...],
    wrt: str,
    sought: tuple[str, ...],
    rank: int,
    strategy: str | None,
) -> list[jax.Array]:
    """The gradients of a product with respect to several of its arguments, one by one.

    Args:
        operands: arguments of the product, in parts, and the cotangents of its results; all of
            them may be batched.
        names: of the arguments, part by part.
        wrt: what the product is the gradient with respect to.
        sought: names of arguments whose gradients are sought.
        rank: of vectors, their leading axes counted.
        strategy: as in `fitted_product`.

    Returns:
        The gradients, part by part.
    """
    arguments = by_name(names, operands) | {wrt: list(operands[len(names) :])}
    gradients = []
    for name in sought:
        others = {other: parts for other, parts in arguments.items() if other != name}
        shapes = tuple(part.shape[part.ndim - rank_of(name, rank) :] for part in arguments[name])
        dtype = arguments[name][0].dtype
        gradients += _bind(others, name, shapes, dtype, rank=rank, strategy=strategy)
    return gradients


def _derive(primitive: Primitive, function: Callable[..., Any]) -> None:
    """Gives a primitive the rules of a function of the same operands."""

    def jvp(primals: tuple, tangents: tuple, **params: Any) -> tuple:
        tangents = tuple(map(ad.instantiate_zeros, tangents))
        return jax.jvp(partial(function, **params), primals, tangents)

    def batch(operands: tuple, axes: tuple, **params: Any) -> tuple:
        ys = jax.vmap(partial(function, **params), in_axes=axes)(*operands)
        return ys, [0] * len(ys)

    primitive.def_impl(function)
    ad.primitive_jvps[primitive] = jvp
    batching.primitive_batchers[primitive] = batch


def _transpose_gradients(cotangents: Sequence[Any], *operands: Any, **params: Any) -> list[Any]:
    unknown = [ad.is_undefined_primal(operand) for operand in operands]

    def gradients(*sought: Any) -> list[jax.Array]:
        found = iter(sought)
        own = [
            next(found) if is_unknown else operand
            for is_unknown, operand in zip(unknown, operands, strict=True)
        ]
        return _gradients(*own, **params)

    avals = [operand.aval for operand in itertools.compress(operands, unknown)]
    shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
    cotangents = [ad.instantiate_zeros(cotangent) for cotangent in cotangents]
    found = iter(jax.linear_transpose(gradients, *shapes)(cotangents))
    return [next(found) if is_unknown else None for is_unknown in unknown]


_derive(_differential_p, _differential)
_derive(_gradients_p, _gradients)
ad.primitive_transposes[_differential_p] = _transpose_differential
ad.primitive_transposes[_gradients_p] = _transpose_gradients


def _lower(platform: str, context: Any, *operands: Any, **params: Any) -> Any:
    run = partial(evaluate, platform, _is_partitioned(context.module_context.axis_context))
    return mlir.lower_fun(run, multiple_results=True)(context, *operands, **params)


def _lower_gradients(platform: str, context: Any, *operands: Any, **params: Any) -> Any:
    partitioned = _is_partitioned(context.module_context.axis_context)

    def run(*operands: jax.Array, **params: Any) -> list[jax.Array]:
        together = evaluate_together(platform, partitioned, *operands, **params)
        if together is not None:
            return together
        # Without a barrier before the backward pass XLA keeps what both passes compute from x.
        return _gradients(*jax.lax.optimization_barrier(operands), **params)

    return mlir.lower_fun(run, multiple_results=True)(context, *operands, **params)


def _is_partitioned(context: Any) -> bool:
    """Whether XLA divides a program among devices, apart from what `shard_map` has divided."""
    mesh = getattr(context, "mesh", None)
    if mesh is None:
        return (getattr(context, "num_devices", None) or 1) > 1
    return any(size > 1 for name, size in mesh.shape.items() if name not in context.manual_axes)


for _platform in ("cpu", "tpu", "cuda", "rocm"):
    mlir.register_lowering(_form_p, partial(_lower, _platform), platform=_platform)
    mlir.register_lowering(_gradients_p, partial(_lower_gradients, _platform), platform=_platform)
mlir.register_lowering(_differential_p, mlir.lower_fun(_differential, multiple_results=True))
