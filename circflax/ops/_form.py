"""The primitive behind every product: a multilinear form and its gradients.

Every product here, and each of its derivatives, is a gradient of one scalar,

    <g, diag(left) B(kernel) diag(right) x>,

with respect to one of its five arguments, each of which it is linear in: the gradient with respect
to `g` is the product, to `x` the transposed product, to `kernel`, `left` and `right` what training
needs. The derivative of one is another, so that one rule serves both modes to any order, and
nothing but the arguments is kept for the backward pass. How a gradient is computed is chosen where
it is lowered, when shapes, dtype and platform are known.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from circflax.ops import _dense, _dft, _fft, _fused
from circflax.ops._choice import Form, Product, choose_form
from circflax.ops._matrix import transpose

# Arguments in the order of the formula, right to left, with their ranks.
_RANKS = {"left": 1, "kernel": 3, "right": 1, "x": 2, "g": 2}


def fitted_product(
    kernel: jax.Array,
    x: jax.Array,
    out_features: int,
    *,
    left: jax.Array | None = None,
    right: jax.Array | None = None,
    strategy: str | None = None,
) -> jax.Array:
    """`diag(left) B(kernel) diag(right) x`, the matrix cut to the sizes of its neighbours.

    Args:
        kernel: first columns, `(out_blocks, in_blocks, block)`.
        x: `(..., in_features)`, with `in_features` at most `in_blocks * block`.
        out_features: at most `out_blocks * block`.
        left: `(out_features,)`, or None for ones.
        right: `(in_features,)`, or None for ones.
        strategy: how to compute it and its derivatives, or None for what `choose_form` chooses.

    Returns:
        `(..., out_features)`, in the dtype of `x`.
    """
    out_blocks, in_blocks, block = kernel.shape
    factors = {
        "left": _padded(left, out_blocks * block),
        "kernel": kernel,
        "right": _padded(right, in_blocks * block),
    }
    return _bind(factors, x, ("x", in_blocks * block), ("g", out_blocks * block), strategy)[
        ..., :out_features
    ]


def transposed_product(
    kernel: jax.Array, x: jax.Array, out_features: int, *, strategy: str | None = None
) -> jax.Array:
    """The product with the transpose of `B(kernel)`, cut likewise.

    Args:
        kernel: first columns, `(in_blocks, out_blocks, block)`.
        x: as in `fitted_product`.
        out_features: as in `fitted_product`.
        strategy: as in `fitted_product`.

    Returns:
        As `fitted_product`.
    """
    in_blocks, out_blocks, block = kernel.shape
    factors = {"kernel": kernel}
    return _bind(factors, x, ("g", in_blocks * block), ("x", out_blocks * block), strategy)[
        ..., :out_features
    ]


def _bind(
    factors: dict[str, jax.Array | None],
    vectors: jax.Array,
    read: tuple[str, int],
    written: tuple[str, int],
    strategy: str | None,
) -> jax.Array:
    """The form's gradient with respect to one side's vectors, from those of the other."""
    (name, size), (wrt, out_size) = read, written
    tokens = math.prod(vectors.shape[:-1])
    flat = _padded(vectors.reshape(tokens, vectors.shape[-1]), size)
    arguments = {**factors, name: flat}
    arguments = {name: array for name, array in arguments.items() if array is not None}
    y = _form_p.bind(
        *arguments.values(),
        names=tuple(arguments),
        wrt=wrt,
        shape=(tokens, out_size),
        dtype=vectors.dtype,
        strategy=strategy,
    )
    return y.reshape(*vectors.shape[:-1], out_size)


def _padded(array: jax.Array | None, size: int) -> jax.Array | None:
    if array is None or array.shape[-1] == size:
        return array
    return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, size - array.shape[-1])])


_form_p = Primitive("circulant_form")


@_form_p.def_abstract_eval
def _abstract(
    *operands: Any, names: tuple[str, ...], wrt: str, shape: tuple[int, ...], dtype: Any, **_: Any
) -> Any:
    batch = operands[0].shape[: -_RANKS[names[0]]]
    return jax.core.ShapedArray((*batch, *shape), dtype)


@_form_p.def_impl
def _run(*operands: jax.Array, **params: Any) -> jax.Array:
    backend = jax.default_backend()
    platform = "cuda" if backend == "gpu" else backend
    return _evaluate(platform, False, *operands, **params)


def _jvp(primals: tuple, tangents: tuple, **params: Any) -> tuple:
    bind = partial(_form_p.bind, **params)
    terms = [
        bind(*primals[:i], tangent, *primals[i + 1 :])
        for i, tangent in enumerate(tangents)
        if type(tangent) is not ad.Zero
    ]
    return bind(*primals), sum(terms[1:], terms[0])


def _transpose(
    cotangent: Any, *operands: Any, names: tuple[str, ...], wrt: str, strategy: Any, **_: Any
) -> list:
    i = next(i for i, operand in enumerate(operands) if ad.is_undefined_primal(operand))
    aval = operands[i].aval
    if type(cotangent) is ad.Zero:
        gradient = ad.Zero(aval)
    else:
        arguments = {**dict(zip(names, operands, strict=True)), wrt: cotangent}
        others = tuple(name for name in _RANKS if name in arguments and name != names[i])
        gradient = _form_p.bind(
            *(arguments[name] for name in others),
            names=others,
            wrt=names[i],
            shape=aval.shape[len(aval.shape) - _RANKS[names[i]] :],
            dtype=aval.dtype,
            strategy=strategy,
        )
    return [gradient if j == i else None for j in range(len(operands))]


def _batch(operands: tuple, axes: tuple, **params: Any) -> tuple:
    names, wrt, shape = params["names"], params["wrt"], params["shape"]
    size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
    batched = [name for name, axis in zip(names, axes, strict=True) if axis is not None]
    moved = [
        x if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(operands, axes, strict=True)
    ]
    if wrt in ("x", "g") and batched in (["x"], ["g"]) and operands[0].ndim == _RANKS[names[0]]:
        # Only the tokens are batched: more tokens.
        tokens = names.index(batched[0])
        moved[tokens] = moved[tokens].reshape(size * shape[0], moved[tokens].shape[-1])
        params["shape"] = (size * shape[0], shape[1])
        return _form_p.bind(*moved, **params).reshape(size, *shape), 0
    moved = [
        jnp.broadcast_to(x, (size, *x.shape)) if axis is None else x
        for x, axis in zip(moved, axes, strict=True)
    ]
    return _form_p.bind(*moved, **params), 0


ad.primitive_jvps[_form_p] = _jvp
ad.primitive_transposes[_form_p] = _transpose
batching.primitive_batchers[_form_p] = _batch


def _evaluate(
    platform: str,
    partitioned: bool,
    *operands: jax.Array,
    names: tuple[str, ...],
    wrt: str,
    shape: tuple[int, ...],
    dtype: Any,
    strategy: str | None,
) -> jax.Array:
    if operands[0].ndim > _RANKS[names[0]]:
        params = dict(names=names, wrt=wrt, shape=shape, dtype=dtype, strategy=strategy)
        # Kernels run one at a time: batches of them are left to XLA, as divided ones are.
        return jax.vmap(partial(_evaluate, platform, True, **params))(*operands)
    arguments = dict(zip(names, operands, strict=True))
    x, g = arguments.get("x"), arguments.get("g")
    tokens, token_dtype = (g.shape[0], g.dtype) if x is None else (x.shape[0], x.dtype)
    kernel_shape = shape if wrt == "kernel" else arguments["kernel"].shape
    product = Product(tokens, *kernel_shape, jnp.dtype(token_dtype), platform, partitioned)
    form = choose_form(product, strategy)
    match form.strategy:
        case "dense":
            gradient = _dense_gradient(product, wrt, arguments)
        case "fused":
            gradient = _fused_gradient(product, wrt, arguments)
        case _:
            gradient = _spectral_gradient(product, form, wrt, arguments)
    return gradient.astype(dtype)


def _lower(platform: str, context: Any, *operands: Any, **params: Any) -> Any:
    evaluate = partial(_evaluate, platform, _is_partitioned(context.module_context.axis_context))
    return mlir.lower_fun(evaluate, multiple_results=False)(context, *operands, **params)


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
        multiply = partial(_dft.product, length=form.length)
        correlate = partial(_dft.correlation, length=form.length)
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


def _fused_gradient(product: Product, wrt: str, arguments: dict[str, jax.Array]) -> jax.Array:
    left, kernel, right, x, g = (arguments.get(name) for name in _RANKS)
    interpret = product.platform != "tpu"
    match wrt:
        case "g":
            return _fused.product(kernel, x, left, right, interpret=interpret)
        case "x":
            return _fused.product(kernel, g, right, left, transposed=True, interpret=interpret)
        case "kernel":
            return _fused.correlation(x, g, product.block, left, right, interpret=interpret)
        case "left":
            return _fused.inner_product(kernel, x, g, right, interpret=interpret)
        case "right":
            return _fused.inner_product(kernel, g, x, left, transposed=True, interpret=interpret)
