"""Adapters on the attention of a text-to-image model, trained to predict noise."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from circflax import (
    C3A,
    CDVFT,
    AdapterConfig,
    combine,
    init_adapters,
    make_plan,
    merge,
)
from circflax.linen import attach, find_layouts
from circflax.tree import Layout, Tree
from tests.linen.models import with_something

diffusers = pytest.importorskip("diffusers", "0.35")

METHODS = [CDVFT(), C3A()]
over_methods = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out_0")
# Down, in the middle, and twice on the way up: each attends to the image and to the text.
ATTENTIONS = 4
BATCH, CHANNELS, SIZE, WIDTH, TEXT, STEPS = 2, 4, 8, 32, 16, 1000


class Batch(NamedTuple):
    """Noised latents, and the noise that is to be predicted from them."""

    noised: jax.Array
    timesteps: jax.Array
    text: jax.Array
    noise: jax.Array


def noised(seed: int) -> Batch:
    """A batch as denoising diffusion makes them: a random time, and noise to suit."""
    keys = jax.random.split(jax.random.key(seed), 4)
    shape = (BATCH, CHANNELS, SIZE, SIZE)
    latents, noise = jax.random.normal(keys[0], shape), jax.random.normal(keys[1], shape)
    timesteps = jax.random.randint(keys[2], (BATCH,), 0, STEPS)
    signal = jnp.cumprod(1 - jnp.linspace(1e-4, 0.02, STEPS))[timesteps][:, None, None, None]
    text = jax.random.normal(keys[3], (BATCH, 5, TEXT))
    mixed = jnp.sqrt(signal) * latents + jnp.sqrt(1 - signal) * noise
    return Batch(mixed, timesteps, text, noise)


@functools.cache
def tiny():
    """A tiny U-Net with attention to a text, random parameters, and how it uses its kernels."""
    model = diffusers.FlaxUNet2DConditionModel(
        sample_size=SIZE,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(WIDTH,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=TEXT,
    )
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        around = 1.0 if path[-1].key == "scale" else 0.0
        fan_in = np.prod(leaf.shape[:-1])
        return jnp.asarray(around + rng.standard_normal(leaf.shape) / np.sqrt(fan_in), leaf.dtype)

    shapes = jax.eval_shape(model.init_weights, jax.random.key(0))
    params = jax.tree_util.tree_map_with_path(draw, shapes)
    layouts = find_layouts(lambda p: predict(model.apply, p, noised(0)), params)
    return model, params, layouts


def predict(apply, params: Tree, batch: Batch) -> jax.Array:
    return apply({"params": params}, batch.noised, batch.timesteps, batch.text).sample


def adapted(method):
    model, params, layouts = tiny()
    plan = make_plan(params, AdapterConfig(method=method, targets=PROJECTIONS), layouts)
    return model, params, plan, init_adapters(jax.random.key(1), plan, params)


def test_every_dense_layer_is_found_and_convolutions_are_not() -> None:
    _, params, layouts = tiny()
    kernels = {path: layout for path, layout in layouts.items() if path[-1] == "kernel"}
    assert len(kernels) == sum(leaf.ndim >= 2 for leaf in jax.tree.leaves(params))
    for path, layout in kernels.items():
        leaf = functools.reduce(lambda tree, name: tree[name], path, params)
        if leaf.ndim == 2:
            assert layout == Layout.parse("in,out"), path
        else:
            assert layout.startswith("its output is not its input times its kernel"), path


@over_methods
def test_every_attention_is_adapted_and_what_reads_alike_is_known(method) -> None:
    _, _, plan, _ = adapted(method)
    found = [(*target.path[-2:], target.in_features) for target in plan.targets]
    # To the image itself, then to the text, which has a width of its own.
    own = [("attn1", name, WIDTH) for name in PROJECTIONS]
    cross = [("attn2", name, TEXT if name in ("to_k", "to_v") else WIDTH) for name in PROJECTIONS]
    assert sorted(found) == sorted(ATTENTIONS * (own + cross))
    together = {tuple(sorted(t.path[-1] for t in group)) for group in plan.readers.values()}
    assert together == {("to_k", "to_q", "to_v"), ("to_k", "to_v")}


@over_methods
def test_fresh_adapters_change_no_bit(method) -> None:
    model, params, plan, adapters = adapted(method)
    base = predict(model.apply, params, noised(0))
    ours = predict(attach(model.apply, plan), combine(params, adapters), noised(0))
    np.testing.assert_array_equal(ours, base)


@over_methods
def test_adapted_is_merged(method) -> None:
    model, params, plan, adapters = adapted(method)
    adapters = with_something(adapters, 0.05)
    ours = predict(attach(model.apply, plan), combine(params, adapters), noised(0))
    merged = predict(model.apply, merge(params, adapters, plan), noised(0))
    scale = np.abs(merged).max()
    np.testing.assert_allclose(ours / scale, merged / scale, atol=1e-5)
    assert np.abs(ours - predict(model.apply, params, noised(0))).max() > 1e-3 * scale


@pytest.mark.parametrize(
    "method",
    [METHODS[0], *(pytest.param(method, marks=pytest.mark.slow) for method in METHODS[1:])],
    ids=lambda method: method.name,
)
def test_a_step_lowers_the_loss_and_changes_the_adapters_alone(method) -> None:
    model, params, plan, adapters = adapted(method)
    apply, optimizer = attach(model.apply, plan), optax.adam(1e-3)

    @jax.jit
    def step(params, adapters, state, batch):
        def loss(adapters):
            predicted = predict(apply, combine(params, adapters), batch)
            return jnp.mean((predicted - batch.noise) ** 2)

        value, gradient = jax.value_and_grad(loss)(adapters)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(adapters, updates), state, value

    trained, state, before = step(params, adapters, optimizer.init(adapters), noised(1))
    _, _, after = step(params, trained, state, noised(1))
    assert after < before
    # Every layer of the plan has moved, and no other leaf.
    changed = {target.kernel_path for target in plan.targets}
    merged = flatten_dict(merge(params, trained, plan))
    for path, leaf in flatten_dict(params).items():
        assert np.array_equal(merged[path], leaf) != (path in changed), path
