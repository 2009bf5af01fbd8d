"""Where the arrays of a run lie on its devices."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

import circflax as cf
from train.config import Config
from train.feed import check_sizes


@dataclass(frozen=True)
class Placement:
    """A mesh, and where arrays lie on it.

    Attributes:
        mesh: The devices.
        base: A sharding for each of the frozen parameters.
        shapes: Shapes of the small tree.
        small: A sharding for each of its arrays.
    """

    mesh: Mesh
    base: Any
    shapes: Any
    small: Any

    @property
    def batch(self) -> NamedSharding:
        """The rows of a batch over the devices."""
        return cf.sharding.shard_batch(self.mesh)

    @property
    def rows(self) -> NamedSharding | None:
        """The same for a model that several devices run; None for one."""
        return self.batch if self.mesh.size > 1 else None

    @property
    def replicated(self) -> NamedSharding:
        """The same on every device."""
        return cf.sharding.replicated(self.mesh)

    def like_small(self, tree: Any) -> Any:
        """A sharding for each array of a tree that holds the small tree or its moments."""
        return cf.sharding.shard_like(tree, self.shapes, self.small, self.mesh)

    def describe(self, base: Any) -> str:
        """Where the frozen parameters and the small tree lie, as two tables.

        Args:
            base: The frozen parameters, or their shapes.

        Returns:
            The mesh, and the tables.
        """
        sizes = " x ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items())
        frozen = cf.sharding.tabulate(base, self.base)
        trains = cf.sharding.tabulate(self.shapes, self.small)
        return f"mesh of {sizes}\n\nfrozen\n{frozen}\n\ntrains\n{trains}\n"


def make_mesh(config: Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges the devices of a run.

    Args:
        config: The settings.
        devices: The devices; None is all that the processes have together.

    Returns:
        The mesh.

    Raises:
        ShardingError: If its sizes do not fit the devices.
        ConfigError: If the devices cannot divide a batch.
    """
    sizes = config.mesh
    mesh = cf.sharding.make_mesh(sizes.data, sizes.fsdp, sizes.tensor, devices)
    check_sizes(config.optim, cf.sharding.shard_batch(mesh))
    return mesh


def make_placement(mesh: Mesh, plan: cf.Plan, base: Any) -> Placement:
    """Says where the arrays of a run lie.

    Args:
        mesh: The devices.
        plan: What is adapted and trained.
        base: The frozen parameters on the mesh, or their shapes with shardings.

    Returns:
        The placement.
    """
    shapes = jax.eval_shape(
        lambda key, base: cf.init_adapters(key, plan, base), jax.random.key(0), base
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, base)
    return Placement(mesh, shardings, shapes, cf.sharding.shard_adapters(plan, shardings))
