"""Running a linen model with its rows shared among devices, whatever its parameters are."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from circflax.linen._calls import intercept_calls
from circflax.linen._inputs import first_input

P = ParamSpec("P")
R = TypeVar("R")


def shard_rows(run: Callable[P, R], sharding: NamedSharding) -> Callable[P, R]:
    """Makes a function that runs a linen model keep each row of a batch where it lies.

    Where parameters are cut up over the same devices as the rows of a batch (`fsdp`), XLA may
    choose to make activations whole instead of parameters. With this every layer's output, and its
    gradient, has its rows where the batch has them; how their features lie stays XLA's choice.
    Values and gradients stay the same.

    Wrap first, transform afterwards, in any order with `circflax.linen.attach`,
    `circflax.linen.keep_apart` and `circflax.linen.rematerialize`.

    Args:
        run: anything that calls the model: `module.apply`, a Hugging Face model, or a function of
            your own.
        sharding: where the rows lie, as `circflax.sharding.shard_batch` gives it.

    Returns:
        A function of the same arguments.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> import circflax as cf
        >>> model, x = nn.Dense(4), jnp.ones((2, 8))
        >>> rows = cf.sharding.shard_batch(cf.sharding.make_mesh(devices=jax.devices()[:1]))
        >>> apply = jax.jit(cf.linen.shard_rows(model.apply, rows))
        >>> apply(model.init(jax.random.key(0), x), x).shape
        (2, 4)
    """

    @functools.wraps(run)
    def sharded(*args: P.args, **kwargs: P.kwargs) -> R:
        with intercept_calls(_KeepRows(sharding)):
            return run(*args, **kwargs)

    return sharded


class _KeepRows:
    """The interceptor of one run of a model."""

    def __init__(self, sharding: NamedSharding) -> None:
        self._sharding = sharding
        self._rows: int | None = None

    def __call__(
        self,
        module: nn.Module,
        layer: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if self._rows is None:
            # The first call is the whole model's, whose input has all rows.
            self._rows = first_input(args, kwargs).shape[0]
        return jax.tree.map(self._keep, layer(*args, **kwargs))

    def _keep(self, leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.ndim < 2 or leaf.shape[0] != self._rows:
            return leaf
        free = (PartitionSpec.UNCONSTRAINED,) * (leaf.ndim - 1)
        spec = PartitionSpec(*self._sharding.spec, *free)
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(self._sharding.mesh, spec))
