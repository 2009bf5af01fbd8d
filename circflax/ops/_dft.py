"""Block-circulant products by a discrete Fourier transform written as matrix products.

For any divisor f of b, a circulant of size b is a circulant of size f whose entries are blocks of
size m = b / f. A DFT of length f over those entries, a product with a constant f x f table, leaves
one dense product of blocks for each pair of frequencies, and the same table transforms back. That
takes 2 (f + m) multiplications a number in place of b. With f = b the first stage alone
diagonalises. A second DFT, of length m, would cost as much as the dense product that it replaces.

The tokens stand last in between, so that every stage is a plain matrix product.
"""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np

from circflax.ops._matrix import leading_columns


def product(kernel: jax.Array, x: jax.Array, dtype: jnp.dtype, *, length: int) -> jax.Array:
    """Multiplies by a block-circulant matrix.

    Args:
        kernel: first columns, `(out_blocks, in_blocks, block)`.
        x: `(tokens, in_blocks * block)`.
        dtype: of the operands of all matrix products.
        length: of the DFT, a divisor of the block.

    Returns:
        `(tokens, out_blocks * block)`, in `dtype`.
    """
    tokens = x.shape[0]
    out_blocks, _, block = kernel.shape
    x = _transform(x.astype(dtype), block, length)
    y = jnp.einsum("skl,slt->skt", response(kernel, length).astype(dtype), x)
    table = _table(length).reshape(-1, length).astype(dtype)
    size = block // length
    y = table.T @ y.reshape(table.shape[0], out_blocks * size * tokens)
    y = y.reshape(length, out_blocks, size, tokens).transpose(3, 1, 0, 2)
    return y.reshape(tokens, out_blocks * block)


def correlation(
    x: jax.Array, g: jax.Array, block: int, dtype: jnp.dtype, *, length: int
) -> jax.Array:
    """The gradient of `sum(g * product(kernel, x))` with respect to the kernel.

    Args:
        x: `(tokens, in_blocks * block)`.
        g: `(tokens, out_blocks * block)`.
        block: size of the blocks.
        dtype: of the operands of all matrix products.
        length: of the DFT, a divisor of the block.

    Returns:
        `(out_blocks, in_blocks, block)`, in float32 or wider.
    """
    x_blocks, g_blocks = x.shape[1] // block, g.shape[1] // block
    x = _transform(x.astype(dtype), block, length)
    g = _transform(g.astype(dtype), block, length)
    wide = jnp.promote_types(dtype, jnp.float32)
    sums = jnp.einsum("skt,slt->skl", g, x, preferred_element_type=wide)
    kernel = jax.ShapeDtypeStruct((g_blocks, x_blocks, block), wide)
    (gradient,) = jax.linear_transpose(lambda kernel: response(kernel, length), kernel)(sums)
    return gradient


def response(kernel: jax.Array, length: int) -> jax.Array:
    """The dense products that remain after a DFT of a block-circulant matrix.

    Args:
        kernel: first columns, `(out_blocks, in_blocks, block)`.
        length: of the DFT, a divisor of the block; m = block / length.

    Returns:
        `(pairs of frequencies, 2 * out_blocks * m, 2 * in_blocks * m)`: for each pair a real
        matrix from and to (part, block, position in the block).
    """
    out_blocks, in_blocks, block = kernel.shape
    size = block // length
    toeplitz = leading_columns(_diagonals(kernel, length), size)[..., :size, :]
    matrices = toeplitz.transpose(0, 1, 2, 5, 3, 4, 6)
    return matrices.reshape(-1, 2 * out_blocks * size, 2 * in_blocks * size)


def _diagonals(kernel: jax.Array, length: int) -> jax.Array:
    """The Toeplitz matrices that `response` is made of, by their diagonals.

    Args:
        kernel: first columns, `(out_blocks, in_blocks, block)`.
        length: of the DFT, a divisor of the block; m = block / length.

    Returns:
        `(pairs, 2, out_blocks, 2, in_blocks, 2 m)`, from part and block (the last two) to part
        and block: the main diagonal, those below it, an unused one, and those above it, outermost
        first.
    """
    chunks = kernel.reshape(*kernel.shape[:2], length, kernel.shape[2] // length)
    # What lies above the main diagonal reaches back into the chunk before.
    chunks = jnp.concatenate([chunks, jnp.roll(chunks, 1, axis=2)], axis=3)
    table = rotations(length).astype(kernel.dtype)
    return jnp.einsum("sqpf,oifn->sqopin", table, chunks, precision="highest")


def _transform(x: jax.Array, block: int, length: int) -> jax.Array:
    """`(tokens, blocks * block)` to `(pairs, 2 * blocks * m, tokens)`."""
    tokens = x.shape[0]
    blocks, size = x.shape[1] // block, block // length
    x = x.reshape(tokens, blocks, length, size).transpose(2, 1, 3, 0)
    table = _table(length).astype(x.dtype)
    x = table.reshape(-1, length) @ x.reshape(length, blocks * size * tokens)
    return x.reshape(len(table), 2 * blocks * size, tokens)


@lru_cache
def _table(length: int) -> np.ndarray:
    """The real DFT as an orthogonal table.

    Returns:
        `(pairs, 2, length)`: rows are the real and imaginary part of one frequency; the first
        pair holds the two real frequencies, 0 and length / 2 (nothing where length is odd).
    """
    cos, sin = _cos_sin(length)
    table = np.stack([cos, -sin], axis=1) * np.sqrt(2 / length)
    table[0] = np.stack([np.ones(length), _alternating(length)]) / np.sqrt(length)
    return table


@lru_cache
def rotations(length: int) -> np.ndarray:
    """What the real DFT makes of a circular shift.

    Returns:
        `(pairs, 2, 2, length)`: the matrix that each pair multiplies by in a shift by 0, 1, ...
    """
    cos, sin = _cos_sin(length)
    matrices = np.stack([np.stack([cos, sin], axis=1), np.stack([-sin, cos], axis=1)], axis=1)
    matrices[0] = 0.0
    matrices[0, 0, 0], matrices[0, 1, 1] = 1.0, _alternating(length)
    return matrices


def _cos_sin(length: int) -> tuple[np.ndarray, np.ndarray]:
    angles = 2 * np.pi * np.outer(np.arange((length + 1) // 2), np.arange(length)) / length
    return np.cos(angles), np.sin(angles)


def _alternating(length: int) -> np.ndarray:
    return (-1.0) ** np.arange(length) if length % 2 == 0 else np.zeros(length)
