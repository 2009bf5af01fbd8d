"""Random arrays that an adapter draws from a seed again and again, and never stores.

They come from the raw stream of NumPy's Philox, which is the same on every machine and in every
version, so that an adapter file that names its seed means the same arrays wherever it is read.
"""

import functools

import numpy as np


@functools.lru_cache(maxsize=64)
def uniform(seed: int, stream: int, shape: tuple[int, ...], bound: float) -> np.ndarray:
    """Numbers drawn evenly from within `bound`; a shape with fewer rows gets the first of them.

    Args:
        seed: of all arrays of a method.
        stream: tells apart the arrays of one seed.
        shape: of the array.
        bound: the largest size of a number.

    Returns:
        float32, read-only: calls with the same arguments share it.
    """
    raw = np.random.Philox([seed, stream]).random_raw(int(np.prod(shape)))
    # The 24 highest bits: as many as float32 tells apart in [0, 1).
    numbers = (raw >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
    return _read_only(((2 * numbers - 1) * np.float32(bound)).reshape(shape))


@functools.lru_cache(maxsize=64)
def positions(seed: int, count: int, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Different positions in a matrix, drawn at random.

    Args:
        seed: of the draw.
        count: how many.
        shape: of the matrix, with at least as many entries.

    Returns:
        Rows and columns, int32, in the order of the matrix's entries; read-only.
    """
    raw = np.random.Philox(seed).random_raw(shape[0] * shape[1])
    chosen = np.sort(np.argpartition(raw, count - 1)[:count])
    rows, columns = np.divmod(chosen, shape[1])
    return _read_only(rows.astype(np.int32)), _read_only(columns.astype(np.int32))


def _read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array
