"""Small linen models and random trees for them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from circflax import AdapterConfig, Method, Plan, init_adapters, make_plan
from circflax.linen import find_layouts
from circflax.tree import Layout, Tree

WIDTH, HEADS, LENGTH = 8, 2, 5


class Attention(nn.Module):
    """Projections of each kind: several heads out, a kernel stored head first, several heads in."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        heads = (HEADS, WIDTH // HEADS)
        query = nn.DenseGeneral(heads, dtype=self.dtype, name="query")(x)
        key = nn.DenseGeneral(heads, dtype=self.dtype, name="key")(x)
        shape = (HEADS, WIDTH, WIDTH // HEADS)
        value = nn.Einsum(shape, "...td,ndh->...tnh", dtype=self.dtype, name="value")(inputs=x)
        weights = nn.softmax(jnp.einsum("...tnh,...snh->...nts", query, key))
        mixed = jnp.einsum("...nts,...snh->...tnh", weights, value)
        return nn.DenseGeneral(WIDTH, axis=(-2, -1), dtype=self.dtype, name="out")(mixed)


class Block(nn.Module):
    """A layer of a transformer whose feed-forward module is called twice."""

    dtype: Any = None
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x):
        # Written to be the body of `nn.scan`: it carries x and gives nothing else.
        x = x + Attention(self.dtype, name="attention")(nn.LayerNorm(dtype=self.dtype)(x))
        shared = nn.Dense(WIDTH, dtype=self.dtype, name="shared")
        x = x + shared(nn.gelu(shared(nn.LayerNorm(dtype=self.dtype)(x))))
        if self.dropout:
            x = nn.Dropout(self.dropout, deterministic=False)(x)
        return x, None


class Transformer(nn.Module):
    """Two layers and a head, the layers plain, rematerialised or scanned."""

    kind: str = "plain"
    dtype: Any = None
    dropout: float = 0.0
    depth: int = 2

    @nn.compact
    def __call__(self, x):
        block = {"plain": Block, "scan": Block, "remat": nn.remat(Block)}[self.kind]
        if self.kind == "scan":
            block = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                length=self.depth,
            )
            x, _ = block(self.dtype, self.dropout, name="layers")(x)
        else:
            for i in range(self.depth):
                x, _ = block(self.dtype, self.dropout, name=f"layers_{i}")(x)
        return nn.Dense(3, dtype=self.dtype, name="head")(x)


KINDS = ("plain", "remat", "scan")
ADAPTED = ("query", "value", "out", "shared", "head")


def inputs(dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(0).standard_normal((2, LENGTH, WIDTH)), dtype)


def randomly(shapes: Tree, scale: float = 0.3, seed: int = 1) -> Tree:
    """A tree of these shapes and dtypes with normal entries."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        return jnp.asarray(scale * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree.map(draw, shapes)


def init(model: nn.Module, *arguments, **options) -> Tree:
    """The model's parameters, drawn without running the model."""
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    shapes = jax.eval_shape(lambda: model.init(rngs, *arguments, **options))
    return randomly(shapes["params"])


def layouts(model: nn.Module, params: Tree, *arguments, **options) -> dict[Any, Layout | str]:
    rngs = {"dropout": jax.random.key(1)}
    return find_layouts(
        lambda p: model.apply({"params": p}, *arguments, rngs=rngs, **options), params
    )


def adapted(
    model: nn.Module, method: Method, *arguments, targets=ADAPTED, fresh: bool = False, **options
) -> tuple[Tree, Plan, Tree]:
    """Parameters, plan and small tree of a model, the adapters with something in them."""
    params = init(model, *arguments, **options)
    found = layouts(model, params, *arguments, **options)
    plan = make_plan(params, AdapterConfig(method=method, targets=targets), found)
    adapters = init_adapters(jax.random.key(0), plan, params)
    return params, plan, adapters if fresh else with_something(adapters)


def with_something(adapters: Tree, scale: float = 0.2) -> Tree:
    noise = randomly(adapters, scale, seed=2)
    return jax.tree.map(jnp.add, adapters, noise)
