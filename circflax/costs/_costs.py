"""What a plan costs: parameters, bytes, operations and memory."""

import math
from dataclasses import dataclass, replace
from typing import Any

import jax

from circflax.costs._program import Program, compile_program
from circflax.costs._step import Loss, Run, make_step, mean_square
from circflax.linen import attach
from circflax.methods import Flops
from circflax.tree import Layout, Layouts, Plan, Tree, combine, summarize
from circflax.tree._paths import flatten


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a plan costs, over the whole model.

    Attributes:
        adapter_parameters: trainable parameters of the adapters.
        trained_parameters: parameters of the leaves trained in full.
        bytes: size of the small tree in a file, float32.
        flops: operations of the adapters by the counting rules of `circflax.methods.Flops`.
        base_flops: those of the frozen model's linear layers by the same rules, with the backward
            pass to inputs alone; None without layouts. Attention's products, embeddings and
            convolutions are in XLA's count only.
        forward: the compiled forward pass of a batch, or None if it was not compiled.
        step: the compiled training step of a batch, or None.
    """

    adapter_parameters: int
    trained_parameters: int
    bytes: int
    flops: Flops
    base_flops: Flops | None = None
    forward: Program | None = None
    step: Program | None = None


def count(params: Tree, plan: Plan, layouts: Layouts | None = None) -> Costs:
    """Counts what a plan costs by the papers' rules; nothing is compiled.

    Args:
        params: the model's parameters, arrays or `jax.ShapeDtypeStruct`s.
        plan: as `make_plan` found it.
        layouts: how the model's kernels are read, for the frozen layers' operations.

    Returns:
        The costs, without those of compiled programs.

    Example:
        >>> import jax, circflax as cf
        >>> params = {"query": {"kernel": jax.ShapeDtypeStruct((768, 768), "float32")}}
        >>> plan = cf.make_plan(params, cf.AdapterConfig(method=cf.LoRA(), targets=("query",)))
        >>> costs = cf.costs.count(params, plan)
        >>> costs.adapter_parameters, costs.bytes, costs.flops.forward
        (12288, 49152, 24576.0)
    """
    summary = summarize(params, plan)
    flops = [Flops(0.0, 0.0)]
    for target in plan.targets:
        each = target.method.flops(target.in_features, target.out_features)
        flops.extend([each] * math.prod(target.layers))
    return Costs(
        adapter_parameters=summary.adapter_parameters,
        trained_parameters=summary.trained_parameters,
        bytes=summary.trainable_bytes,
        flops=Flops(*map(sum, zip(*flops, strict=True))),
        base_flops=None if layouts is None else _frozen_flops(params, layouts),
    )


def estimate(
    run: Run,
    params: Tree,
    inputs: Any,
    plan: Plan,
    *,
    layouts: Layouts | None = None,
    loss: Loss = mean_square,
) -> Costs:
    """Counts what a plan costs, and compiles a forward pass and a training step to ask XLA.

    Shapes are enough and nothing is executed. The step is one update by AdamW without dropout,
    compiled for JAX's default device.

    Args:
        run: calls the model with parameters and inputs.
        params: the model's parameters, arrays or `jax.ShapeDtypeStruct`s.
        inputs: a batch, or its shapes, as `run` takes it.
        plan: as `make_plan` found it.
        layouts: as for `count`.
        loss: of the model's outputs; by default the mean of their squares.

    Returns:
        The costs.

    Example:
        >>> import jax, circflax as cf
        >>> from flax import linen as nn
        >>> model, x = nn.Dense(64), jax.ShapeDtypeStruct((32, 64), "float32")
        >>> params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
        >>> plan = cf.make_plan(params, cf.AdapterConfig(train=("bias",)))
        >>> run = lambda params, x: model.apply({"params": params}, x)
        >>> costs = cf.costs.estimate(run, params, x, plan)
        >>> costs.trained_parameters, costs.forward.flops  # x W + b
        (64, 264192.0)
    """
    params = _shapes(params)
    inputs = _shapes(inputs)
    step = make_step(run, params, inputs, plan, loss)
    adapted = attach(run, plan)

    def forward(base: Any, small: Any, inputs: Any) -> Any:
        return adapted(combine(base, small), inputs)

    return replace(
        count(params, plan, layouts),
        forward=compile_program(forward, params, step.arguments[0], inputs),
        step=compile_program(step.run, *step.arguments),
    )


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _frozen_flops(params: Tree, layouts: Layouts) -> Flops:
    leaves = flatten(params)
    weights = sum(
        math.prod(leaves[path].shape)
        for path, layout in layouts.items()
        if isinstance(layout, Layout)
    )
    return Flops(2.0 * weights, 2.0 * weights)
