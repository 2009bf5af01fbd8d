"""Rows of tokens for a model: one example each, or several packed into one."""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from train.tasks.batches import Batch, Batches, PlannedBatch, filled, plan, weights
from train.tasks.language.tokens import Encoded


@dataclass(frozen=True)
class Rows:
    """The rows of a split.

    Attributes:
        encoded: The examples.
        packs: Which of them each row holds, in this order.
        buckets: Increasing lengths that rows are padded to.
        apart: Whether rows hold several examples, which must not see each other.
    """

    encoded: Encoded
    packs: tuple[tuple[int, ...], ...]
    buckets: tuple[int, ...]
    apart: bool

    def __len__(self) -> int:
        return len(self.packs)

    def batches(self, batch_size: int, rng: np.random.Generator | None = None) -> Batches:
        """The batches of one pass.

        Args:
            batch_size: Rows of every batch.
            rng: Shuffles rows and batches, for training; None keeps both.

        Returns:
            The batches, each as `collate` makes it: every example once, and as many batches
            whatever their order.
        """
        sizes = self.encoded.lengths
        lengths = np.asarray([sum(sizes[example] for example in pack) for pack in self.packs])
        planned = plan(lengths, batch_size, self.buckets, rng)
        return Batches(lambda batch: collate(self, batch, batch_size), planned)


def single_rows(encoded: Encoded, max_length: int) -> Rows:
    """Gives each example a row of its own.

    Args:
        encoded: The examples.
        max_length: Tokens of the longest one, or more.

    Returns:
        The rows, to be padded to powers of two or `max_length`.
    """
    # Below 32 a shorter row costs about as much.
    lengths = tuple(2**i for i in range(5, (max_length - 1).bit_length()))
    packs = tuple((example,) for example in range(len(encoded)))
    return Rows(encoded, packs, (*lengths, max_length), apart=False)


def packed_rows(encoded: Encoded, max_length: int, seed: int) -> Rows:
    """Packs examples into rows of one length.

    Args:
        encoded: The examples.
        max_length: Tokens of a row.
        seed: Chooses which examples of a length share a row with which.

    Returns:
        The rows, the same in every epoch, so that there are as many steps in each.
    """
    return Rows(encoded, pack(encoded.lengths, max_length, seed), (max_length,), apart=True)


def pack(lengths: np.ndarray, capacity: int, seed: int) -> tuple[tuple[int, ...], ...]:
    """Best fit, longest first: each example goes where it leaves least room.

    Args:
        lengths: Tokens of each example, at most `capacity`.
        capacity: Tokens of a row.
        seed: Chooses among examples of one length.

    Returns:
        The examples of each row, every example in one.
    """
    order = np.random.default_rng(seed).permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    packs: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # the room left in each row and its number, sorted
    for example in map(int, order):
        length = int(lengths[example])
        place = bisect.bisect_left(rooms, (length, -1))
        if place == len(rooms):
            room, row = capacity, len(packs)
            packs.append([])
        else:
            room, row = rooms.pop(place)
        packs[row].append(example)
        bisect.insort(rooms, (room - length, row))
    return tuple(map(tuple, packs))


def collate(rows: Rows, planned: PlannedBatch, batch_size: int) -> Batch:
    """Makes the arrays of one batch, each (rows to make, length).

    Args:
        rows: The rows.
        planned: Which of them, and the length to pad to.
        batch_size: Rows of the batch.

    Returns:
        ``input_ids``; ``attention_mask``, 1 for tokens; ``position_ids``, from 0 in each example;
        ``segment_ids`` if rows are packed, from 1 in each row and 0 for padding; ``targets``, the
        next token of the same example; all int32; and ``target_weights`` (float32), 1 where the
        target is to be learnt, 0 elsewhere and in the rows that fill up a partial batch.
    """
    # Padding is masked, so any id serves.
    names = ("input_ids", "attention_mask", "position_ids", "segment_ids", "targets")
    own = filled(planned, batch_size)
    shape = (len(own), planned.length)
    batch = {name: np.zeros(shape, np.int32) for name in names}
    batch["target_weights"] = np.zeros(shape, np.float32)
    counts = weights(planned, batch_size)
    for place, row in enumerate(own):
        end = 0
        for number, example in enumerate(rows.packs[row], start=1):
            ids, learnt = rows.encoded.row(example)
            begin, end = end, end + len(ids)
            batch["input_ids"][place, begin:end] = ids
            batch["attention_mask"][place, begin:end] = 1
            batch["position_ids"][place, begin:end] = np.arange(len(ids))
            batch["segment_ids"][place, begin:end] = number
            batch["targets"][place, begin : end - 1] = ids[1:]
            batch["target_weights"][place, begin : end - 1] = counts[place] * learnt[1:]
    if not rows.apart:
        del batch["segment_ids"]
    return batch


def describe(rows: Rows, name: str) -> Sequence[str]:
    """What packing came to.

    Args:
        rows: The rows.
        name: The split's name.

    Returns:
        A sentence, or nothing for rows that are not packed.
    """
    if not rows.apart:
        return ()
    filled_part = rows.encoded.lengths.sum() / (len(rows) * rows.buckets[-1])
    return (
        f"{name}: {len(rows.encoded)} examples in {len(rows)} rows of {rows.buckets[-1]} tokens, "
        f"{filled_part:.1%} filled",
    )
