"""Batches of few shapes, each made when it is asked for.

XLA compiles once per shape, so every batch has the full batch size and, where examples differ in
length, is padded to one of a few bucket lengths. A batch is a pure function of the examples, the
seed, the epoch and its number, so that a resumed run goes on with exactly the batches that were
left, and so that each of several processes can make its own rows of the batches that all agree on.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import EllipsisType

import numpy as np

from train.tasks.records import DataError

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class PlannedBatch:
    """What a batch holds.

    Attributes:
        indices: Its examples, at most as many as its rows.
        length: The length of its rows.
        rows: Which of its rows are made; an ellipsis for all.
    """

    indices: np.ndarray
    length: int
    rows: np.ndarray | EllipsisType = ...


@dataclass(frozen=True)
class Batches:
    """The batches of one pass, each made when it is asked for, or while the last is in use.

    Indexing gives a batch; slicing gives the `Batches` of a part, so that ``batches[k:]`` goes on
    after k batches without making them.

    Attributes:
        make: Makes a batch from what it holds.
        plan: What each batch holds.
    """

    make: Callable[[PlannedBatch], Batch]
    plan: tuple[PlannedBatch, ...]

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, key: int | slice) -> "Batch | Batches":
        if isinstance(key, slice):
            return replace(self, plan=self.plan[key])
        return self.make(self.plan[key])

    def __iter__(self) -> Iterator[Batch]:
        # One ahead, in a thread: an accelerator need not wait while images are decoded.
        with ThreadPoolExecutor(max_workers=1) as thread:
            ahead = None
            for planned in self.plan:
                ready, ahead = ahead, thread.submit(self.make, planned)
                if ready is not None:
                    yield ready.result()
            if ahead is not None:
                yield ahead.result()

    def share(self, rows: np.ndarray | EllipsisType) -> "Batches":
        """The same batches, of which only some rows are made.

        Args:
            rows: Their numbers; an ellipsis for all.

        Returns:
            The batches.
        """
        return replace(self, plan=tuple(replace(planned, rows=rows) for planned in self.plan))

    def in_order(self, outputs: Sequence[np.ndarray]) -> np.ndarray:
        """Puts the rows computed from these batches into the order of the examples.

        Args:
            outputs: One array for each batch, with a row for each of its rows, made here or not;
                filling rows are left out.

        Returns:
            One row for each example.
        """
        rows = [out[: len(p.indices)] for out, p in zip(outputs, self.plan, strict=True)]
        order = np.concatenate([planned.indices for planned in self.plan])
        return np.concatenate(rows)[np.argsort(order)]


def filled(planned: PlannedBatch, batch_size: int) -> np.ndarray:
    """The rows to make: a batch's examples, and the first of them again where they are too few.

    Args:
        planned: What the batch holds.
        batch_size: Rows of the batch.

    Returns:
        (rows to make,) positions. Unlike empty rows, repeated ones cannot make a model divide by
        0.
    """
    count = len(planned.indices)
    rows = np.concatenate([planned.indices, np.repeat(planned.indices[:1], batch_size - count)])
    return rows[planned.rows]


def weights(planned: PlannedBatch, batch_size: int) -> np.ndarray:
    """1 for the rows to make that are examples, 0 for those that fill the batch up.

    Args:
        planned: What the batch holds.
        batch_size: Rows of the batch.

    Returns:
        (rows to make,), float32.
    """
    return (np.arange(batch_size) < len(planned.indices)).astype(np.float32)[planned.rows]


def plan(
    lengths: np.ndarray,
    batch_size: int,
    buckets: Sequence[int],
    rng: np.random.Generator | None = None,
) -> tuple[PlannedBatch, ...]:
    """Groups examples by bucket, so that a batch pads to little more than it needs.

    What does not fill a batch moves up to the next bucket in use, so that only the last batch
    can be partial.

    Args:
        lengths: Tokens of each example.
        batch_size: Rows of a batch.
        buckets: Increasing sequence lengths.
        rng: Shuffles the examples and the order of the batches; None keeps both.

    Returns:
        The batches, each with at most `batch_size` examples.

    Raises:
        DataError: If an example is longer than the last bucket.
    """
    if len(lengths) and lengths.max() > buckets[-1]:
        raise DataError(
            f"an example has {lengths.max()} tokens, but the longest bucket is {buckets[-1]}"
        )
    order = np.arange(len(lengths)) if rng is None else rng.permutation(len(lengths))
    bucket_of = np.searchsorted(buckets, lengths[order])
    full: list[PlannedBatch] = []
    rest = np.empty(0, order.dtype)
    length = 0
    for bucket in np.unique(bucket_of):
        members = np.concatenate([rest, order[bucket_of == bucket]])
        length = int(buckets[bucket])
        end = len(members) - len(members) % batch_size
        full += [
            PlannedBatch(members[start : start + batch_size], length)
            for start in range(0, end, batch_size)
        ]
        rest = members[end:]
    if rng is not None:
        full = [full[i] for i in rng.permutation(len(full))]
    last = [PlannedBatch(rest, length)] if len(rest) else []
    return (*full, *last)
