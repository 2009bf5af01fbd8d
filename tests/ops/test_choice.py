"""The choice of a strategy: what it depends on, and what overrides it."""

import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from circflax import ops
from circflax.ops import Form, Product

SHAPES = [
    (4096, 1, 1, 768),
    (512, 6, 6, 128),
    (16384, 24, 24, 32),
    (1024, 43, 16, 256),
    (3, 2, 1, 7),
]


def product(tokens, out_blocks, in_blocks, block, dtype="bfloat16", platform="cpu", **rest):
    return Product(tokens, out_blocks, in_blocks, block, jnp.dtype(dtype), platform, **rest)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("platform", [*ops.PLATFORMS, "rocm"])
def test_the_cheapest_is_chosen(shape, platform: str) -> None:
    described = product(*shape, platform=platform)
    costs = ops.estimate_costs(described)
    assert all(cost > 0 for cost in costs.values())
    assert costs[ops.choose_form(described)] == min(costs.values()) < math.inf
    for form in costs:
        assert ops.choose_form(described, form.strategy).strategy == form.strategy


def test_wide_layers_choose_by_platform() -> None:
    shape = (4096, 1, 1, 4096)
    assert ops.choose_form(product(*shape, dtype="float32", platform="cpu")) == Form("fft")
    assert ops.choose_form(product(*shape, platform="tpu")) == Form("fused", 32)
    assert ops.choose_form(product(*shape, platform="cuda")) == Form("dft", 16)


def test_narrow_layers_are_multiplied_densely_on_accelerators() -> None:
    for platform in ("cuda", "rocm"):
        assert ops.choose_form(product(4096, 1, 1, 768, platform=platform)) == Form("dense")


@pytest.mark.parametrize("platform", ops.PLATFORMS)
def test_what_would_gather_divided_vectors_is_not_chosen(platform: str) -> None:
    shape = (4096, 1, 1, 4096)
    divided = product(*shape, platform=platform, partitioned=True)
    assert ops.choose_form(divided).strategy == "dense"
    assert ops.choose_form(product(*shape, platform="cpu")).strategy != "fused"


def test_vectors_divided_among_devices_are_not_gathered() -> None:
    code = """
import re, jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from circflax import ops
mesh = jax.make_mesh((2,), ("data",))
kernel, x = jnp.arange(16.0).reshape(1, 2, 8), jnp.arange(128.0).reshape(8, 16)
divided = jax.device_put(x, NamedSharding(mesh, P("data")))
whole = jax.device_put(kernel, NamedSharding(mesh, P()))
loss = jax.jit(jax.value_and_grad(lambda k, x: jnp.sum(ops.block_circulant_product(k, x) ** 2)))
assert jnp.allclose(loss(whole, divided)[1], loss(kernel, x)[1], rtol=1e-5)
program = loss.lower(whole, divided).compile().as_text()
assert "all-gather" not in program and "all-reduce" in program
shard = jax.shard_map(ops.block_circulant_product, mesh=mesh, in_specs=(P(), P("data")),
                      out_specs=P("data"))
assert jnp.allclose(jax.jit(shard)(whole, divided), ops.block_circulant_product(kernel, x))
"""
    flags = "--xla_force_host_platform_device_count=2"
    subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        check=True,
    )


def test_the_choice_does_not_change_results() -> None:
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.standard_normal((3, 2, 32)), jnp.float32)
    x = jnp.asarray(rng.standard_normal((64, 64)), jnp.float32)
    y = ops.block_circulant_product(kernel, x)
    for strategy in ("fft", "dft", "dense"):
        other = ops.block_circulant_product(kernel, x, strategy=strategy)
        np.testing.assert_allclose(other, y, atol=1e-4)


def test_the_default_strategy_reaches_products_that_ask_for_none() -> None:
    def program(**how) -> str:
        c, x = jnp.ones(8), jnp.ones((2, 8))
        return str(jax.make_jaxpr(lambda c, x: ops.circulant_product(c, x, **how))(c, x))

    with ops.default_strategy("dense"):
        assert "strategy=dense" in program()
        with ops.default_strategy(None):
            assert "strategy=dense" in program()
        assert "strategy=dft" in program(strategy="dft")
    assert "strategy=None" in program()
    with pytest.raises(ValueError, match="'best'"), ops.default_strategy("best"):
        pass


def test_programs_for_other_platforms_lower_here() -> None:
    function = jax.jit(jax.grad(lambda c, x: ops.circulant_product(c, x).sum()))
    c, x = jnp.ones(256), jnp.ones((16, 256), jnp.bfloat16)
    exported = jax.export.export(function, platforms=["cuda", "tpu", "cpu"])(c, x)
    assert exported.platforms == ("cuda", "tpu", "cpu")
