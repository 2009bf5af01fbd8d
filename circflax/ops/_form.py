"""The primitive behind every product: a multilinear form and its gradients.

Every product here, and each of its derivatives, is a gradient of one scalar,

    <g, diag(left) B(kernel) diag(right) x>,

with respect to one of its five arguments, each of which it is linear in: the gradient with respect
to `g` is the product, to `x` the transposed product, to `kernel`, `left` and `right` what training
needs. The derivative of one is another, so that one rule serves both modes to any order, and
nothing but the arguments is kept for the backward pass. Vectors may be in parts, side by side: so
matrices that read the same vectors share what is computed of them. How a gradient is computed is
chosen where it is lowered, when shapes, dtype and platform are known.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from circflax.ops import _dense, _dft, _fft, _fused
from circflax.ops._checks import Convention
from circflax.ops._choice import Form, Product, choose_form
from circflax.ops._matrix import transpose

# Arguments in the order of the formula, right to left, with their ranks.
_RANKS = {"left": 1, "kernel": 3, "right": 1, "x": 2, "g": 2}
# Which axis of the kernel runs along the blocks of these.
_KERNEL_AXES = {"g": 0, "x": 1}


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
        x: `(..., in_features)`, with `in_features` at most `in_blocks * block`.
        left: `(out_features,)`, with `out_features` at most `out_blocks * block`.
        right: `(in_features,)`, or None for ones.
        strategy: how to compute it and its derivatives, or None for what `choose_form` chooses.

    Returns:
        `(..., out_features)`, in the dtype of `x`.
    """
    out_blocks, in_blocks, block = kernel.shape
    factors = {"left": _padded(left, out_blocks * block), "kernel": kernel}
    if right is not None:
        factors["right"] = _padded(right, in_blocks * block)
    (y,) = _apply(factors, x, "x", (out_blocks * block,), strategy)
    return y[..., : left.size]


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
        x: `(..., in_features)`, with `in_features` at most `in_blocks * block`.
        out_features: of each matrix, at most `out_blocks * block`.
        convention: whether kernels hold first columns or first rows.
        strategy: as in `fitted_product`.

    Returns:
        For each matrix `(..., out_features)`, in the dtype of `x`.
    """
    kernel = jnp.concatenate(kernels)
    rows = tuple(each.shape[0] * each.shape[2] for each in kernels)
    if convention == "column":
        ys = _apply({"kernel": kernel}, x, "x", rows, strategy)
    else:
        # Blocks given by their rows are those given by their columns, transposed.
        ys = _apply({"kernel": kernel.swapaxes(0, 1)}, x, "g", rows, strategy)
    return [y[..., :size] for y, size in zip(ys, out_features, strict=True)]


def _apply(
    factors: dict[str, jax.Array],
    vectors: jax.Array,
    side: str,
    sizes: tuple[int, ...],
    strategy: str | None,
) -> list[jax.Array]:
    """What the factors make of vectors that stand on one side of them, in parts of these sizes."""
    kernel = factors["kernel"]
    flat = vectors.reshape(math.prod(vectors.shape[:-1]), vectors.shape[-1])
    flat = _padded(flat, kernel.shape[_KERNEL_AXES[side]] * kernel.shape[2])
    arguments = {name: [array] for name, array in factors.items()} | {side: [flat]}
    shapes = tuple((flat.shape[0], size) for size in sizes)
    ys = _bind(arguments, "g" if side == "x" else "x", shapes, vectors.dtype, strategy)
    return [y.reshape(*vectors.shape[:-1], y.shape[-1]) for y in ys]


def _padded(array: jax.Array, size: int) -> jax.Array:
    if array.shape[-1] == size:
        return array
    return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, size - array.shape[-1])])


_form_p = Primitive("circulant_form")
_form_p.multiple_results = True


def _bind(
    arguments: Mapping[str, Sequence[Any]],
    wrt: str,
    shapes: tuple[tuple[int, ...], ...],
    dtype: Any,
    strategy: str | None,
) -> list[jax.Array]:
    """The gradient with respect to one argument, part by part, given the parts of the others."""
    names, parts = zip(
        *((name, part) for name in _RANKS for part in arguments.get(name, ())), strict=True
    )
    return _form_p.bind(*parts, names=names, wrt=wrt, shapes=shapes, dtype=dtype, strategy=strategy)


@_form_p.def_abstract_eval
def _abstract(
    *operands: Any, names: tuple[str, ...], wrt: str, shapes: tuple, dtype: Any, **_: Any
) -> list[Any]:
    batch = operands[0].shape[: -_RANKS[names[0]]]
    return [jax.core.ShapedArray((*batch, *shape), dtype) for shape in shapes]


@_form_p.def_impl
def _run(*operands: jax.Array, **params: Any) -> list[jax.Array]:
    backend = jax.default_backend()
    platform = "cuda" if backend == "gpu" else backend
    return _evaluate(platform, False, *operands, **params)


def _jvp(primals: tuple, tangents: tuple, *, names: tuple[str, ...], **params: Any) -> tuple:
    bind = partial(_form_p.bind, names=names, **params)
    terms = []
    for name in dict.fromkeys(names):
        # It is linear in an argument, that is, in all parts of it together.
        own = [i for i in range(len(names)) if names[i] == name]
        if any(type(tangents[i]) is not ad.Zero for i in own):
            changed = {i: ad.instantiate_zeros(tangents[i]) for i in own}
            terms.append(bind(*(changed.get(i, primal) for i, primal in enumerate(primals))))
    return bind(*primals), [sum(parts[1:], parts[0]) for parts in zip(*terms, strict=True)]


def _transpose(
    cotangents: Sequence[Any],
    *operands: Any,
    names: tuple[str, ...],
    wrt: str,
    strategy: Any,
    **_: Any,
) -> list[Any]:
    unknown = [ad.is_undefined_primal(operand) for operand in operands]
    sought = names[unknown.index(True)]
    arguments: dict[str, list[Any]] = {}
    for name, operand in zip(names, operands, strict=True):
        arguments.setdefault(name, []).append(operand)
    # Not each part of what is sought need be unknown.
    avals = [
        part.aval if ad.is_undefined_primal(part) else jax.typeof(part)
        for part in arguments.pop(sought)
    ]
    if all(type(cotangent) is ad.Zero for cotangent in cotangents):
        gradients = [ad.Zero(aval) for aval in avals]
    else:
        arguments[wrt] = [ad.instantiate_zeros(cotangent) for cotangent in cotangents]
        shapes = tuple(aval.shape[aval.ndim - _RANKS[sought] :] for aval in avals)
        gradients = _bind(arguments, sought, shapes, avals[0].dtype, strategy)
    found = iter(gradients)
    gradients = [next(found) if name == sought else None for name in names]
    return [
        gradient if is_unknown else None
        for gradient, is_unknown in zip(gradients, unknown, strict=True)
    ]


def _batch(operands: tuple, axes: tuple, **params: Any) -> tuple:
    names, wrt, shapes = params["names"], params["wrt"], params["shapes"]
    size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
    batched = {name for name, axis in zip(names, axes, strict=True) if axis is not None}
    # Where vectors alone are batched, they are more tokens.
    tokens = wrt in ("x", "g") and batched in ({"x"}, {"g"})
    tokens = tokens and operands[0].ndim == _RANKS[names[0]]
    moved = [
        x if tokens and name not in batched else _leading(x, axis, size)
        for name, x, axis in zip(names, operands, axes, strict=True)
    ]
    if not tokens:
        return _form_p.bind(*moved, **params), [0] * len(shapes)
    moved = [
        x.reshape(-1, x.shape[-1]) if name in batched else x
        for name, x in zip(names, moved, strict=True)
    ]
    params["shapes"] = tuple((size * count, width) for count, width in shapes)
    ys = _form_p.bind(*moved, **params)
    ys = [y.reshape(size, *shape) for y, shape in zip(ys, shapes, strict=True)]
    return ys, [0] * len(shapes)


def _leading(x: jax.Array, axis: int | None, size: int) -> jax.Array:
    """The array with the batch's axis first."""
    return jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)


ad.primitive_jvps[_form_p] = _jvp
ad.primitive_transposes[_form_p] = _transpose
batching.primitive_batchers[_form_p] = _batch


def _evaluate(
    platform: str,
    partitioned: bool,
    *operands: jax.Array,
    names: tuple[str, ...],
    wrt: str,
    shapes: tuple[tuple[int, ...], ...],
    dtype: Any,
    strategy: str | None,
) -> list[jax.Array]:
    if operands[0].ndim > _RANKS[names[0]]:
        params = dict(names=names, wrt=wrt, shapes=shapes, dtype=dtype, strategy=strategy)
        # Kernels run one at a time: batches of them are left to XLA, as divided ones are.
        return jax.vmap(partial(_evaluate, platform, True, **params))(*operands)
    parts: dict[str, list[jax.Array]] = {}
    for name, operand in zip(names, operands, strict=True):
        parts.setdefault(name, []).append(operand)
    tokens = parts.get("x") or parts["g"]
    kernel_shape = shapes[0] if wrt == "kernel" else parts["kernel"][0].shape
    product = Product(
        tokens[0].shape[0], *kernel_shape, jnp.dtype(tokens[0].dtype), platform, partitioned
    )
    form = choose_form(product, strategy)
    if form.strategy == "fused":
        gradients = _fused_gradients(product, wrt, parts, shapes)
    else:
        arguments = {name: _joined(own) for name, own in parts.items()}
        if form.strategy == "dense":
            gradient = _dense_gradient(product, wrt, arguments)
        else:
            gradient = _spectral_gradient(product, form, wrt, arguments)
        ends = list(itertools.accumulate(shape[-1] for shape in shapes))
        gradients = jnp.split(gradient, ends[:-1], axis=-1)
    return [gradient.astype(dtype) for gradient in gradients]


def _joined(parts: Sequence[jax.Array]) -> jax.Array:
    """The parts side by side. Padded and added, XLA fuses them into what reads them."""
    if len(parts) == 1:
        return parts[0]
    ends = list(itertools.accumulate(part.shape[1] for part in parts))
    padded = [
        jnp.pad(part, [(0, 0), (end - part.shape[1], ends[-1] - end)])
        for part, end in zip(parts, ends, strict=True)
    ]
    return sum(padded[1:], padded[0])


def _lower(platform: str, context: Any, *operands: Any, **params: Any) -> Any:
    evaluate = partial(_evaluate, platform, _is_partitioned(context.module_context.axis_context))
    return mlir.lower_fun(evaluate, multiple_results=True)(context, *operands, **params)


def _is_partitioned(context: Any) -> bool:
    """Whether XLA divides a program among devices, apart from what `shard_map` has divided."""
    mesh = getattr(context, "mesh", None)
    if mesh is None:
        return (getattr(context, "num_devices", None) or 1) > 1
    return any(size > 1 for name, size in mesh.shape.items() if name not in context.manual_axes)


for _platform in ("cpu", "tpu", "cuda", "rocm"):
    mlir.register_lowering(_form_p, partial(_lower, _platform), platform=_platform)


def _dense_gradient(product: Product, wrt: str, arguments: dict[str, jax.Array]) -> jax.Array:
    x, g = arguments.pop("x", None), arguments.pop("g", None)
    dtype = product.compute_dtype
    if wrt == "g":
        return x.astype(dtype) @ _dense.matrix(**arguments).astype(dtype)
    if wrt == "x":
        return g.astype(dtype) @ _dense.matrix(**arguments).astype(dtype).T
    # Tokens are summed first: what follows is of the matrix's size, not the tokens'.
    wide = jnp.promote_types(dtype, jnp.float32)
    sums = jnp.matmul(x.astype(dtype).T, g.astype(dtype), preferred_element_type=wide)
    sizes = {"left": g.shape[-1:], "right": x.shape[-1:], "kernel": product.kernel_shape}
    arguments = {name: array.astype(wide) for name, array in arguments.items()}
    (gradient,) = jax.linear_transpose(
        lambda argument: _dense.matrix(**arguments, **{wrt: argument}),
        jax.ShapeDtypeStruct(sizes[wrt], wide),
    )(sums)
    return gradient


def _spectral_gradient(
    product: Product, form: Form, wrt: str, arguments: dict[str, jax.Array]
) -> jax.Array:
    kernel, dtype = arguments.get("kernel"), product.compute_dtype
    multiply, correlate = _fft.product, _fft.correlation
    if form.strategy == "dft":
        how = {"length": form.length, "network": product.platform in ("cpu", "tpu")}
        multiply, correlate = partial(_dft.product, **how), partial(_dft.correlation, **how)
    if product.platform == "cpu" and {"right", "x", "g"} <= arguments.keys():
        # XLA drops optimization barriers on CPU, and would keep what the product computed from x.
        arguments = {**arguments, "right": arguments["right"] * _one(arguments["g"])}
    # Scales and sums run in float32: rounded once, at the end.
    wide = jnp.promote_types(dtype, jnp.float32)
    x, g = (arguments.get(name) for name in ("x", "g"))
    x, g = (None if array is None else array.astype(wide) for array in (x, g))

    def scaled(side: str, array: jax.Array) -> jax.Array:
        return arguments[side] * array if side in arguments else array

    def forward() -> jax.Array:
        return multiply(kernel, scaled("right", x), dtype).astype(wide)

    def backward() -> jax.Array:
        return multiply(transpose(kernel), scaled("left", g), dtype).astype(wide)

    match wrt:
        case "g":
            return scaled("left", forward())
        case "x":
            return scaled("right", backward())
        case "kernel":
            return correlate(scaled("right", x), scaled("left", g), product.block, dtype)
        case "left":
            return jnp.sum(g * forward(), axis=0)
        case "right":
            return jnp.sum(x * backward(), axis=0)


def _one(g: jax.Array) -> jax.Array:
    """1 that is known only when the program runs, after g; not a number if g isn't one."""
    first = g[:1, :1].sum()
    return jnp.where(first == first, jnp.ones_like(first), first)


def _fused_gradients(
    product: Product,
    wrt: str,
    parts: dict[str, list[jax.Array]],
    shapes: tuple[tuple[int, ...], ...],
) -> list[jax.Array]:
    # A kernel reads and writes parts where they lie, where joining them would copy them.
    xs, gs = parts.get("x"), parts.get("g")
    left, kernel, right = (parts.get(name, [None])[0] for name in ("left", "kernel", "right"))
    widths, how = [shape[-1] for shape in shapes], {"interpret": product.platform != "tpu"}
    match wrt:
        case "g":
            return _fused.product(kernel, xs, widths, left, right, **how)
        case "x":
            return _fused.product(kernel, gs, widths, right, left, transposed=True, **how)
        case "kernel":
            return [_fused.correlation(xs, gs, product.block, left, right, **how)]
        case "left":
            return [_fused.inner_product(kernel, xs, gs, right, **how)]
        case "right":
            return [_fused.inner_product(kernel, gs, xs, left, transposed=True, **how)]
