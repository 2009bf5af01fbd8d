"""Training on eight devices is training on one."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import circflax as cf
from tests.architectures import ARCHITECTURES
from train.config import MeshConfig, OptimConfig
from train.optimizer import make_optimizer
from train.placement import Placement, make_placement
from train.steps import TrainState, make_forward, make_train_step

MESHES = {
    "data": MeshConfig(),
    "fsdp": MeshConfig(fsdp=8),
    "tensor": MeshConfig(tensor=8),
    "mixed": MeshConfig(data=2, fsdp=2, tensor=2),
}
METHODS = {
    "cdvft": cf.CDVFT(p=4),
    "c3a": cf.C3A(b=4),
    "bca": cf.BCA(p=4),
    "lora": cf.LoRA(r=2),
}
STEPS, ROWS, LENGTH = 20, 16, 8
LLAMA = next(each for each in ARCHITECTURES if each.id == "llama")


@cache
def _model() -> tuple[Any, Any]:
    outline = cf.interop.outline_model(LLAMA.config(), LLAMA.head)
    return outline.model, outline.init(0)


def _batch(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    ids = rng.integers(5, 67, (ROWS, LENGTH), dtype=np.int32)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def _losses(logits: jax.Array, batch: Any) -> tuple[jax.Array, jax.Array]:
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1], batch["input_ids"][:, 1:]
    )
    return losses.sum(), jnp.float32(losses.size)


def _plan(method: cf.Method) -> cf.Plan:
    model, base = _model()
    targets = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")
    config = cf.AdapterConfig(method=method, targets=targets, train=("norm",))
    return cf.make_plan(base, config, cf.interop.Outline(model, base).layouts())


def _step(plan: cf.Plan, placement: Placement, parts: int = 1) -> tuple[Any, Any, Any]:
    model, base = _model()
    optimizer = make_optimizer(OptimConfig(), 0.02, plan, STEPS)
    forward = make_forward(model, plan)
    step = make_train_step(forward, _losses, optimizer, parts, placement)
    small = cf.init_adapters(jax.random.key(0), plan, base)
    state = TrainState(small, optimizer.init(small), jnp.zeros((), jnp.int32))
    return step, state, base


def _curve(plan: cf.Plan, placement: Placement, parts: int = 1) -> np.ndarray:
    step, state, base = _step(plan, placement, parts)
    # On the mesh from the first step on: the step is not compiled for two kinds of arguments.
    state = jax.device_put(state, placement.like_small(state))
    base, losses = jax.device_put(base, placement.base), []
    for number in range(STEPS):
        state, loss = step(state, base, _batch(number % 2), jax.random.key(0))
        losses.append(float(loss))
    return np.array(losses)


@cache
def _reference(method: str) -> np.ndarray:
    plan = _plan(METHODS[method])
    placement = make_placement(MeshConfig(), plan, _model()[1], jax.devices()[:1])
    losses = _curve(plan, placement)
    assert losses[-1] < losses[0] - 0.01
    return losses


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mesh", MESHES)
def test_the_loss_curve_is_that_of_one_device(mesh: str, method: str) -> None:
    plan = _plan(METHODS[method])
    placement = make_placement(MESHES[mesh], plan, _model()[1])
    np.testing.assert_allclose(_curve(plan, placement), _reference(method), rtol=1e-5)
