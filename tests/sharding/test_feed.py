"""Each process makes the rows that its devices hold, and all together make every batch."""

import jax
import numpy as np
import pytest

import circflax as cf
from train.config import ConfigError, OptimConfig
from train.feed import Feed, check_sizes
from train.tasks.batches import Batches, filled, plan, weights


def batches(count: int, batch_size: int) -> Batches:
    def make(planned):
        return {"rows": filled(planned, batch_size), "weights": weights(planned, batch_size)}

    planned = plan(np.zeros(count, int), batch_size, (0,), np.random.default_rng(0))
    return Batches(make, planned)


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_shares_together_are_the_batches(parts) -> None:
    whole = batches(19, 8)
    shares = [whole.share(rows) for rows in np.split(np.arange(8), parts)]
    for batch, *own in zip(whole, *shares, strict=True):
        together = {name: np.concatenate([each[name] for each in own]) for name in batch}
        for name, array in batch.items():
            np.testing.assert_array_equal(together[name], array)


@pytest.mark.parametrize(
    ("sizes", "rows"), [((8, 1, 1), 1), ((2, 2, 2), 2), ((1, 4, 2), 2), ((1, 1, 8), 8)]
)
def test_rows_come_to_the_devices_that_compute_them(sizes, rows) -> None:
    feed = Feed(cf.sharding.shard_batch(cf.sharding.make_mesh(*sizes)), 8)
    (batch,) = batches(8, 8)
    own = {name: array[feed.rows] for name, array in batch.items()}
    placed = feed.place(own)
    assert feed.share == 1  # of one process
    for name, array in batch.items():
        np.testing.assert_array_equal(placed[name], array)
        assert {shard.data.shape for shard in placed[name].addressable_shards} == {(rows,)}


def test_a_process_makes_what_its_devices_hold(monkeypatch) -> None:
    mesh = cf.sharding.make_mesh(2, 2, 2)
    held = cf.sharding.shard_batch(mesh)
    whole = held.addressable_devices_indices_map((16,))
    # Of two processes, each with the devices that share rows: the second half of the mesh.
    second = {device: whole[device] for device in mesh.devices[1].flat}
    monkeypatch.setattr(
        jax.sharding.NamedSharding, "addressable_devices_indices_map", lambda self, shape: second
    )
    feed = Feed(held, 16)
    np.testing.assert_array_equal(feed.rows, np.arange(8, 16))
    assert feed.share == 0.5


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"batch_size": 12}, r"`optim.batch_size` 12 cannot be .* 8 devices .* multiple of 8 can"),
        (
            {"batch_size": 24, "accumulation_steps": 2},
            r"`optim.batch_size` 24 in 2 parts .* a multiple of 16 can",
        ),
        ({"eval_batch_size": 4}, r"`optim.eval_batch_size` 4 .* a multiple of 8 can"),
    ],
)
def test_batches_that_the_devices_cannot_divide_are_refused(sizes, message) -> None:
    sharding = cf.sharding.shard_batch(cf.sharding.make_mesh())
    check_sizes(OptimConfig(), sharding)
    with pytest.raises(ConfigError, match=message):
        check_sizes(OptimConfig(**sizes), sharding)
    one = cf.sharding.make_mesh(devices=jax.devices()[:1])
    check_sizes(OptimConfig(**sizes), cf.sharding.shard_batch(one))
