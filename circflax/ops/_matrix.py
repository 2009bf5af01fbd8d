"""Dense forms of circulant and block-circulant matrices, and the projection onto them."""

from functools import partial

import jax
import jax.numpy as jnp

from circflax.ops._checks import (
    Convention,
    check_convention,
    check_floating,
    check_kernel,
    check_vector,
)


def leading_columns(c: jax.Array, count: int) -> jax.Array:
    """The first columns of circulant matrices, each given by its first column.

    Column n is c rolled by n. They are built by tiling and reshaping, so that the gradient is a
    sum along wrapped diagonals, without gather, scatter or sort.

    Args:
        c: shape `(..., n)`.
        count: number of columns, at most n.

    Returns:
        Shape `(..., n, count)`.
    """
    n = c.shape[-1]
    # Rows of length n + 1 cut from a sequence of period n advance by one element each.
    tiled = jnp.tile(jnp.roll(c, count - 1, axis=-1), count + 1)[..., : count * (n + 1)]
    rows = tiled.reshape(*c.shape[:-1], count, n + 1)[..., ::-1, :n]
    return jnp.swapaxes(rows, -1, -2)


def reverse(c: jax.Array) -> jax.Array:
    """The first columns of the transposed circulants: element k becomes element -k mod n."""
    return jnp.roll(c[..., ::-1], 1, axis=-1)


def transpose(kernel: jax.Array) -> jax.Array:
    """The kernel of the transposed block-circulant matrix."""
    return reverse(kernel).swapaxes(-3, -2)


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
    check_vector(c)
    check_convention(convention)
    check_floating(c=c)
    matrix = leading_columns(c, c.shape[0])
    return matrix if convention == "column" else matrix.T


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
    check_convention(convention)
    check_floating(kernel=kernel)
    out_blocks, in_blocks, block = kernel.shape
    blocks = leading_columns(kernel, block)
    if convention == "row":
        blocks = blocks.swapaxes(-1, -2)
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
