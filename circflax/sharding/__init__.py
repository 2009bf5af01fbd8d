"""Where every array of a training step lies on a mesh of devices."""

from circflax.sharding._mesh import AXES, ShardingError, make_mesh, replicated, shard_batch
from circflax.sharding._params import shard_params
from circflax.sharding._rules import RULES, Rule
from circflax.sharding._small import shard_adapters, shard_like
from circflax.sharding._table import tabulate

__all__ = [
    "AXES",
    "RULES",
    "Rule",
    "ShardingError",
    "make_mesh",
    "replicated",
    "shard_adapters",
    "shard_batch",
    "shard_like",
    "shard_params",
    "tabulate",
]
