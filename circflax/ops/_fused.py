"""Block-circulant products in one kernel for TPU: spectra never leave its vector memory.

As the strategy `dft`, with a DFT of length f = block / 128. What is left of a block then fills the
128 lanes, so that the DFT needs no data moved: it combines whole registers, by a radix-2 network
on the vector unit, while the matrix unit multiplies the pairs of frequencies. Each token is read
and written once.
"""

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
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
# A register holds this many tokens of bfloat16.
_SUBLANES = 16
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
        xs: x in parts of whole blocks, `(..., width)`, together `in_blocks * block` wide.
        widths: of the parts of the result, together `out_blocks * block`.
        left: `(out_blocks * block,)`, or None for ones.
        right: `(in_blocks * block,)`, or None for ones.
        transposed: whether to multiply by the transpose of `B(kernel)`; outputs and inputs above
            are then those of the transpose.
        interpret: whether to run the kernel without a TPU, slowly.

    Returns:
        The result in parts, `(..., width)`, in the dtype of x.
    """
    block, (*leading, _), dtype = kernel.shape[2], xs[0].shape, xs[0].dtype

    def body(whole, xs, ys, sums, scratch):
        left, right, *given = whole
        _expand_at_first(*given, *scratch)
        spectra = _spectra(xs, right, block)
        columns = _columns_of_product(spectra, scratch[0], block, dtype, transposed)
        _finish(columns, ys, left, results=ys)

    return _call(
        "transposed_product" if transposed else "product",
        body,
        [_rows(left), _rows(right), _turns(block), _blocks(kernel)],
        [xs],
        [jax.ShapeDtypeStruct((*leading, width), dtype) for width in widths],
        [],
        _scratch(kernel.shape, dtype),
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

    def body(whole, xs, gs, _, outs, scratch):
        (right, *given), (sums,) = whole, outs
        _zero_at_first(sums)
        _expand_at_first(*given, *scratch)
        spectra = _spectra(xs, right, block)
        columns = _columns_of_product(spectra, scratch[0], block, dtype, transposed)
        _finish(columns, gs, sums=sums)

    (sums,) = _call(
        "transposed_inner_product" if transposed else "inner_product",
        body,
        [_rows(right), _turns(block), _blocks(kernel)],
        [xs, gs],
        [],
        [_rows_like(gs)],
        _scratch(kernel.shape, dtype),
        interpret,
    )
    return sums.reshape(-1)


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
        xs: x in parts of whole blocks, `(..., width)`, together `in_blocks * block` wide.
        gs: g in parts like x, together `out_blocks * block` wide.
        block: size of the blocks.
        left: `(out_blocks * block,)`, or None for ones.
        right: `(in_blocks * block,)`, or None for ones.
        interpret: whether to run the kernel without a TPU, slowly.

    Returns:
        `(out_blocks, in_blocks, block)`, in float32.
    """
    shape, dtype = (_width(gs) // block, _width(xs) // block, block), xs[0].dtype

    def body(whole, xs, gs, _, outs, scratch):
        (left, right, turns), (sums,), (products, diagonals) = whole, outs, scratch
        _zero_at_first(products)
        _correlate(_spectra(xs, right, block), _spectra(gs, left, block), products, dtype)
        _sum_at_last(turns, products, diagonals, sums)

    (sums,) = _call(
        "correlation",
        body,
        [_rows(left), _rows(right), _turns(block)],
        [xs, gs],
        [],
        [jax.eval_shape(_blocks, jax.ShapeDtypeStruct(shape, jnp.float32))],
        _scratch(shape, jnp.float32),
        interpret,
    )
    return sums.reshape(shape)


def gradients(
    kernel: jax.Array,
    xs: Sequence[jax.Array],
    gs: Sequence[jax.Array],
    left: jax.Array | None,
    right: jax.Array | None,
    sought: Collection[str],
    *,
    interpret: bool,
) -> dict[str, list[jax.Array]]:
    """What a backward pass needs of a product, reading each vector once.

    Args:
        kernel: first columns, `(out_blocks, in_blocks, block)`.
        xs: as in `correlation`.
        gs: as in `correlation`.
        left: `(out_blocks * block,)`, or None for ones.
        right: `(in_blocks * block,)`, or None for ones.
        sought: the arguments, "x", "g", "left" and "right", whose gradients of
            `sum(g * product(kernel, x, left, right))` are sought besides the kernel's.
        interpret: whether to run the kernel without a TPU, slowly.

    Returns:
        The gradients by name, in parts: those of vectors in their dtype, others in float32.
    """
    block, dtype = kernel.shape[2], xs[0].dtype
    # The vectors on the side of each argument.
    sides = {"x": xs, "g": gs, "left": gs, "right": xs}
    vectors = [name for name in ("x", "g") if name in sought]
    diagonals = [name for name in ("left", "right") if name in sought]

    def body(whole, xs, gs, ys, sums, scratch):
        (left, right, *given), (weights, products, rolled) = whole, scratch
        kernel_sums, *diagonal_sums = sums
        _zero_at_first(products, *diagonal_sums)
        _expand_at_first(*given, weights, rolled)
        spectra = _spectra(xs, right, block), _spectra(gs, left, block)
        _correlate(*spectra, products, dtype)
        remaining = iter(ys)
        found = {name: [next(remaining) for _ in sides[name]] for name in vectors}
        summed = dict(zip(diagonals, diagonal_sums, strict=True))
        for name, of, scale, diagonal, spectrum, transposed in (
            ("x", xs, right, "right", spectra[1], True),
            ("g", gs, left, "left", spectra[0], False),
        ):
            if name in found or diagonal in summed:
                columns = _columns_of_product(spectrum, weights, block, dtype, transposed)
                _finish(columns, of, scale, results=found.get(name), sums=summed.get(diagonal))
        _sum_at_last(given[0], products, rolled, kernel_sums)

    whole = [_rows(left), _rows(right), _turns(block), _blocks(kernel)]
    results = [part for name in vectors for part in sides[name]]
    weights, rolled = _scratch(kernel.shape, dtype)
    products = pltpu.VMEM(weights.shape, jnp.float32)
    found = iter(
        _call(
            "all_gradients" if diagonals else "gradients",
            body,
            whole,
            [xs, gs],
            [jax.ShapeDtypeStruct(part.shape, dtype) for part in results],
            [
                jax.ShapeDtypeStruct(whole[-1].shape, jnp.float32),
                *(_rows_like(sides[name]) for name in diagonals),
            ],
            [weights, products, rolled],
            interpret,
        )
    )
    gradients = {name: [next(found) for _ in sides[name]] for name in vectors}
    gradients["kernel"] = [next(found).reshape(kernel.shape)]
    return gradients | {name: [next(found).reshape(-1)] for name in diagonals}


def _correlate(xs, gs, products, dtype: jnp.dtype) -> None:
    """Adds, for each pair of frequencies, the products of two spectra over a tile's tokens."""
    for s, (columns, rows) in enumerate(zip(xs, gs, strict=True)):
        products[s] += jax.lax.dot_general(
            columns.astype(dtype),
            rows.astype(dtype),
            (((0,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )


def _finish(columns, vectors, scale=None, *, results=None, sums=None) -> None:
    """Writes a product's columns, scaled, and sums them with the vectors of their side."""
    places = _columns(vectors), _columns(results or vectors), columns
    for i, ((vector, lanes), (result, _), column) in enumerate(zip(*places, strict=True)):
        if sums is not None:
            sums[i : i + 1] += jnp.sum(column * _column(vector, lanes), axis=0, keepdims=True)
        if results:
            column = _scaled(column, scale, i).astype(result.dtype)
            result[..., lanes] = column.reshape(*result.shape[:-1], LANES)


def _call(
    name: str,
    body: Callable[..., None],
    whole: Sequence[jax.Array | None],
    vectors: Sequence[Sequence[jax.Array]],
    results: Sequence[jax.ShapeDtypeStruct],
    sums: Sequence[jax.ShapeDtypeStruct],
    scratch: Sequence[Any],
    interpret: bool,
) -> list[jax.Array]:
    """Runs `body` on all of `whole` and a tile of the vectors at a time.

    Results have the tiles of the vectors; sums are of all tiles. What is None stays so.
    """
    groups = [whole, *vectors, results, sums, scratch]

    def run(*refs) -> None:
        remaining = iter(refs)
        body(*([None if each is None else next(remaining) for each in of] for of in groups))

    whole = [array for array in whole if array is not None]
    tiled = list(itertools.chain(*vectors))
    *leading, _ = tiled[0].shape
    count = math.prod(leading)
    tile = tile_shape(leading, *(array.shape[-1] for array in (*tiled, *results)))
    lines = leading[len(leading) + 1 - len(tile) :]

    def seen(array: Any) -> tuple[int, ...]:
        return count // math.prod(lines), *lines, array.shape[-1]

    def in_tiles(array: Any) -> pl.BlockSpec:
        def place(i: jax.Array) -> tuple:
            if tile[1:] == tuple(lines):
                return i, *[0] * len(tile)
            tiles = lines[0] // tile[1]
            return jax.lax.div(i, tiles), jax.lax.rem(i, tiles), 0

        return pl.BlockSpec((*tile, array.shape[-1]), place)

    def at_once(array: Any) -> pl.BlockSpec:
        return pl.BlockSpec(array.shape, lambda i: (0,) * array.ndim)

    outs = pl.pallas_call(
        run,
        out_shape=[*(jax.ShapeDtypeStruct(seen(each), each.dtype) for each in results), *sums],
        grid=(count // math.prod(tile),),
        in_specs=[*map(at_once, whole), *map(in_tiles, tiled)],
        out_specs=[*map(in_tiles, results), *map(at_once, sums)],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            vmem_limit_bytes=_VMEM_BYTES,
            # XLA may then compute vectors as they are read, a layer norm say, and not store them.
            allow_input_fusion=[*[False] * len(whole), *[True] * len(tiled)],
        ),
        interpret=interpret,
        name=f"circulant_{name}",
    )(*whole, *(array.reshape(seen(array)) for array in tiled))
    return [out.reshape(each.shape) for out, each in zip(outs, [*results, *sums], strict=True)]


def tile_shape(leading: Sequence[int], *widths: int) -> tuple[int, ...]:
    """How many tokens a kernel reads at a time: `(tokens,)`, or `(rows, tokens)`.

    Args:
        leading: axes of the vectors but the last. XLA fuses no operation into the kernel if there
            is a reshape between, so that the last two stay where tiles fit them.
        widths: of the vectors.
    """
    tile = math.gcd(math.prod(leading), _TOKENS)
    while tile % 32 == 0 and tile * sum(widths) > _NUMBERS:
        tile //= 2
    if len(leading) < 2:
        return (tile,)
    lines = math.gcd(leading[-1], tile)
    if lines % _SUBLANES or lines < min(leading[-1], LANES):
        return (tile,)
    return (tile // lines, lines) if lines == leading[-1] else (1, lines)


def _zero_at_first(*sums) -> None:
    @pl.when(pl.program_id(0) == 0)
    def _():
        for each in sums:
            each[:] = jnp.zeros_like(each)


def _rows(scale: jax.Array | None) -> jax.Array | None:
    """A diagonal as it lies in memory, `LANES` numbers a row."""
    return None if scale is None else scale.reshape(-1, LANES).astype(jnp.float32)


def _rows_like(parts: Sequence[jax.Array]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((_width(parts) // LANES, LANES), jnp.float32)


def _column(part, lanes: slice) -> jax.Array:
    """`LANES` features of a tile's tokens, `(tokens, LANES)`, in float32."""
    return part[..., lanes].astype(jnp.float32).reshape(-1, LANES)


def _scaled(column: jax.Array, scale, i: int) -> jax.Array:
    return column if scale is None else column * scale[i : i + 1]


def _blocks(kernel: jax.Array) -> jax.Array:
    """The kernel as it lies in memory, a block a row: `(blocks, 1, block)`."""
    return kernel.reshape(-1, 1, kernel.shape[2]).astype(jnp.float32)


def _turns(block: int) -> np.ndarray:
    """What makes the diagonals of a block's Toeplitz matrices of its chunks.

    Returns:
        `(2, matrices, length)`: those from the main diagonal down, and those above it, which reach
        back into the chunk before; the matrices in the order pair, part to, part from.
    """
    length = block // LANES
    turns = rotations(length).reshape(-1, length)
    return np.stack([turns, np.roll(turns, -1, axis=1)]).astype(np.float32)


def _scratch(kernel_shape: tuple[int, int, int], dtype: Any) -> list[Any]:
    """Room for what the spectra multiply with, and for the diagonals of one block's matrices.

    The first holds for each pair a matrix from (part, block, lane) to the same.
    """
    out_blocks, in_blocks, block = kernel_shape
    pairs = block // (2 * LANES)
    weights = pairs, 2 * in_blocks * LANES, 2 * out_blocks * LANES
    return [pltpu.VMEM(weights, dtype), pltpu.VMEM((4 * pairs, 2 * LANES), jnp.float32)]


def _expand_at_first(turns, kernel, weights, diagonals) -> None:
    """Makes Toeplitz matrices of the kernel: row n is their diagonals rolled by n."""

    def block(i: jax.Array, tiles: Callable[[jax.Array], tuple]) -> None:
        chunks = jnp.concatenate([kernel[i, :, lanes] for lanes in _lanes(kernel.shape[2])])
        for half in range(2):
            diagonals[:, half * LANES : (half + 1) * LANES] = jnp.dot(
                turns[half], chunks, precision="highest"
            )

        @pl.loop(0, diagonals.shape[0])
        def _(n):
            rows = jnp.broadcast_to(diagonals[pl.ds(n, 1), :], (LANES, 2 * LANES))
            rows = pltpu.roll(rows, 0, 1, stride=1, stride_axis=0)[:, :LANES]
            weights[tiles(n)] = rows.astype(weights.dtype)

    pl.when(pl.program_id(0) == 0)(lambda: _for_blocks(weights.shape, block))


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

        chunks = sum(
            jax.lax.dot_general(
                turns[half],
                diagonals[:, half * LANES : (half + 1) * LANES],
                (((0,), (0,)), ((), ())),
                precision="highest",
            )
            for half in range(2)
        )
        for k, lanes in enumerate(_lanes(sums.shape[2])):
            sums[i, :, lanes] = chunks[k : k + 1]

    last = pl.program_id(0) == pl.num_programs(0) - 1
    pl.when(last)(lambda: _for_blocks(products.shape, block))


def _for_blocks(
    shape: tuple[int, int, int],
    body: Callable[[jax.Array, Callable[[jax.Array], tuple]], None],
) -> None:
    """Runs `body` on each block of the kernel, with the places of its matrices in the weights."""
    in_blocks, out_blocks = (size // (2 * LANES) for size in shape[1:])

    @pl.loop(0, in_blocks * out_blocks)
    def _(i):
        # Not // and %: with signs to look at they do not lower for a TPU that isn't there.
        out, into = jax.lax.div(i, in_blocks), jax.lax.rem(i, in_blocks)

        def tile(n: jax.Array) -> tuple:
            to, origin = jax.lax.rem(jax.lax.div(n, 2), 2), jax.lax.rem(n, 2)
            places = origin * in_blocks + into, to * out_blocks + out
            lanes = [pl.ds(pl.multiple_of(k * LANES, LANES), LANES) for k in places]
            return jax.lax.div(n, 4), *lanes

        body(i, tile)


def _spectra(parts: Sequence[Any], scale, block: int) -> list[jax.Array]:
    """For each pair of frequencies `(tokens, 2 * blocks * LANES)`: real parts, then imaginary."""
    count = block // LANES
    columns = [_scaled(_column(*place), scale, i) for i, place in enumerate(_columns(parts))]
    blocks = [real_dft(columns[i : i + count]) for i in range(0, len(columns), count)]
    return [
        jnp.concatenate([block[s][part] for part in range(2) for block in blocks], axis=1)
        for s in range(count // 2)
    ]


def _columns_of_product(
    spectra: Sequence[jax.Array], weights, block: int, dtype: jnp.dtype, transposed: bool = False
) -> Iterator[jax.Array]:
    """The product of a tile with the weights or their transposes, `LANES` features at a time."""
    summed = 1 if transposed else 0
    out_blocks, count = weights.shape[2 - summed] // (2 * LANES), block // LANES
    pairs = [
        jax.lax.dot_general(
            spectrum.astype(dtype),
            weights[s],
            (((1,), (summed,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        for s, spectrum in enumerate(spectra)
    ]
    columns = [[pair[:, lanes] for lanes in _lanes(pair.shape[1])] for pair in pairs]
    for o in range(out_blocks):
        parts = [(column[o], column[out_blocks + o]) for column in columns]
        yield from transposed_real_dft(parts, count)


def _width(parts: Sequence[jax.Array]) -> int:
    return sum(part.shape[-1] for part in parts)


def _columns(parts: Sequence[Any]) -> list[tuple[Any, slice]]:
    """Where to find the features of all parts, `LANES` at a time."""
    return [(part, lanes) for part in parts for lanes in _lanes(part.shape[-1])]


def _lanes(size: int) -> list[slice]:
    return [slice(i, i + LANES) for i in range(0, size, LANES)]
