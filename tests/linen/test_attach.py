"""An adapted model computes what the model with merged weights computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from circflax import (
    BCA,
    BOFT,
    C3A,
    CDVFT,
    IA3,
    AdapterConfig,
    FourierFT,
    LaMDA,
    LoRA,
    VeRA,
    combine,
    make_plan,
    merge,
    switch_off,
)
from circflax.linen import attach
from circflax.tree import Plan
from tests.linen.models import (
    Block,
    Transformer,
    adapted,
    init,
    inputs,
    layouts,
    randomly,
)

METHODS = (
    CDVFT(),
    C3A(b=1),
    BCA(p=3),
    LoRA(r=2),
    VeRA(r=5),
    IA3(),
    BOFT(b=2, m=1),
    FourierFT(n=9),
    IA3(feedforward=True),
    LaMDA(r=2),
)
SCAN = ("scan", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("plain", "remat")))


def eagerly(run):
    return run


# Each method meets stacked layers, which its arrays follow, and one of the kinds that stack none;
# quick runs meet each kind and each method once.
PAIRS = [
    (kind, j, () if (kind == "scan") == (j % 3 == 2) else pytest.mark.slow)
    for j in range(len(METHODS))
    for kind in ("scan", ("plain", "remat")[j % 2])
]
WAYS = (
    ("jit-bfloat16", jax.jit, jnp.bfloat16),
    ("eager-float32", eagerly, jnp.float32),
    ("jit-float32", jax.jit, jnp.float32),
    ("eager-bfloat16", eagerly, jnp.bfloat16),
)
# Each method is run in each way, and so is each kind.
RUNS = [
    pytest.param(kind, METHODS[j], *way, id=f"{kind}-{METHODS[j].name}-{name}", marks=marks)
    for kind, j, marks in PAIRS
    for name, *way in (WAYS[:2] if (kind == "scan") == (j % 4 < 2) else WAYS[2:])
]


def assert_equal(tree, other) -> None:
    jax.tree.map(np.testing.assert_array_equal, tree, other)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        pytest.param(kind, METHODS[j], id=f"{kind}-{METHODS[j].name}", marks=marks)
        for kind, j, marks in PAIRS
    ],
)
def test_adapted_is_merged(kind: str, method) -> None:
    model, x = Transformer(kind), inputs()
    params, plan, adapters = adapted(model, method, x)
    assert len(plan.targets) == (5 if kind == "scan" else 9)
    ours = attach(model.apply, plan)({"params": combine(params, adapters)}, x)
    plain = model.apply({"params": merge(params, adapters, plan)}, x)
    np.testing.assert_allclose(ours, plain, atol=1e-5 * max(1.0, np.abs(plain).max()))
    assert np.abs(ours - model.apply({"params": params}, x)).max() > 1e-2


@pytest.mark.parametrize(("kind", "method", "wrap", "dtype"), RUNS)
def test_fresh_adapters_change_no_bit(kind: str, method, wrap, dtype) -> None:
    model, x = Transformer(kind, dtype), inputs(dtype)
    params, plan, adapters = adapted(model, method, x, fresh=True)
    base = wrap(model.apply)({"params": params}, x)
    ours = wrap(attach(model.apply, plan))({"params": combine(params, adapters)}, x)
    assert ours.dtype == dtype
    np.testing.assert_array_equal(ours, base)


def test_without_adapters_the_model_is_the_base() -> None:
    model, x = Transformer(), inputs()
    params, plan, adapters = adapted(model, CDVFT(), x)
    apply = attach(model.apply, plan)
    base = model.apply({"params": params}, x)
    assert_equal(apply({"params": params}, x), base)
    assert_equal(apply({"params": combine(params, switch_off(adapters))}, x), base)
    some = switch_off(adapters, ("layers_0/shared", "value"))
    np.testing.assert_allclose(
        apply({"params": combine(params, some)}, x),
        model.apply({"params": merge(params, some, plan)}, x),
        atol=1e-5,
    )


@pytest.mark.parametrize("kind", SCAN)
def test_gradients_are_those_through_the_merged_kernels(kind: str) -> None:
    model, x = Transformer(kind), inputs()
    params, plan, adapters = adapted(model, CDVFT(p=3), x)
    apply = attach(model.apply, plan)

    @jax.jit
    @jax.grad
    def ours(adapters):
        return jnp.sum(jnp.sin(apply({"params": combine(params, adapters)}, x)))

    @jax.jit
    @jax.grad
    def dense(adapters):
        # merge itself refuses what is not finite, which a traced value cannot say.
        merged = folded(params, adapters, plan)
        return jnp.sum(jnp.sin(model.apply({"params": merged}, x)))

    grads = ours(adapters)
    assert jax.tree.structure(grads) == jax.tree.structure(adapters)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * (1 + np.abs(b).max())),
        grads,
        dense(adapters),
    )
    assert all(np.any(grad) for grad in jax.tree.leaves(grads))


def folded(params, adapters, plan: Plan):
    """What `merge` computes, differentiable."""
    leaves = jax.tree.map(lambda leaf: leaf, params)
    for target in plan.targets:
        module, adapter = leaves, adapters
        for name in target.path:
            module, adapter = module[name], adapter[name]
        delta = target.method.delta
        for _ in target.layers:
            delta = jax.vmap(delta, in_axes=(0, None, None))
        delta = delta(adapter["adapter"], target.in_features, target.out_features)
        kernel = module[target.parameter]
        module[target.parameter] = kernel + target.layout.kernel(delta, target.shape)
    return leaves


def test_scanned_layers_are_the_loop_over_layers() -> None:
    model, x = Transformer("scan", depth=3), inputs()
    params, plan, adapters = adapted(model, BCA(p=3), x, targets=("query", "value", "shared"))
    scanned = attach(model.apply, plan)({"params": combine(params, adapters)}, x)

    block = Block()
    one = jax.tree.map(lambda leaf: leaf[0], params["layers"])
    config = AdapterConfig(method=BCA(p=3), targets=("query", "value", "shared"))
    apply = attach(block.apply, make_plan(one, config, layouts(block, one, x)))
    y, combined = x, combine(params, adapters)
    for i in range(3):
        y, _ = apply({"params": jax.tree.map(lambda leaf, i=i: leaf[i], combined["layers"])}, y)
    y = nn.Dense(3).apply({"params": params["head"]}, y)
    np.testing.assert_allclose(scanned, y, atol=1e-5)


def test_vmapped_modules_have_adapters_of_their_own() -> None:
    class Experts(nn.Module):
        @nn.compact
        def __call__(self, x):
            experts = nn.vmap(
                nn.Dense,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=None,
                out_axes=0,
                axis_size=3,
            )
            return experts(6, name="experts")(x)

    model, x = Experts(), inputs()
    params, plan, adapters = adapted(model, C3A(b=2), x, targets=("experts",))
    assert adapters["experts"]["adapter"]["w"].shape == (3, 3, 4, 2)
    ours = attach(model.apply, plan)({"params": combine(params, adapters)}, x)
    for i, y in enumerate(ours):
        (target,) = plan.targets
        delta = target.method.delta({"w": adapters["experts"]["adapter"]["w"][i]}, 8, 6)
        kernel = params["experts"]["kernel"][i] + delta
        np.testing.assert_allclose(y, x @ kernel + params["experts"]["bias"][i], atol=1e-5)


@pytest.mark.parametrize("kind", SCAN)
def test_dropout_draws_as_in_the_base(kind: str) -> None:
    model, x = Transformer(kind, dropout=0.5), inputs()
    params, plan, adapters = adapted(model, CDVFT(), x, fresh=True)
    apply = jax.jit(attach(model.apply, plan))

    def run(params, seed):
        return apply({"params": params}, x, rngs={"dropout": jax.random.key(seed)})

    np.testing.assert_array_equal(run(combine(params, adapters), 3), run(params, 3))
    assert not np.array_equal(run(params, 3), run(params, 4))


def test_only_calls_of_the_layer_itself_are_adapted() -> None:
    class Peeking(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(8, name="layer")
            y = layer(x)
            # By hand, with the layer's weights: not a call of the layer.
            return y, nn.Dense(8, parent=None).apply({"params": layer.variables["params"]}, x)

    model, x = Peeking(), inputs()
    params = init(model, x)
    config = AdapterConfig(method=C3A(), targets=("layer",))
    plan = make_plan(params, config)
    adapters = {"layer": {"adapter": {"w": randomly(jnp.zeros((1, 1, 8)))}}}
    ours, base = attach(model.apply, plan)({"params": combine(params, adapters)}, x)
    assert_equal(base, model.apply({"params": params}, x)[1])
    np.testing.assert_allclose(
        ours, model.apply({"params": merge(params, adapters, plan)}, x)[0], atol=1e-5
    )
