"""Where the arrays of a run lie on its devices."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

import circflax as cf
from train.config import MeshConfig


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
    def replicated(self) -> NamedSharding:
        """The same on every device."""
        return cf.sharding.replicated(self.mesh)

    def like_small(self, tree: Any) -> Any:
        """A sharding for each array of a tree that holds the small tree or its moments."""
        return cf.sharding.shard_like(tree, self.shapes, self.small, self.mesh)


def make_placement(
    config: MeshConfig, plan: cf.Plan, base: Any, devices: Sequence[jax.Device] | None = None
) -> Placement:
    """Says where the arrays of a run lie.

    Args:
        config: The sizes of the mesh.
        plan: What is adapted and trained.
        base: The frozen parameters, or their shapes.
        devices: The devices; None is all that there are.

    Returns:
        The placement.

    Raises:
        ShardingError: If the mesh does not fit the devices.
    """
    mesh = cf.sharding.make_mesh(config.data, config.fsdp, config.tensor, devices)
    shapes = jax.eval_shape(
        lambda key, base: cf.init_adapters(key, plan, base), jax.random.key(0), base
    )
    base_shardings = cf.sharding.shard_params(base, mesh)
    return Placement(mesh, base_shardings, shapes, cf.sharding.shard_adapters(plan, base_shardings))
