"""Batches are made ahead, one at a time."""

import threading

import numpy as np
import pytest

from train.tasks.batches import Batches, plan

PLAN = plan(np.zeros(12, int), 2, (0,))


def test_the_next_batch_is_made_while_one_is_in_use() -> None:
    begun = [threading.Event() for _ in PLAN]

    def make(planned):
        number = int(planned.indices[0]) // 2
        begun[number].set()
        return {"number": np.asarray(number)}

    for number, batch in enumerate(Batches(make, PLAN)):
        assert batch["number"] == number
        assert all(event.wait(10) for event in begun[: number + 2])
        assert not any(event.is_set() for event in begun[number + 2 :])


def test_an_error_comes_with_its_batch() -> None:
    def make(planned):
        if planned is PLAN[2]:
            raise OSError("no such image")
        return {}

    seen = []
    with pytest.raises(OSError, match="no such image"):
        for batch in Batches(make, PLAN):
            seen.append(batch)
    assert len(seen) == 2


def test_no_batches() -> None:
    assert list(Batches(lambda planned: {}, ())) == []
