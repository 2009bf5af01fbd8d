"""Training on eight devices is training on one, and adapters add no communication to it."""

import math
import re
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export

import circflax as cf
from tests.architectures import ARCHITECTURES
from tests.linen.models import with_something
from train.config import MeshConfig, OptimConfig
from train.optimizer import make_optimizer
from train.placement import Placement, make_placement
from train.steps import TrainState, make_forward, make_generate, make_train_step

ONE = "one"
MESHES = {
    "data": MeshConfig(),
    "fsdp": MeshConfig(fsdp=8),
    "tensor": MeshConfig(tensor=8),
    "mixed": MeshConfig(data=2, fsdp=2, tensor=2),
}
METHODS = {"cdvft": cf.CDVFT(p=4), "c3a": cf.C3A(b=4), "bca": cf.BCA(p=4), "lora": cf.LoRA(r=2)}
# No parameter has an axis of so many rows.
STEPS, ROWS, LENGTH = 20, 80, 8
LLAMA = next(each for each in ARCHITECTURES if each.id == "llama")


@cache
def _model() -> tuple[cf.interop.Outline, Any]:
    outline = cf.interop.outline_model(LLAMA.config(), LLAMA.head)
    return outline, outline.init(0)


def _batch(seed: int) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(seed).integers(5, 67, (ROWS, LENGTH), dtype=np.int32)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def _losses(logits: jax.Array, batch: Any) -> tuple[jax.Array, jax.Array]:
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1], batch["input_ids"][:, 1:]
    )
    return losses.sum(), jnp.float32(losses.size)


def _step(
    method: str, mesh: str, parts: int = 1
) -> tuple[Any, tuple[Any, ...], Placement, cf.Plan]:
    """The jitted step, its first arguments, on the mesh, their placement, and the plan."""
    outline, base = _model()
    # Layers that read one input, and one whose inputs are cut up.
    targets = ("q_proj", "v_proj", "down_proj")
    config = cf.AdapterConfig(method=METHODS[method], targets=targets, train=("norm",))
    plan = cf.make_plan(base, config, outline.layouts())
    devices = jax.devices()[:1] if mesh == ONE else None
    sizes = MESHES.get(mesh, MeshConfig())
    arranged = cf.sharding.make_mesh(sizes.data, sizes.fsdp, sizes.tensor, devices)
    base = jax.device_put(base, cf.sharding.shard_params(base, arranged))
    placement = make_placement(arranged, plan, base)
    optimizer = make_optimizer(OptimConfig(), 0.02, plan, STEPS)
    forward = make_forward(outline.model, plan, placement=placement)
    step = make_train_step(forward, _losses, optimizer, parts, placement)
    small = cf.init_adapters(jax.random.key(0), plan, base)
    state = TrainState(small, optimizer.init(small), jnp.zeros((), jnp.int32))
    state = jax.device_put(state, placement.like_small(state))
    key = jax.device_put(jax.random.key(0), placement.replicated)
    batch = jax.device_put(_batch(0), placement.batch)
    return step, (state, base, batch, key), placement, plan


@cache
def _trained(method: str, mesh: str, parts: int = 1) -> tuple[np.ndarray, str]:
    """The losses of all steps, and the compiled program of one."""
    step, (state, base, batch, key), placement, _ = _step(method, mesh, parts)
    compiled = step.lower(state, base, batch, key).compile()
    losses = []
    for number in range(STEPS):
        batch = jax.device_put(_batch(number % 2), placement.batch)
        state, loss = compiled(state, base, batch, key)
        losses.append(float(loss))
    return np.array(losses), compiled.as_text()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mesh", MESHES)
def test_the_loss_curve_is_that_of_one_device(mesh: str, method: str) -> None:
    one, _ = _trained(method, ONE)
    assert one[-2] < one[0] - 0.001  # on the same batch
    np.testing.assert_allclose(_trained(method, mesh)[0], one, rtol=1e-5)


@pytest.mark.parametrize("mesh", ["data", "fsdp"])
def test_parts_of_a_batch_have_rows_of_every_device(mesh: str) -> None:
    losses, program = _trained("c3a", mesh, 2)
    np.testing.assert_allclose(losses, _trained("c3a", ONE)[0], rtol=1e-5)
    if mesh == "data":
        assert _collectives(program) == _collectives(_trained("c3a", mesh)[1])


@pytest.mark.parametrize("method", METHODS)
def test_with_copies_of_the_model_gradients_alone_are_exchanged(method: str) -> None:
    collectives = _collectives(_trained(method, "data")[1])
    _, (state, *_), *_ = _step(method, "data")
    numbers = sum(leaf.size for leaf in jax.tree.leaves(state.small))
    assert collectives == {"all-reduce": numbers + 1}  # and the loss


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mesh", ["fsdp", "mixed"])
def test_parameters_are_made_whole_and_never_rows(mesh: str, method: str) -> None:
    gathered = _shapes(_trained(method, mesh)[1], "all-gather")
    assert any(set(shape) == {32, 48 // MESHES[mesh].tensor} for shape in gathered)
    assert not [shape for shape in gathered if {ROWS, ROWS * LENGTH} & set(shape)]


@pytest.mark.parametrize("mesh", ["data", "mixed"])
def test_answers_are_those_of_one_device(mesh: str) -> None:
    answers = []
    for where in (ONE, mesh):
        _, (state, base, batch, key), placement, plan = _step("cdvft", where)
        settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        generate = make_generate(_model()[0].model, plan, settings, placement)
        small = jax.device_put(with_something(state.small), placement.small)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        answers.append(np.asarray(generate(small, base, ids, mask, key)))
    assert answers[0].shape == (ROWS, LENGTH + 5)
    np.testing.assert_array_equal(*answers)


@pytest.mark.parametrize("mesh", ["data", "mixed"])
def test_the_step_is_exported_for_other_platforms(mesh: str) -> None:
    step, arguments, *_ = _step("cdvft", mesh)
    exported = export.export(step, platforms=["cuda", "tpu"])(*arguments)
    assert exported.platforms == ("cuda", "tpu")
    assert exported.nr_devices == 8


def _shapes(program: str, kind: str) -> list[tuple[int, ...]]:
    """Shapes of what a kind of collective gives."""
    shapes = []
    for line in program.splitlines():
        result, called, _ = line.partition(f" {kind}(")
        if called:
            for sizes in re.findall(r"\[([\d,]*)\]", result.partition("= ")[2]):
                shapes.append(tuple(int(size) for size in sizes.split(",") if size))
    return shapes


def _collectives(program: str) -> dict[str, int]:
    """The kinds of collectives in a program, with the numbers that they give."""
    kinds = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
    counts = {kind: sum(map(math.prod, _shapes(program, kind))) for kind in kinds}
    return {kind: count for kind, count in counts.items() if count}
