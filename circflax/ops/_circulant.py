"""Circulant and block-circulant matrices: products, dense forms, projection onto them."""

from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp

Convention = Literal["column", "row"]
"""Whether a vector is the first column or the first row of its circulant matrix."""

# From here on matrix products contract spectra faster than sums do, on CPU.
_MANY_BLOCKS = 8


@partial(jax.jit, static_argnames="convention")
def circulant_product(
    c: jax.Array, x: jax.Array, *, convention: Convention = "column"
) -> jax.Array:
    """Multiplies a circulant matrix, given by one vector, with a batch of vectors.

    In the `"column"` convention `c` is the matrix's first column, so that the product is the
    circular convolution `irfft(rfft(c) * rfft(x))`; in the `"row"` convention `c` is its first
    row, and the product is the circular correlation `irfft(conj(rfft(c)) * rfft(x))`.

    The transforms run in float32 (float64 for float64 operands). Differentiation in either mode
    and to any order works; reverse mode keeps only `c` and `x`, no spectra.

    Args:
        c: shape `(n,)`, floating.
        x: shape `(..., n)`, floating.
        convention: `"column"` (CDVFT, BCA) or `"row"` (C3A).

    Returns:
        Shape `(..., n)`, in the promoted dtype of `c` and `x`.

    Raises:
        ValueError: if the shapes do not fit or the convention is unknown.
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
    _check_vector(c)
    if x.ndim < 1 or x.shape[-1] != c.shape[0]:
        raise ValueError(
            f"a circulant of length {c.shape[0]} multiplies vectors of that length, but `x` has"
            f" shape {x.shape}."
        )
    return block_circulant_product(c[None, None], x, convention=convention)


@partial(jax.jit, static_argnames="convention")
def circulant_matrix(c: jax.Array, *, convention: Convention = "column") -> jax.Array:
    """The dense circulant matrix of one vector.

    `matrix[i, j]` is `c[(i - j) % n]` in the `"column"` convention and `c[(j - i) % n]` in the
    `"row"` convention. It is built by tiling and reshaping, so that its gradient is a sum along
    wrapped diagonals, without gather or scatter.

    Args:
        c: shape `(n,)`, floating.
        convention: whether `c` is the first `"column"` or the first `"row"`.

    Returns:
        Shape `(n, n)`, in the dtype of `c`.

    Raises:
        ValueError: if `c` is not a vector or the convention is unknown.
        TypeError: if `c` is not of a real floating dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> from circflax import ops
        >>> print(ops.circulant_matrix(jnp.array([1.0, 2.0, 3.0])))
        [[1. 3. 2.]
         [2. 1. 3.]
         [3. 2. 1.]]
    """
    _check_vector(c)
    _check_convention(convention)
    check_floating(c=c)
    n = c.shape[0]
    # Rows of length n + 1 cut from a sequence of period n advance by one element each.
    hankel = jnp.tile(jnp.roll(c, -1), n + 1).reshape(n, n + 1)[:, :n]
    matrix = hankel[:, ::-1]
    return matrix if convention == "column" else matrix.T


@partial(jax.jit, static_argnames=("convention", "out_features"))
def block_circulant_product(
    kernel: jax.Array,
    x: jax.Array,
    *,
    convention: Convention = "column",
    out_features: int | None = None,
) -> jax.Array:
    """Multiplies a block-circulant matrix with a batch of vectors.

    The matrix has `out_blocks x in_blocks` circulant blocks of size `block`, each given by its
    first column or first row. Spectra are summed over the input blocks before the inverse
    transform, so that a vector costs `in_blocks` real FFTs forth and `out_blocks` back.

    Where the block does not divide a width, the last blocks reach beyond the matrix: they see
    zeros, and what they give beyond `out_features` is cut off.

    The transforms run in float32 (float64 for float64 operands). Differentiation in either mode
    and to any order works; reverse mode keeps only `kernel` and `x`, no spectra.

    Args:
        kernel: shape `(out_blocks, in_blocks, block)`, floating.
        x: shape `(..., in_features)` with `in_blocks = ceil(in_features / block)`, floating.
        convention: whether a block's vector is its first `"column"` (BCA, CDVFT) or its first
            `"row"` (C3A).
        out_features: number of rows of the matrix, with `out_blocks = ceil(out_features / block)`;
            None for `out_blocks * block`.

    Returns:
        Shape `(..., out_features)`, in the promoted dtype of `kernel` and `x`.

    Raises:
        ValueError: if the shapes do not fit or the convention is unknown.
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
    _check_convention(convention)
    check_floating(kernel=kernel, x=x)
    check_kernel(kernel)
    out_blocks, in_blocks, block = kernel.shape
    if x.ndim < 1 or -(-x.shape[-1] // block) != in_blocks:
        raise ValueError(
            f"a kernel of shape (out_blocks, in_blocks, block) = {kernel.shape} multiplies"
            f" vectors of length in_blocks * block = {in_blocks * block}, but `x` has shape"
            f" {x.shape}."
        )
    if out_features is None:
        out_features = out_blocks * block
    elif -(-out_features // block) != out_blocks:
        raise ValueError(
            f"a kernel of shape (out_blocks, in_blocks, block) = {kernel.shape} has"
            f" out_blocks * block = {out_blocks * block} rows, which does not fit"
            f" `out_features` = {out_features}."
        )
    product = partial(plain_product, out_features=out_features, convention=convention)
    # Rematerialised: autodiff would keep both operands' spectra, two to four times the size of x.
    return jax.checkpoint(product)(kernel, x)


def plain_product(
    kernel: jax.Array, x: jax.Array, *, out_features: int, convention: Convention = "column"
) -> jax.Array:
    """The block-circulant product, unchecked, and keeping for reverse mode what autodiff keeps."""
    out_blocks, in_blocks, block = kernel.shape
    result = jnp.result_type(kernel, x)
    compute = jnp.promote_types(result, jnp.float32)
    kernel_spectrum = jnp.fft.rfft(kernel.astype(compute))
    if convention == "row":
        kernel_spectrum = kernel_spectrum.conj()
    padding = [(0, 0)] * (x.ndim - 1) + [(0, in_blocks * block - x.shape[-1])]
    x_blocks = jnp.pad(x.astype(compute), padding).reshape(*x.shape[:-1], in_blocks, block)
    y_spectrum = _contract_blocks(kernel_spectrum, jnp.fft.rfft(x_blocks))
    y = jnp.fft.irfft(y_spectrum, n=block).reshape(*x.shape[:-1], out_blocks * block)
    return y[..., :out_features].astype(result)


def _contract_blocks(kernel: jax.Array, x: jax.Array) -> jax.Array:
    """Contracts spectra `(o, i, f)` and `(..., i, f)` over the blocks `i` to `(..., o, f)`."""
    if min(kernel.shape[:2]) < _MANY_BLOCKS:
        # XLA fuses product and sum: nothing of size tokens x o x i is made.
        return jnp.sum(kernel * x[..., None, :, :], axis=-2)
    # One real matrix product per frequency: XLA has no fast complex batched product on CPU.
    real, imag = kernel.real.transpose(2, 1, 0), kernel.imag.transpose(2, 1, 0)
    stacked_kernel = jnp.block([[real, imag], [-imag, real]])
    stacked_x = jnp.moveaxis(jnp.concatenate([x.real, x.imag], axis=-2), -1, 0)
    y = jnp.einsum("f...i,fio->f...o", stacked_x, stacked_kernel, precision="highest")
    y = jnp.moveaxis(y, 0, -1)
    out_blocks = kernel.shape[0]
    return jax.lax.complex(y[..., :out_blocks, :], y[..., out_blocks:, :])


@partial(jax.jit, static_argnames="convention")
def block_circulant_matrix(kernel: jax.Array, *, convention: Convention = "column") -> jax.Array:
    """The dense matrix of a block-circulant kernel.

    Args:
        kernel: shape `(out_blocks, in_blocks, block)`, floating.
        convention: whether a block's vector is its first `"column"` or its first `"row"`.

    Returns:
        Shape `(out_blocks * block, in_blocks * block)`, in the dtype of `kernel`.

    Raises:
        ValueError: if `kernel` is not of rank 3 or the convention is unknown.
        TypeError: if `kernel` is not of a real floating dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> from circflax import ops
        >>> print(ops.block_circulant_matrix(jnp.array([[[1.0, 2.0], [3.0, 4.0]]])))
        [[1. 2. 3. 4.]
         [2. 1. 4. 3.]]
    """
    check_kernel(kernel)
    out_blocks, in_blocks, block = kernel.shape
    blocks = jax.vmap(jax.vmap(partial(circulant_matrix, convention=convention)))(kernel)
    return blocks.transpose(0, 2, 1, 3).reshape(out_blocks * block, in_blocks * block)


@partial(jax.jit, static_argnames="block")
def block_circulant_projection(matrix: jax.Array, block: int) -> jax.Array:
    """The block-circulant kernel nearest to a dense matrix in the Frobenius norm.

    Each entry of the kernel is the mean over one wrapped diagonal of its block. A matrix that
    the block does not divide is continued periodically to the next multiple of `block`.

    Args:
        matrix: shape `(rows, columns)`, floating.
        block: size of the circulant blocks.

    Returns:
        Shape `(ceil(rows / block), ceil(columns / block), block)`, first columns, in the dtype of
        `matrix`.

    Source:
        BCA's initialisation, as in its authors' code.

    Example:
        >>> import jax.numpy as jnp
        >>> from circflax import ops
        >>> print(ops.block_circulant_projection(jnp.array([[1.0, 3.0], [5.0, 2.0]]), 2))
        [[[1.5 4. ]]]
    """
    check_floating(matrix=matrix)
    blocks = tuple(-(-size // block) for size in matrix.shape)
    padding = [(0, count * block - size) for count, size in zip(blocks, matrix.shape, strict=True)]
    padded = jnp.pad(matrix, padding, mode="wrap")
    kernel = jax.ShapeDtypeStruct((*blocks, block), matrix.dtype)
    # The transpose of `kernel -> matrix` sums wrapped diagonals of `block` entries each.
    (sums,) = jax.linear_transpose(block_circulant_matrix, kernel)(padded)
    return sums / block


def check_floating(**arrays: jax.Array) -> None:
    """Raises a TypeError that names the first array whose dtype is not real and floating."""
    for name, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"`{name}` must be of a real floating dtype, but is {array.dtype}.")


def check_kernel(kernel: jax.Array, name: str = "kernel") -> None:
    """Raises a ValueError if a block-circulant kernel is not of rank 3."""
    if kernel.ndim != 3:
        raise ValueError(
            f"`{name}` must have shape (out_blocks, in_blocks, block), but its shape is"
            f" {kernel.shape}."
        )


def _check_convention(convention: str) -> None:
    if convention not in get_args(Convention):
        raise ValueError(f"`convention` must be 'column' or 'row', but is {convention!r}.")


def _check_vector(c: jax.Array) -> None:
    if c.ndim != 1:
        raise ValueError(f"`c` must be a vector of shape (n,), but its shape is {c.shape}.")
