"""Block-circulant products in one kernel for TPU: spectra never leave its vector memory.

As the strategy `dft`, with a DFT of length f = block / 128. What is left of a block then fills the
128 lanes, so that the DFT needs no data moved: it combines whole registers, by a radix-2 network
on the vector unit, while the matrix unit multiplies the pairs of frequencies. Each token is read
and written once.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from circflax.ops._choice import LANES
from circflax.ops._dft import diagonals

# A tile of tokens has as many as this, and with both sides as many numbers as this, at most.
_TOKENS = 256
_NUMBERS = 2**21
_VMEM_BYTES = 64 * 2**20


def product(
    kernel: jax.Array,
    x: jax.Array,
    left: jax.Array | None,
    right: jax.Array | None,
    *,
    interpret: bool,
) -> jax.Array:
    """`diag(left) B(kernel) diag(right) x`.

    Args:
        kernel: first columns, `(out_blocks, in_blocks, block)`.
        x: `(tokens, in_blocks * block)`.
        left: `(out_blocks * block,)`, or None for ones.
        right: `(in_blocks * block,)`, or None for ones.
        interpret: whether to run the kernel without a TPU, slowly.

    Returns:
        `(tokens, out_blocks * block)`, in the dtype of `x`.
    """
    out_features = kernel.shape[0] * kernel.shape[2]

    def body(left, right, diagonals, x, y, weights):
        _expand_at_first(diagonals, weights)
        spectra = _spectra(x, right, kernel.shape[2])
        for lanes, column in _columns_of_product(spectra, weights, kernel.shape, x.dtype):
            y[:, lanes] = (column * left[:, lanes]).astype(y.dtype)

    return _call(
        "product",
        body,
        [_row(left, out_features), _row(right, x.shape[1]), _diagonals(kernel)],
        [x],
        jax.ShapeDtypeStruct((x.shape[0], out_features), x.dtype),
        pltpu.VMEM(_weights_shape(kernel.shape), x.dtype),
        interpret,
    )


def inner_product(
    kernel: jax.Array,
    x: jax.Array,
    g: jax.Array,
    right: jax.Array | None,
    *,
    interpret: bool,
) -> jax.Array:
    """The sum over the tokens of `g * (B(kernel) diag(right) x)`.

    Args:
        kernel: first columns, `(out_blocks, in_blocks, block)`.
        x: `(tokens, in_blocks * block)`.
        g: `(tokens, out_blocks * block)`.
        right: `(in_blocks * block,)`, or None for ones.
        interpret: whether to run the kernel without a TPU, slowly.

    Returns:
        `(out_blocks * block,)`, in float32.
    """

    def body(right, diagonals, x, g, sums, weights):
        _zero_at_first(sums)
        _expand_at_first(diagonals, weights)
        spectra = _spectra(x, right, kernel.shape[2])
        for lanes, column in _columns_of_product(spectra, weights, kernel.shape, x.dtype):
            sums[:, lanes] += jnp.sum(column * g[:, lanes], axis=0, keepdims=True)

    sums = _call(
        "inner_product",
        body,
        [_row(right, x.shape[1]), _diagonals(kernel)],
        [x, g],
        jax.ShapeDtypeStruct((1, g.shape[1]), jnp.float32),
        pltpu.VMEM(_weights_shape(kernel.shape), x.dtype),
        interpret,
    )
    return sums[0]


def correlation(
    x: jax.Array,
    g: jax.Array,
    block: int,
    left: jax.Array | None,
    right: jax.Array | None,
    *,
    interpret: bool,
) -> jax.Array:
    """The gradient of `sum(g * product(kernel, x, left, right))` with respect to the kernel.

    Args:
        x: `(tokens, in_blocks * block)`.
        g: `(tokens, out_blocks * block)`.
        block: size of the blocks.
        left: `(out_blocks * block,)`, or None for ones.
        right: `(in_blocks * block,)`, or None for ones.
        interpret: whether to run the kernel without a TPU, slowly.

    Returns:
        `(out_blocks, in_blocks, block)`, in float32.
    """
    kernel = jax.ShapeDtypeStruct((g.shape[1] // block, x.shape[1] // block, block), jnp.float32)
    shapes = jax.eval_shape(_diagonals, kernel)

    def body(left, right, x, g, sums, products):
        _zero_at_first(products)
        pairs = zip(_spectra(x, right, block), _spectra(g, left, block), strict=True)
        for s, (columns, rows) in enumerate(pairs):
            products[s] += jax.lax.dot_general(
                columns.astype(x.dtype),
                rows.astype(x.dtype),
                (((0,), (0,)), ((), ())),
                preferred_element_type=jnp.float32,
            )
        _sum_at_last(products, sums)

    sums = _call(
        "correlation",
        body,
        [_row(left, g.shape[1]), _row(right, x.shape[1])],
        [x, g],
        shapes,
        pltpu.VMEM(_weights_shape(kernel.shape), jnp.float32),
        interpret,
    )
    (gradient,) = jax.linear_transpose(_diagonals, kernel)(sums)
    return gradient


def _call(
    name: str,
    body: Callable[..., None],
    whole: Sequence[jax.Array],
    tokens: Sequence[jax.Array],
    out: jax.ShapeDtypeStruct,
    scratch: Any,
    interpret: bool,
) -> jax.Array:
    """Runs `body` on all of `whole` and a tile of `tokens` at a time."""
    count = tokens[0].shape[0]
    summed = out.shape[0] != count
    tile = tile_size(count, *(array.shape[1] for array in (tokens if summed else [*tokens, out])))
    tiles = [pl.BlockSpec((tile, array.shape[1]), lambda i: (i, 0)) for array in tokens]
    every = [pl.BlockSpec(array.shape, lambda i, n=array.ndim: (0,) * n) for array in whole]
    if summed:
        out_spec = pl.BlockSpec(out.shape, lambda i: (0,) * len(out.shape))
    else:
        out_spec = pl.BlockSpec((tile, out.shape[1]), lambda i: (i, 0))
    return pl.pallas_call(
        body,
        out_shape=out,
        grid=(count // tile,),
        in_specs=[*every, *tiles],
        out_specs=out_spec,
        scratch_shapes=[scratch],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=_VMEM_BYTES),
        interpret=interpret,
        name=f"circulant_{name}",
    )(*whole, *tokens)


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


def _diagonals(kernel: jax.Array) -> jax.Array:
    """The diagonals of all Toeplitz matrices, `(matrices, 2 * LANES)`, scaled for the network."""
    count = kernel.shape[2] // LANES
    # Its two passes give length / 2 times what orthogonal tables do, and length for the first pair.
    scale = np.where(np.arange(count // 2) == 0, 1, 2) / count
    scale = scale.astype(kernel.dtype).reshape(-1, 1, 1, 1, 1, 1)
    return (diagonals(kernel, count) * scale).reshape(-1, 2 * LANES)


def _weights_shape(kernel_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """What the spectra multiply with: for each pair from (part, block, lane) to the same."""
    out_blocks, in_blocks, block = kernel_shape
    return block // (2 * LANES), 2 * in_blocks * LANES, 2 * out_blocks * LANES


def _expand_at_first(diagonals, weights) -> None:
    """Makes Toeplitz matrices of their diagonals: row n is rolled by n."""

    def expand(i: jax.Array, tile: tuple) -> None:
        rows = jnp.broadcast_to(diagonals[pl.ds(i, 1), :], (LANES, 2 * LANES))
        rows = pltpu.roll(rows, 0, 1, stride=1, stride_axis=0)
        weights[tile] = rows[:, :LANES].astype(weights.dtype)

    pl.when(pl.program_id(0) == 0)(lambda: _for_tiles(weights.shape, expand))


def _sum_at_last(products, sums) -> None:
    """Sums the diagonals of matrices: row n is rolled back by n."""

    def reduce(i: jax.Array, tile: tuple) -> None:
        # The hardware rolls later rows further, by no less than 0: upside down they fit that.
        row, column = (jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), n) for n in (0, 1))
        flip = (row + column == LANES - 1).astype(jnp.float32)
        rows = jnp.dot(flip, products[tile], precision="highest")
        rows = jnp.concatenate([rows, jnp.zeros_like(rows)], axis=1)
        rows = pltpu.roll(rows, LANES + 1, 1, stride=1, stride_axis=0)
        sums[pl.ds(i, 1), :] = jnp.sum(rows, axis=0, keepdims=True)

    last = pl.num_programs(0) - 1
    pl.when(pl.program_id(0) == last)(lambda: _for_tiles(products.shape, reduce))


def _for_tiles(shape: tuple[int, int, int], body: Callable[[jax.Array, tuple], None]) -> None:
    """Runs `body` on each Toeplitz matrix: its place among the diagonals and in the weights."""
    rows, columns = shape[1] // LANES, shape[2] // LANES

    @pl.loop(0, shape[0] * rows * columns)
    def _(i):
        # Not // and %: with signs to look at they do not lower for a TPU that isn't there.
        place, row = jax.lax.div(i, rows), jax.lax.rem(i, rows)
        pair, column = jax.lax.div(place, columns), jax.lax.rem(place, columns)
        lanes = [pl.ds(pl.multiple_of(n * LANES, LANES), LANES) for n in (row, column)]
        body(i, (pair, *lanes))


def _spectra(x, scale, block: int) -> list[jax.Array]:
    """For each pair of frequencies `(tokens, 2 * blocks * LANES)`: real parts, then imaginary."""
    count = block // LANES
    columns = [x[:, lanes] * scale[:, lanes] for lanes in _lanes(x.shape[1])]
    blocks = [_real_dft(columns[i : i + count]) for i in range(0, len(columns), count)]
    return [
        jnp.concatenate([block[s][part] for part in range(2) for block in blocks], axis=1)
        for s in range(count // 2)
    ]


def _columns_of_product(
    spectra: Sequence[jax.Array],
    weights,
    kernel_shape: tuple[int, int, int],
    dtype: jnp.dtype,
) -> Iterator[tuple[slice, jax.Array]]:
    """The product of a tile, `LANES` of its features at a time."""
    out_blocks, _, block = kernel_shape
    count = block // LANES
    pairs = [
        jnp.dot(spectrum.astype(dtype), weights[s], preferred_element_type=jnp.float32)
        for s, spectrum in enumerate(spectra)
    ]
    columns = [[pair[:, lanes] for lanes in _lanes(pair.shape[1])] for pair in pairs]
    like = [jax.ShapeDtypeStruct(columns[0][0].shape, jnp.float32)] * count
    for o in range(out_blocks):
        parts = [(column[o], column[out_blocks + o]) for column in columns]
        (slices,) = jax.linear_transpose(_real_dft, like)(parts)
        yield from zip(_lanes(block, start=o * block), slices, strict=True)


def _lanes(size: int, start: int = 0) -> list[slice]:
    return [slice(i, i + LANES) for i in range(start, start + size, LANES)]


def _real_dft(x: Sequence[jax.Array]) -> list[tuple[jax.Array, jax.Array]]:
    """The DFT of an even number of real arrays, as in the tables of `dft` but not normalised."""
    spectrum = _half_spectrum(x)
    return [(spectrum[0][0], spectrum[-1][0]), *spectrum[1:-1]]


def _half_spectrum(x: Sequence[jax.Array]) -> list[tuple[jax.Array, jax.Array | None]]:
    """Real and imaginary parts, None where 0, of frequencies 0 to n // 2: even and odd split."""
    n = len(x)
    if n % 2:
        return [_frequency(x, k) for k in range(n // 2 + 1)]
    spectrum = {}
    halves = zip(_half_spectrum(x[::2]), _half_spectrum(x[1::2]), strict=True)
    for k, ((even_real, even_imag), odd) in enumerate(halves):
        real, imag = _rotated(odd, k, n)
        spectrum[n // 2 - k] = _sum(even_real, real, -1), _sum(imag, even_imag, -1)
        spectrum[k] = _sum(even_real, real), _sum(even_imag, imag)
    return [spectrum[k] for k in range(n // 2 + 1)]


def _rotated(number: tuple, k: int, n: int) -> tuple[jax.Array | None, jax.Array | None]:
    """A complex number times exp(-2 pi i k / n), without products by 0 and 1."""
    real, imag = number
    if k == 0:
        return real, imag
    if 4 * k == n:
        return imag, -real
    cos, sin = math.cos(2 * math.pi * k / n), math.sin(2 * math.pi * k / n)
    if imag is None:
        return cos * real, -sin * real
    return cos * real + sin * imag, cos * imag - sin * real


def _sum(a: jax.Array | None, b: jax.Array | None, sign: int = 1) -> jax.Array | None:
    if b is None:
        return a
    if a is None:
        return b if sign == 1 else -b
    return a + b if sign == 1 else a - b


def _frequency(x: Sequence[jax.Array], k: int) -> tuple[jax.Array, jax.Array | None]:
    angles = [2 * math.pi * k * j / len(x) for j in range(len(x))]
    real = sum(math.cos(angle) * array for angle, array in zip(angles, x, strict=True))
    imag = sum(-math.sin(angle) * array for angle, array in zip(angles, x, strict=True))
    return real, imag if k else None
