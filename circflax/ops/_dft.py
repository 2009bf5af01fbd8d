"""Block-circulant products by a short DFT of blocks, and dense products of its frequencies.

For any divisor f of b, a circulant of size b is a circulant of size f whose entries are blocks of
size m = b / f. A DFT of length f over those entries leaves one dense product of blocks for each
pair of frequencies: f / 2 times fewer multiplications than the dense form. XLA fuses a transform
into one pass over the vectors: on CPU and TPU as a network of sums of whole arrays, on GPU as sums
over a table, f a number, which takes no longer there than reading and writing the numbers.
"""

import jax
import jax.numpy as jnp

from circflax.ops._matrix import leading_columns
from circflax.ops._network import real_dft, real_dft_table, rotations, transposed_real_dft


def product(
    kernel: jax.Array, x: jax.Array, dtype: jnp.dtype, *, length: int, network: bool
) -> jax.Array:
    """Multiplies by a block-circulant matrix.

    Args:
        kernel: first columns, `(out_blocks, in_blocks, block)`.
        x: `(tokens, in_blocks * block)`.
        dtype: of the operands of all matrix products.
        length: of the DFT, a divisor of the block.
        network: whether to transform by a network.

    Returns:
        `(tokens, out_blocks * block)`, in `dtype`.
    """
    block = kernel.shape[2]
    spectra = _transform(x, block, length, dtype, network)
    spectra = jnp.einsum("stl,skl->stk", spectra, response(kernel, length).astype(dtype))
    return _transform_back(spectra, block, length, dtype, network)


def correlation(
    x: jax.Array, g: jax.Array, block: int, dtype: jnp.dtype, *, length: int, network: bool
) -> jax.Array:
    """The gradient of `sum(g * product(kernel, x))` with respect to the kernel.

    Args:
        x: `(tokens, in_blocks * block)`.
        g: `(tokens, out_blocks * block)`.
        block: size of the blocks.
        dtype: of the operands of all matrix products.
        length: of the DFT, a divisor of the block.
        network: whether to transform by a network.

    Returns:
        `(out_blocks, in_blocks, block)`, in float32 or wider.
    """
    x_blocks, g_blocks = x.shape[1] // block, g.shape[1] // block
    x, g = (_transform(vectors, block, length, dtype, network) for vectors in (x, g))
    wide = jnp.promote_types(dtype, jnp.float32)
    sums = jnp.einsum("stk,stl->skl", g, x, preferred_element_type=wide)
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


def _transform(x: jax.Array, block: int, length: int, dtype: jnp.dtype, network: bool) -> jax.Array:
    """`(tokens, blocks * block)` to `(pairs, tokens, 2 * blocks * m)`."""
    tokens, features = x.shape
    wide, width = jnp.promote_types(dtype, jnp.float32), features // length
    x = x.reshape(tokens, features // block, length, block // length).astype(wide)
    if network:
        pairs = real_dft([x[:, :, j].reshape(tokens, width) for j in range(length)])
        return jnp.stack([jnp.concatenate(pair, axis=1).astype(dtype) for pair in pairs])
    table = real_dft_table(length).astype(wide)
    spectra = jnp.sum(x[:, None] * table[:, None, :, None], axis=3).astype(dtype)
    return spectra.reshape(tokens, len(table) // 2, 2 * width).swapaxes(0, 1)


def _transform_back(
    spectra: jax.Array, block: int, length: int, dtype: jnp.dtype, network: bool
) -> jax.Array:
    """The transpose of `_transform`."""
    pairs, tokens, width = spectra.shape
    wide, width, size = jnp.promote_types(dtype, jnp.float32), width // 2, block // length
    spectra = spectra.astype(wide)
    if network:
        parts = [(pair[:, :width], pair[:, width:]) for pair in spectra]
        columns = [
            part.reshape(tokens, width // size, size) for part in transposed_real_dft(parts, length)
        ]
        x = jnp.stack(columns, axis=2)
    else:
        table = real_dft_table(length).astype(wide)
        spectra = spectra.swapaxes(0, 1).reshape(tokens, 2 * pairs, width // size, 1, size)
        x = jnp.sum(spectra * table[:, None, :, None], axis=1)
    return x.astype(dtype).reshape(tokens, width * length)
