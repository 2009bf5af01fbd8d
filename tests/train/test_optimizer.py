"""What an update moves, and what it leaves alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import circflax as cf
from train.config import OptimConfig
from train.optimizer import make_optimizer

STEPS = 20


def train(method: cf.Method, **options):
    """The small tree before and after each of some updates, and the optimizer's state."""
    params = {"query": {"kernel": jnp.eye(8) + 0.1, "bias": jnp.ones(8)}}
    config = cf.AdapterConfig(method=method, targets=("query",), train=("bias",))
    plan = cf.make_plan(params, config)
    small = cf.init_adapters(jax.random.key(0), plan, params)
    optimizer = make_optimizer(OptimConfig(schedule="constant", **options), 0.2, plan, STEPS)
    state = optimizer.init(small)
    trees = [small]
    for _ in range(STEPS):
        gradients = jax.tree.map(jnp.ones_like, small)
        updates, state = optimizer.update(gradients, state, small)
        small = optax.apply_updates(small, updates)
        trees.append(small)
    return [jax.tree.map(np.asarray, tree["query"]) for tree in trees], state


def test_frozen_arrays_never_move_and_have_no_moments() -> None:
    trees, state = train(cf.LaMDA(r=4), weight_decay=0.1)
    assert np.array_equal(trees[0]["adapter"]["a"], trees[-1]["adapter"]["a"])
    moved = trees[-1]["adapter"]["s"] - trees[0]["adapter"]["s"]
    assert np.all(moved != 0) and np.any(trees[-1]["bias"] != trees[0]["bias"])
    shapes = [leaf.shape for leaf in jax.tree.leaves(state)]
    # Two moments of s and b; a has the shape (8, 4), which none of the two has.
    assert shapes.count((4, 4)) == shapes.count((4, 8)) == 2 and (8, 4) not in shapes


@pytest.mark.parametrize("freeze_until", [0.0, 0.3, 1.0])
def test_rows_freeze_one_after_the_other(freeze_until: float) -> None:
    trees, _ = train(cf.LaMDA(r=4, freeze_until=freeze_until))
    rows = np.stack([tree["adapter"]["b"] for tree in trees])
    moving = np.any(np.diff(rows, axis=0) != 0, axis=-1)
    for row in range(4):
        last = freeze_until * (row + 1) / 4 * STEPS
        assert np.array_equal(moving[:, row], np.arange(STEPS) < last)


@pytest.mark.parametrize("p", [1, 2, 8])
def test_clipping_counts_a_circulants_gradient_as_the_kernels_own(p: int) -> None:
    method, g = cf.BCA(p=p), np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    params = {"query": {"kernel": jnp.zeros((8, 8))}}
    plan = cf.make_plan(params, cf.AdapterConfig(method=method, targets=("query",)))
    adapters = cf.init_adapters(jax.random.key(0), plan, params)
    gradients = jax.grad(
        lambda adapters: jnp.sum(g * method.delta(adapters["query"]["adapter"], 8, 8))
    )(adapters)
    # Without a decay the first moment is the clipped gradient.
    optimizer = make_optimizer(OptimConfig(b1=0.0, clip_norm=1e-3), 1.0, plan, STEPS)
    _, state = optimizer.update(gradients, optimizer.init(adapters), adapters)
    moment = next(leaf for leaf in jax.tree.leaves(state) if leaf.shape == (8 // p, 8 // p, p))
    # Each number stands in p entries, whose gradients it sums.
    assert np.linalg.norm(method.delta({"c": moment / p}, 8, 8)) == pytest.approx(1e-3, rel=1e-4)
