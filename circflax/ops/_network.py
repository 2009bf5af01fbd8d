"""The DFT of a few arrays by a radix-2 network: sums of whole arrays, in which no number moves.

A circulant of size b is, for any divisor f of b, a circulant of size f whose entries are Toeplitz
blocks of size m = b / f. A DFT of length f over those entries combines vectors of m numbers that
lie side by side, and leaves one product with dense blocks for each pair of frequencies.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import jax
import numpy as np


def real_dft(x: Sequence[jax.Array]) -> list[tuple[jax.Array, jax.Array]]:
    """The DFT of real arrays, not normalised.

    Args:
        x: arrays of one shape.

    Returns:
        Real and imaginary part of each frequency up to half their number; the first pair holds
        the two real frequencies, 0 and half their number (zeros where that is odd).
    """
    (first, _), *others = _half_spectrum(x)
    if len(x) % 2:
        return [(first, 0 * first), *others]
    *others, (last, _) = others
    return [(first, last), *others]


def transposed_real_dft(pairs: Sequence[tuple[jax.Array, jax.Array]], length: int) -> list:
    """The transpose of `real_dft` for a number of arrays."""
    ((first, _), *_) = pairs
    like = [jax.ShapeDtypeStruct(first.shape, first.dtype)] * length
    (x,) = jax.linear_transpose(real_dft, like)(list(pairs))
    return x


@lru_cache
def real_dft_table(length: int) -> np.ndarray:
    """`real_dft` of a number of arrays as a matrix, `(2 * pairs, length)`."""
    return np.array(real_dft(np.eye(length))).reshape(-1, length)


@lru_cache
def rotations(length: int) -> np.ndarray:
    """What the DFT makes of circular shifts.

    Returns:
        `(pairs, 2, 2, length)`: the matrix that each pair multiplies by in a shift by 0, 1, ...
        Between `real_dft` and its transpose they shift: what both scale by is taken out of them.
    """
    angles = 2 * np.pi * np.outer(np.arange((length + 1) // 2), np.arange(length)) / length
    cos, sin = np.cos(angles), np.sin(angles)
    matrices = np.stack([np.stack([cos, sin], axis=1), np.stack([-sin, cos], axis=1)], axis=1)
    matrices[0] = 0.0
    matrices[0, 0, 0] = 1.0
    if length % 2 == 0:
        matrices[0, 1, 1] = (-1.0) ** np.arange(length)
    scale = np.where(np.arange(len(matrices)) == 0, 1, 2) / length
    return matrices * scale[:, None, None, None]


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
