"""Running a linen model with adapters, without touching its code."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from flax import linen as nn

from circflax import ops
from circflax.tree import ADAPTER, Plan

P = ParamSpec("P")
R = TypeVar("R")


def attach(
    run: Callable[P, R], plan: Plan, *, strategy: ops.Strategy | None = None
) -> Callable[P, R]:
    """Makes a function that runs a linen model run it with adapters.

    Wherever the model calls a layer of the plan, and the parameters it was given hold an adapter
    beside that layer's kernel (see `circflax.combine`), the adapter acts on the layer's output.
    Without adapters in the parameters the model is the base model. The adapters' arrays belong to
    the layer's own scope, so `nn.scan`, `nn.remat`, `jit`, `grad` and generation loops treat them
    as they treat its kernel.

    Wrap first, transform afterwards: `jax.jit(attach(model.apply, plan))`. What was traced before,
    a function that `jax.jit` or a module that `nn.jit` has compiled, may not be traced again and
    then ignores another plan.

    A fresh adapter adds exact zeros, so that the model's outputs are the base's bit for bit; where
    XLA fuses the adapted program differently, they are so up to its own rounding.

    Args:
        run: anything that calls the model: `module.apply`, a Hugging Face model or its `generate`,
            or a function of your own.
        plan: the layers to adapt.
        strategy: how to compute circulant products; None chooses by shape, dtype and platform.

    Returns:
        A function of the same arguments.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> import circflax as cf
        >>> model, x = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(4)]), jnp.ones((2, 8))
        >>> params = model.init(jax.random.key(0), x)["params"]
        >>> layouts = cf.linen.find_layouts(lambda p: model.apply({"params": p}, x), params)
        >>> config = cf.AdapterConfig(method=cf.CDVFT(), targets=("layers_0",))
        >>> plan = cf.make_plan(params, config, layouts)
        >>> adapters = cf.init_adapters(jax.random.key(1), plan, params)
        >>> apply = jax.jit(cf.linen.attach(model.apply, plan))
        >>> y = apply({"params": cf.combine(params, adapters)}, x)
        >>> bool((y == model.apply({"params": params}, x)).all())
        True
    """

    @functools.wraps(run)
    def adapted(*args: P.args, **kwargs: P.kwargs) -> R:
        adapt = functools.partial(_adapt, plan)
        with nn.intercept_methods(adapt), ops.default_strategy(strategy):
            return run(*args, **kwargs)

    return adapted


def _adapt(
    plan: Plan,
    layer: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    y = layer(*args, **kwargs)
    if context.method_name != "__call__":
        return y
    target = plan.by_path.get(context.module.path)
    if target is None or not context.module.has_variable("params", ADAPTER):
        return y
    params = context.module.get_variable("params", ADAPTER)
    x = args[0] if args else next(iter(kwargs.values()))
    layout = target.layout
    flat = target.method.apply(params, layout.flat_input(x), layout.flat_output(y))
    return layout.output(flat, y.shape)
