"""Adapters that read one input, as query, key and value, share its transform."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import circflax as cf


class Attention(nn.Module):
    """Three projections of one input and one of another, of two widths."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        query, key = nn.Dense(12, name="query")(x), nn.Dense(6, name="key")(x)
        value = nn.Dense(12, name="value")(x)
        return nn.Dense(12, name="output")(value * jnp.tile(key, 2) + query)


class Layers(nn.Module):
    """Two such layers, scanned."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scanned = nn.scan(
            lambda layer, x, _: (layer(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
        )
        return scanned(Attention(name="layer"), x, None)[0]


ALL = ("query", "key", "value", "output")


def setup(model: nn.Module, method: cf.Method, targets: tuple[str, ...] = ALL):
    x = jax.random.normal(jax.random.key(0), (7, 12))
    base = model.init(jax.random.key(1), x)["params"]
    layouts = cf.linen.find_layouts(lambda params: model.apply({"params": params}, x), base)
    plan = cf.make_plan(base, cf.AdapterConfig(method=method, targets=targets), layouts)
    adapters = cf.init_adapters(jax.random.key(2), plan, base)
    leaves, tree = jax.tree.flatten(adapters)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    leaves = [jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return x, base, plan, jax.tree.unflatten(tree, leaves)


def test_layers_that_read_one_input_are_found() -> None:
    _, _, plan, _ = setup(Attention(), cf.C3A(b=6))
    sources = {target.name: target.layout.source for target in plan.targets}
    assert sources == {"query": "query", "key": "query", "value": "query", "output": None}
    assert [target.name for target in plan.readers["query"]] == ["key", "query", "value"]


@pytest.mark.parametrize("model", [Attention(), Layers()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("method", [cf.C3A(b=3), cf.BCA(p=4), cf.CDVFT(p=4), cf.LoRA(r=2)], ids=str)
def test_shared_is_merged(model: nn.Module, method: cf.Method) -> None:
    x, base, plan, adapters = setup(model, method)
    apply = jax.jit(cf.linen.attach(model.apply, plan))

    def adapted(x):
        return apply({"params": cf.combine(base, adapters)}, x)

    merged = cf.merge(base, adapters, plan)
    y, vjp = jax.vjp(adapted, x)
    expected, expected_vjp = jax.vjp(lambda x: model.apply({"params": merged}, x), x)
    np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    (dx,), (expected_dx,) = vjp(y), expected_vjp(y)
    np.testing.assert_allclose(dx, expected_dx, atol=1e-3 * np.abs(expected_dx).max())


def test_one_transform_of_the_input_and_one_of_its_gradient() -> None:
    x, base, plan, adapters = setup(Attention(), cf.C3A(b=6), ("query", "key", "value"))
    apply = cf.linen.attach(Attention().apply, plan, strategy="fft")

    def pullback(adapters, x, g):
        return jax.vjp(lambda a, x: apply({"params": cf.combine(base, a)}, x), adapters, x)[1](g)

    program = jax.jit(pullback).lower(adapters, x, x).compile().as_text()
    # Seven tokens: two blocks of the input, and five of all outputs together.
    for shape in (r"c64\[7,5,4\]", r"f32\[7,2,6\]", r"f32\[7,5,6\]"):
        assert len(re.findall(rf"= {shape}\S* fft\(", program)) == 1
    # Forward, and where XLA heeds the barrier between the passes once more backward.
    assert len(re.findall(r"= c64\[7,2,4\]\S* fft\(", program)) in (1, 2)
