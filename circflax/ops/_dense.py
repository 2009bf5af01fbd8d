"""Circulant-diagonal matrices in dense form, for where matrix units outrun transforms."""

import jax

from circflax.ops._matrix import leading_columns


def matrix(
    kernel: jax.Array, left: jax.Array | None = None, right: jax.Array | None = None
) -> jax.Array:
    """`diag(left) B(kernel) diag(right)`, transposed: `(in_features, out_features)`."""
    out_blocks, in_blocks, block = kernel.shape
    columns = leading_columns(kernel, block).transpose(1, 3, 0, 2)
    columns = columns.reshape(in_blocks * block, out_blocks * block)
    columns = columns if right is None else right[:, None] * columns
    return columns if left is None else columns * left
