"""Products of circulant and block-circulant matrices with batches of vectors."""

from collections.abc import Sequence
from functools import partial

import jax

from circflax.ops._checks import (
    Convention,
    check_convention,
    check_floating,
    check_kernel,
    check_vector,
)
from circflax.ops._choice import Strategy, resolve_strategy
from circflax.ops._form import stacked_products


def circulant_product(
    c: jax.Array,
    x: jax.Array,
    *,
    convention: Convention = "column",
    strategy: Strategy | None = None,
) -> jax.Array:
    """Multiplies a circulant matrix, given by one vector, with a batch of vectors.

    In the `"column"` convention `c` is the matrix's first column, so that the product is the
    circular convolution `irfft(rfft(c) * rfft(x))`; in the `"row"` convention `c` is its first
    row, and the product is the circular correlation `irfft(conj(rfft(c)) * rfft(x))`.

    Differentiation and precision are as in `block_circulant_product`.

    Args:
        c: shape `(n,)`, floating.
        x: shape `(..., n)`, floating.
        convention: `"column"` (CDVFT, BCA) or `"row"` (C3A).
        strategy: how to compute it; None chooses by shape, dtype and platform.

    Returns:
        Shape `(..., n)`, in the dtype of `x`.

    Raises:
        ValueError: if the shapes do not fit or the convention or strategy is unknown.
        TypeError: if an operand is not of a real floating dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> from circflax import ops
        >>> c, x = jnp.array([1.0, 2.0, 3.0]), jnp.array([1.0, 0.0, 0.0])
        >>> print(ops.circulant_product(c, x).round(4))
        [1. 2. 3.]
        >>> print(ops.circulant_product(c, x, convention="row").round(4))
        [1. 3. 2.]
    """
    check_vector(c)
    if x.ndim < 1 or x.shape[-1] != c.shape[0]:
        raise ValueError(
            f"a circulant of length {c.shape[0]} multiplies vectors of that length, but `x` has"
            f" shape {x.shape}."
        )
    return block_circulant_product(c[None, None], x, convention=convention, strategy=strategy)


def block_circulant_product(
    kernel: jax.Array,
    x: jax.Array,
    *,
    convention: Convention = "column",
    out_features: int | None = None,
    strategy: Strategy | None = None,
) -> jax.Array:
    """Multiplies a block-circulant matrix with a batch of vectors.

    The matrix has `out_blocks x in_blocks` circulant blocks of size `block`, each given by its
    first column or first row. Where the block does not divide a width, the last blocks reach
    beyond the matrix: they see zeros, and what they give beyond `out_features` is cut off.

    FFTs run in float32 at least, whatever the dtype of `x`: the result is rounded once. Matrix
    products have operands in the dtype of `x` (on CPU at least float32), as the layer's own product
    has; in bfloat16 the relative error is at most twice that of LoRA's product in bfloat16.
    Differentiation in either mode and to any order works; reverse mode keeps only `kernel` and
    `x`.

    Args:
        kernel: shape `(out_blocks, in_blocks, block)`, floating.
        x: shape `(..., in_features)` with `in_blocks = ceil(in_features / block)`, floating.
        convention: whether a block's vector is its first `"column"` (BCA, CDVFT) or its first
            `"row"` (C3A).
        out_features: number of rows of the matrix, with `out_blocks = ceil(out_features / block)`;
            None for `out_blocks * block`.
        strategy: how to compute it; None chooses by shape, dtype and platform.

    Returns:
        Shape `(..., out_features)`, in the dtype of `x`.

    Raises:
        ValueError: if the shapes do not fit or the convention or strategy is unknown.
        TypeError: if an operand is not of a real floating dtype.

    Source:
        C3A (arXiv 2407.19342v4), equations 3 and 4; BCA (arXiv 2505.00582).

    Example:
        >>> import jax.numpy as jnp
        >>> from circflax import ops
        >>> kernel = jnp.ones((3, 2, 4))  # a 12 x 8 matrix of ones
        >>> ops.block_circulant_product(kernel, jnp.ones((5, 8))).shape
        (5, 12)
    """
    check_kernel(kernel)
    size = kernel.shape[0] * kernel.shape[2] if out_features is None else out_features
    (y,) = block_circulant_products([kernel], x, [size], convention=convention, strategy=strategy)
    return y


def block_circulant_products(
    kernels: Sequence[jax.Array],
    x: jax.Array,
    out_features: Sequence[int],
    *,
    convention: Convention = "column",
    strategy: Strategy | None = None,
) -> list[jax.Array]:
    """Multiplies several block-circulant matrices with the same batch of vectors.

    The vectors are transformed once for all matrices, and the sum of their gradients is transformed
    back once. Where the matrices have no common size of blocks, each is multiplied by itself.

    Args:
        kernels: each of shape `(out_blocks, in_blocks, block)`, floating.
        x: as in `block_circulant_product`.
        out_features: number of rows of each matrix.
        convention: as in `block_circulant_product`.
        strategy: as in `block_circulant_product`.

    Returns:
        For each matrix shape `(..., out_features)`, in the dtype of `x`.

    Raises:
        ValueError: if the shapes do not fit or the convention or strategy is unknown.
        TypeError: if an operand is not of a real floating dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> from circflax import ops
        >>> query, value = jnp.ones((2, 2, 4)), jnp.ones((1, 2, 4))
        >>> ys = ops.block_circulant_products([query, value], jnp.ones((5, 8)), [8, 4])
        >>> [y.shape for y in ys]
        [(5, 8), (5, 4)]
    """
    for kernel in kernels:
        check_kernel(kernel)
    if len({kernel.shape[1:] for kernel in kernels}) > 1:
        return [
            block_circulant_product(
                kernel, x, convention=convention, out_features=size, strategy=strategy
            )
            for kernel, size in zip(kernels, out_features, strict=True)
        ]
    check_convention(convention)
    strategy = resolve_strategy(strategy)
    for kernel, size in zip(kernels, out_features, strict=True):
        _check_sizes(kernel, x, size)
    return _products(list(kernels), x, convention, tuple(out_features), strategy)


def _check_sizes(kernel: jax.Array, x: jax.Array, out_features: int) -> None:
    check_floating(kernel=kernel, x=x)
    out_blocks, in_blocks, block = kernel.shape
    if x.ndim < 1 or -(-x.shape[-1] // block) != in_blocks:
        raise ValueError(
            f"a kernel of shape (out_blocks, in_blocks, block) = {kernel.shape} multiplies"
            f" vectors of length in_blocks * block = {in_blocks * block}, but `x` has shape"
            f" {x.shape}."
        )
    if -(-out_features // block) != out_blocks:
        raise ValueError(
            f"a kernel of shape (out_blocks, in_blocks, block) = {kernel.shape} has"
            f" out_blocks * block = {out_blocks * block} rows, which does not fit"
            f" `out_features` = {out_features}."
        )


@partial(jax.jit, static_argnums=(2, 3, 4))
def _products(
    kernels: list[jax.Array],
    x: jax.Array,
    convention: Convention,
    out_features: tuple[int, ...],
    strategy: Strategy | None,
) -> list[jax.Array]:
    return stacked_products(kernels, x, out_features, convention, strategy)
