"""Batches on their way to the devices of all processes."""

import functools
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import NamedSharding

from train.config import ConfigError, OptimConfig
from train.tasks.batches import Batch


@dataclass(frozen=True)
class Feed:
    """Brings to the devices the rows of batches that they hold.

    Attributes:
        sharding: How rows are cut up over the devices of all processes.
        batch_size: Rows of a batch.
    """

    sharding: NamedSharding
    batch_size: int

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """The rows that this process's devices hold, in ascending order."""
        held = self.sharding.addressable_devices_indices_map((self.batch_size,))
        numbers = np.arange(self.batch_size)
        return np.unique(np.concatenate([numbers[index] for index in held.values()]))

    @property
    def share(self) -> float:
        """Which part of a batch these rows are."""
        return len(self.rows) / self.batch_size

    def place(self, own: Batch) -> dict[str, jax.Array]:
        """Puts a batch on the devices.

        Args:
            own: Arrays with the rows of this process.

        Returns:
            The arrays with all rows, of which each process holds its own.
        """
        return {
            name: jax.make_array_from_process_local_data(
                self.sharding, array, (self.batch_size, *array.shape[1:])
            )
            for name, array in own.items()
        }


def check_sizes(config: OptimConfig, sharding: NamedSharding) -> None:
    """Refuses batches that the devices cannot divide.

    Args:
        config: The sizes.
        sharding: How rows are cut up over the devices.

    Raises:
        ConfigError: If a part of a batch has not as many rows for each device.
    """
    devices = sharding.mesh.size // sharding.mesh.shape["tensor"]
    for name, size, parts in (
        ("batch_size", config.batch_size, config.accumulation_steps),
        ("eval_batch_size", config.eval_batch_size, 1),
    ):
        if size % (devices * parts):
            of = f" in {parts} parts (`optim.accumulation_steps`)" if parts > 1 else ""
            raise ConfigError(
                f"`optim.{name}` {size}{of} cannot be cut up over {devices} devices"
                f" (`mesh.data` x `mesh.fsdp`); a multiple of {devices * parts} can"
            )
