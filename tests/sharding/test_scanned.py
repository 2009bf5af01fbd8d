"""Adapters of layers that `nn.scan` stacks, the stack cut up or not."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import circflax as cf
from circflax import sharding
from tests.linen.models import Transformer, adapted

TARGETS = ("query", "value", "out", "shared")
RULES = {
    "whole": sharding.RULES,
    "layers": (
        (r"layers/.*/(query|value|out)/kernel", ("fsdp", None, None, None)),
        (r"layers/.*/shared/kernel", ("fsdp", None, None)),
    ),
    "layers and heads": (
        (r"layers/.*/(query|value)/kernel", ("fsdp", None, "tensor", None)),
        (r"layers/.*/out/kernel", ("fsdp", "tensor", None, None)),
    ),
}
METHODS = [cf.CDVFT(p=4), cf.LoRA(r=2)]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_outputs_and_gradients_are_those_of_one_device(
    rules: tuple[sharding.Rule, ...], method: cf.Method
) -> None:
    model = Transformer("scan", depth=4)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 5, 8)), jnp.float32)
    params, plan, adapters = adapted(model, method, x, targets=TARGETS)
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    base = sharding.shard_params(params, mesh, rules)
    small = sharding.shard_adapters(plan, base)
    for target in plan.targets:
        kernel = _at(base, target.kernel_path)
        for at in _at(small, (*target.path, "adapter")).values():
            assert tuple(at.spec)[:1] == tuple(kernel.spec)[:1]

    def loss(adapters: Any, params: Any, x: jax.Array, rows: Any = None) -> jax.Array:
        run = cf.linen.attach(model.apply, plan, rows=rows)
        if rows is not None:
            run = cf.linen.shard_rows(run, rows)
        return jnp.sum(run({"params": cf.combine(params, adapters)}, x) ** 2)

    rows = sharding.shard_batch(mesh)
    step = jax.jit(
        jax.value_and_grad(lambda *arguments: loss(*arguments, rows)),
        in_shardings=(small, base, rows),
        out_shardings=(sharding.replicated(mesh), small),
    )
    found = step(adapters, params, x)
    expected = jax.jit(jax.value_and_grad(loss))(adapters, params, x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected
    )


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree[name]
    return tree
