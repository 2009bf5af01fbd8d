"""Block-circulant products in one kernel for TPU: spectra never leave its vector memory.

As the strategy `dft`, with a DFT of length f = block / 128. What is left of a block then fills the
128 lanes, so that the DFT needs no data moved: it combines whole registers, by a radix-2 network
on the vector unit, while the matrix unit multiplies the pairs of frequencies. Each token is read
and written once.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from circflax.ops._choice import LANES
from circflax.ops._network import real_dft, rotations, transposed_real_dft

# A tile of tokens has as many as this, and with both sides as many numbers as this, at most.
_TOKENS = 256
_NUMBERS = 2**21
_VMEM_BYTES = 64 * 2**20


def product(
    kernel: jax.Array,
    xs: Sequence[jax.Array],
    widths: Sequence[int],
    left: jax.Array | None,
    right: jax.Array | None,
    *,
    transposed: bool = False,
    interpret: bool,
) -> list[jax.Array]:
    """`diag(left) B(kernel) diag(right) x`.

    Args:
        kernel: first columns, `(out_blocks, in_blocks, block)`.
        xs: x in parts of whole blocks, `(tokens, width)`, together `in_blocks * block` wide.
        widths: of the parts of the result, together `out_blocks * block`.
        left: `(out_blocks * block,)`, or None for ones.
        right: `(in_blocks * block,)`, or None for ones.
        transposed: whether to multiply by the transpose of `B(kernel)`; outputs and inputs above
            are then those of the transpose.
        interpret: whether to run the kernel without a TPU, slowly.

    Returns:
        The result in parts, `(tokens, width)`, in the dtype of x.
    """
    block, (tokens, _), dtype = kernel.shape[2], xs[0].shape, xs[0].dtype

    def body(whole, xs, ys, scratch):
        left, right, *given = whole
        _expand_at_first(*given, *scratch, transposed)
        columns = _columns_of_product(_spectra(xs, right, block), scratch[0], block, dtype)
        for (y, lanes), (_, place), column in zip(
            _columns(ys), _columns([left]), columns, strict=True
        ):
            y[:, lanes] = (column * left[:, place]).astype(dtype)

    return _call(
        "product",
        body,
        [_row(left, sum(widths)), _row(right, _width(xs)), _turns(block), _chunks(kernel)],
        [xs],
        [jax.ShapeDtypeStruct((tokens, width), dtype) for width in widths],
        _scratch(kernel.shape, dtype, transposed),
        interpret,
    )


def inner_product(
    kernel: jax.Array,
    xs: Sequence[jax.Array],
    gs: Sequence[jax.Array],
    right: jax.Array | None,
    *,
    transposed: bool = False,
    interpret: bool,
) -> jax.Array:
    """The sum over the tokens of `g * (B(kernel) diag(right) x)`.

    Args:
        kernel: first columns, `(out_blocks, in_blocks, block)`.
        xs: as in `product`.
        gs: g in parts like x, together `out_blocks * block` wide.
        right: `(in_blocks * block,)`, or None for ones.
        transposed: as in `product`.
        interpret: whether to run the kernel without a TPU, slowly.

    Returns:
        `(out_blocks * block,)`, in float32.
    """
    block, dtype = kernel.shape[2], xs[0].dtype

    def body(whole, xs, gs, outs, scratch):
        (right, *given), (sums,) = whole, outs
        _zero_at_first(sums)
        _expand_at_first(*given, *scratch, transposed)
        columns = _columns_of_product(_spectra(xs, right, block), scratch[0], block, dtype)
        for (g, lanes), (_, place), column in zip(
            _columns(gs), _columns(outs), columns, strict=True
        ):
            sums[:, place] += jnp.sum(column * g[:, lanes], axis=0, keepdims=True)

    (sums,) = _call(
        "inner_product",
        body,
        [_row(right, _width(xs)), _turns(block), _chunks(kernel)],
        [xs, gs],
        [jax.ShapeDtypeStruct((1, _width(gs)), jnp.float32)],
        _scratch(kernel.shape, dtype, transposed),
        interpret,
        summed=True,
    )
    return sums[0]


def correlation(
    xs: Sequence[jax.Array],
    gs: Sequence[jax.Array],
    block: int,
    left: jax.Array | None,
    right: jax.Array | None,
    *,
    interpret: bool,
) -> jax.Array:
    """The gradient of `sum(g * product(kernel, x, left, right))` with respect to the kernel.

    Args:
        xs: x in parts of whole blocks, `(tokens, width)`, together `in_blocks * block` wide.
        gs: g in parts like x, together `out_blocks * block` wide.
        block: size of the blocks.
        left: `(out_blocks * block,)`, or None for ones.
        right: `(in_blocks * block,)`, or None for ones.
        interpret: whether to run the kernel without a TPU, slowly.

    Returns:
        `(out_blocks, in_blocks, block)`, in float32.
    """
    shape, dtype = (_width(gs) // block, _width(xs) // block, block), xs[0].dtype

    def body(whole, xs, gs, outs, scratch):
        (left, right, turns), (sums,), (products, diagonals) = whole, outs, scratch
        _zero_at_first(products)
        pairs = zip(_spectra(xs, right, block), _spectra(gs, left, block), strict=True)
        for s, (columns, rows) in enumerate(pairs):
            products[s] += jax.lax.dot_general(
                columns.astype(dtype),
                rows.astype(dtype),
                (((0,), (0,)), ((), ())),
                preferred_element_type=jnp.float32,
            )
        _sum_at_last(turns, products, diagonals, sums)

    (sums,) = _call(
        "correlation",
        body,
        [_row(left, _width(gs)), _row(right, _width(xs)), _turns(block)],
        [xs, gs],
        [jax.eval_shape(_chunks, jax.ShapeDtypeStruct(shape, jnp.float32))],
        _scratch(shape, jnp.float32, transposed=False),
        interpret,
        summed=True,
    )
    return sums.reshape(shape)


def _call(
    name: str,
    body: Callable[..., None],
    whole: Sequence[jax.Array],
    vectors: Sequence[Sequence[jax.Array]],
    outs: Sequence[jax.ShapeDtypeStruct],
    scratch: Sequence[Any],
    interpret: bool,
    *,
    summed: bool = False,
) -> list[jax.Array]:
    """Runs `body` on all of `whole` and a tile of the vectors at a time.

    Results have the tiles of the vectors, or are summed over them.
    """
    groups = [whole, *vectors, outs, scratch]

    def run(*refs) -> None:
        remaining = iter(refs)
        body(*(list(itertools.islice(remaining, len(group))) for group in groups))

    tiled = list(itertools.chain(*vectors))
    count = tiled[0].shape[0]
    tile = tile_size(count, *(array.shape[1] for array in (tiled if summed else [*tiled, *outs])))

    def in_tiles(array: Any) -> pl.BlockSpec:
        return pl.BlockSpec((tile, array.shape[1]), lambda i: (i, 0))

    def at_once(array: Any) -> pl.BlockSpec:
        return pl.BlockSpec(array.shape, lambda i: (0,) * array.ndim)

    return pl.pallas_call(
        run,
        out_shape=outs,
        grid=(count // tile,),
        in_specs=[*map(at_once, whole), *map(in_tiles, tiled)],
        out_specs=list(map(at_once if summed else in_tiles, outs)),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=_VMEM_BYTES),
        interpret=interpret,
        name=f"circulant_{name}",
    )(*whole, *tiled)


def tile_size(tokens: int, *widths: int) -> int:
    """How many tokens a kernel reads at a time."""
    tile = math.gcd(tokens, _TOKENS)
    while tile % 32 == 0 and tile * sum(widths) > _NUMBERS:
        tile //= 2
    return tile


def _zero_at_first(sums) -> None:
    @pl.when(pl.program_id(0) == 0)
    def _():
        sums[:] = jnp.zeros_like(sums)


def _row(scale: jax.Array | None, size: int) -> jax.Array:
    return jnp.ones((1, size), jnp.float32) if scale is None else scale[None].astype(jnp.float32)


def _chunks(kernel: jax.Array) -> jax.Array:
    """The kernel as it lies in memory, `LANES` numbers a row: `(blocks, length, LANES)`."""
    out_blocks, in_blocks, block = kernel.shape
    chunks = kernel.reshape(out_blocks * in_blocks, block // LANES, LANES)
    return chunks.astype(jnp.float32)


def _turns(block: int) -> np.ndarray:
    """What makes the diagonals of a block's Toeplitz matrices of its chunks.

    Returns:
        `(2, matrices, length)`: those from the main diagonal down, and those above it, which reach
        back into the chunk before; the matrices in the order pair, part to, part from.
    """
    length = block // LANES
    turns = rotations(length).reshape(-1, length)
    return np.stack([turns, np.roll(turns, -1, axis=1)]).astype(np.float32)


def _scratch(kernel_shape: tuple[int, int, int], dtype: Any, transposed: bool) -> list[Any]:
    """Room for what the spectra multiply with, and for the diagonals of one block's matrices.

    The first holds for each pair a matrix from (part, block, lane) to the same.
    """
    out_blocks, in_blocks, block = kernel_shape
    if transposed:
        out_blocks, in_blocks = in_blocks, out_blocks
    pairs = block // (2 * LANES)
    weights = pairs, 2 * in_blocks * LANES, 2 * out_blocks * LANES
    return [pltpu.VMEM(weights, dtype), pltpu.VMEM((4 * pairs, 2 * LANES), jnp.float32)]


def _expand_at_first(turns, chunks, weights, diagonals, transposed: bool) -> None:
    """Makes Toeplitz matrices of the kernel: row n is their diagonals rolled by n."""

    def block(i: jax.Array, tiles: Callable[[jax.Array], tuple]) -> None:
        for half in range(2):
            diagonals[:, half * LANES : (half + 1) * LANES] = jnp.dot(
                turns[half], chunks[i], precision="highest"
            )

        @pl.loop(0, diagonals.shape[0])
        def _(n):
            rows = jnp.broadcast_to(diagonals[pl.ds(n, 1), :], (LANES, 2 * LANES))
            rows = pltpu.roll(rows, 0, 1, stride=1, stride_axis=0)[:, :LANES]
            weights[tiles(n)] = (rows.T if transposed else rows).astype(weights.dtype)

    first = pl.program_id(0) == 0
    pl.when(first)(lambda: _for_blocks(weights.shape, block, transposed))


def _sum_at_last(turns, products, diagonals, sums) -> None:
    """Sums the diagonals of matrices, row n rolled back by n, and makes a kernel of them."""

    def block(i: jax.Array, tiles: Callable[[jax.Array], tuple]) -> None:
        @pl.loop(0, diagonals.shape[0])
        def _(n):
            # The hardware rolls later rows further, by no less than 0: upside down they fit that.
            row, column = (
                jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis) for axis in (0, 1)
            )
            flip = (row + column == LANES - 1).astype(jnp.float32)
            rows = jnp.dot(flip, products[tiles(n)], precision="highest")
            rows = jnp.concatenate([rows, jnp.zeros_like(rows)], axis=1)
            rows = pltpu.roll(rows, LANES + 1, 1, stride=1, stride_axis=0)
            diagonals[pl.ds(n, 1), :] = jnp.sum(rows, axis=0, keepdims=True)

        sums[i] = sum(
            jax.lax.dot_general(
                turns[half],
                diagonals[:, half * LANES : (half + 1) * LANES],
                (((0,), (0,)), ((), ())),
                precision="highest",
            )
            for half in range(2)
        )

    last = pl.program_id(0) == pl.num_programs(0) - 1
    pl.when(last)(lambda: _for_blocks(products.shape, block, transposed=False))


def _for_blocks(
    shape: tuple[int, int, int],
    body: Callable[[jax.Array, Callable[[jax.Array], tuple]], None],
    transposed: bool,
) -> None:
    """Runs `body` on each block of the kernel, with the places of its matrices in the weights."""
    rows, columns = (size // (2 * LANES) for size in shape[1:])
    in_blocks = columns if transposed else rows

    @pl.loop(0, rows * columns)
    def _(i):
        # Not // and %: with signs to look at they do not lower for a TPU that isn't there.
        out, into = jax.lax.div(i, in_blocks), jax.lax.rem(i, in_blocks)

        def tile(n: jax.Array) -> tuple:
            to, origin = jax.lax.rem(jax.lax.div(n, 2), 2), jax.lax.rem(n, 2)
            row, column = origin * in_blocks + into, to * (rows * columns // in_blocks) + out
            if transposed:
                row, column = column, row
            lanes = [pl.ds(pl.multiple_of(k * LANES, LANES), LANES) for k in (row, column)]
            return jax.lax.div(n, 4), *lanes

        body(i, tile)


def _spectra(parts: Sequence[Any], scale, block: int) -> list[jax.Array]:
    """For each pair of frequencies `(tokens, 2 * blocks * LANES)`: real parts, then imaginary."""
    count = block // LANES
    places = zip(_columns(parts), _columns([scale]), strict=True)
    columns = [part[:, lanes] * scale[:, place] for (part, lanes), (_, place) in places]
    blocks = [real_dft(columns[i : i + count]) for i in range(0, len(columns), count)]
    return [
        jnp.concatenate([block[s][part] for part in range(2) for block in blocks], axis=1)
        for s in range(count // 2)
    ]


def _columns_of_product(
    spectra: Sequence[jax.Array], weights, block: int, dtype: jnp.dtype
) -> Iterator[jax.Array]:
    """The product of a tile, `LANES` of its features at a time."""
    out_blocks, count = weights.shape[2] // (2 * LANES), block // LANES
    pairs = [
        jnp.dot(spectrum.astype(dtype), weights[s], preferred_element_type=jnp.float32)
        for s, spectrum in enumerate(spectra)
    ]
    columns = [[pair[:, lanes] for lanes in _lanes(pair.shape[1])] for pair in pairs]
    for o in range(out_blocks):
        parts = [(column[o], column[out_blocks + o]) for column in columns]
        yield from transposed_real_dft(parts, count)


def _width(parts: Sequence[jax.Array]) -> int:
    return sum(part.shape[1] for part in parts)


def _columns(parts: Sequence[Any]) -> list[tuple[Any, slice]]:
    """Where to find the features of all parts, `LANES` at a time."""
    return [(part, lanes) for part in parts for lanes in _lanes(part.shape[1])]


def _lanes(size: int) -> list[slice]:
    return [slice(i, i + LANES) for i in range(0, size, LANES)]
