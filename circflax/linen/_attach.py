"""Running a linen model with adapters, without touching its code."""

import functools
import math
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from circflax import ops
from circflax.linen._calls import intercept_calls
from circflax.linen._inputs import Arguments, first_input, with_first_input
from circflax.methods import Additive, Params
from circflax.tree import ADAPTER, Path, Plan, Target

P = ParamSpec("P")
R = TypeVar("R")


def attach(
    run: Callable[P, R],
    plan: Plan,
    *,
    strategy: ops.Strategy | None = None,
    rows: NamedSharding | None = None,
) -> Callable[P, R]:
    """Makes a function that runs a linen model run it with adapters.

    Wherever the model calls a layer of the plan, and the parameters it was given hold an adapter
    beside that layer's kernel (see `circflax.combine`), the adapter acts on the layer's output, or
    on its input where the method does so.
    Without adapters in the parameters the model is the base model. The adapters' arrays belong to
    the layer's own scope, so `nn.scan`, `nn.remat`, `jit`, `grad` and generation loops treat them
    as they treat its kernel.

    Wrap first, transform afterwards: `jax.jit(attach(model.apply, plan))`. What was traced before,
    a function that `jax.jit` or a module that `nn.jit` has compiled, may not be traced again and
    then ignores another plan.

    A fresh adapter changes nothing, so that the model's outputs are the base's bit for bit; where
    XLA fuses the adapted program differently, they are so up to its own rounding.

    Args:
        run: anything that calls the model: `module.apply`, a Hugging Face model or its `generate`,
            or a function of your own.
        plan: the layers to adapt.
        strategy: how to compute circulant products; None chooses by shape, dtype and platform.
        rows: where the rows of a batch lie, as `circflax.sharding.shard_batch` gives it, for a
            program of several devices: each then computes the adapters for its own rows, with any
            strategy, and they exchange the adapters' gradients alone. None leaves it to XLA, which
            may exchange more.

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
        adapt = _Adapt(plan, rows)
        with intercept_calls(adapt), ops.default_strategy(strategy):
            return run(*args, **kwargs)

    return adapted


class _Adapt:
    """The interceptor of one run of a model."""

    def __init__(self, plan: Plan, rows: NamedSharding | None) -> None:
        self._plan, self._rows = plan, rows
        # What was computed together with another layer's update, until its own layer is called.
        self._ready: dict[Path, tuple[Any, jax.Array]] = {}

    def __call__(
        self,
        module: nn.Module,
        layer: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        target = self._plan.by_path.get(module.path)
        params = None if target is None else _adapter(module)
        if params is None:
            return layer(*args, **kwargs)
        x = first_input(args, kwargs)
        if isinstance(target.method, Additive):
            return self._added(target, params, module, x, layer(*args, **kwargs))
        return self._changed(target, params, module, x, layer, (args, kwargs))

    def _added(
        self, target: Target, params: Params, module: nn.Module, x: Any, y: jax.Array
    ) -> jax.Array:
        """The output of a layer whose adapter adds to it."""
        layout = target.layout
        update = self._take(target, x)
        if update is None:
            update = self._together(module, target, params, x)
        flat = layout.flat_output(y)
        if update is None:
            flat = self._by_rows(target.method.apply)(params, layout.flat_input(x), flat)
        else:
            flat = flat + update.astype(flat.dtype)
        return layout.output(flat, y.shape)

    def _take(self, target: Target, x: Any) -> jax.Array | None:
        """The update that an earlier layer's call left for this input."""
        known, update = self._ready.pop(target.path, (None, None))
        return update if known is x else None

    def _together(
        self, module: nn.Module, target: Target, params: Params, x: Any
    ) -> jax.Array | None:
        """This layer's update, leaving those of the layers that will read the same input."""
        together = [(target, params)]
        for other in self._plan.readers.get(target.layout.source, ()):
            sibling = other.path != target.path and other.path[:-1] == target.path[:-1]
            if sibling and (theirs := _adapter(module.parent, other.path[-1])) is not None:
                together.append((other, theirs))
        if len(together) == 1:
            return None
        sizes = [reader.out_features for reader, _ in together]
        updates = self._by_rows(lambda adapters, x: target.method.updates(adapters, x, sizes))(
            [adapter for _, adapter in together], target.layout.flat_input(x)
        )
        if updates is None:
            return None
        for (reader, _), update in zip(together[1:], updates[1:], strict=True):
            self._ready[reader.path] = (x, update)
        return updates[0]

    def _changed(
        self,
        target: Target,
        params: Params,
        module: nn.Module,
        x: jax.Array,
        layer: Callable[..., Any],
        arguments: Arguments,
    ) -> jax.Array:
        """The output of a layer whose adapter changes its input, its output, or both."""
        method, layout = target.method, target.layout
        flat = layout.flat_input(x)
        read = layout.input(self._by_rows(method.input)(params, flat), x.shape)
        args, kwargs = with_first_input(*arguments, read)
        y = layer(*args, **kwargs)
        bias = None if target.bias is None else module.variables["params"][target.bias].reshape(-1)
        apply = self._by_rows(lambda whole, x, y: method.apply(whole[0], x, y, whole[1]))
        changed = apply((params, bias), flat, layout.flat_output(y))
        return layout.output(changed, y.shape)

    def _by_rows(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of what all rows share and of arrays with rows, run where each row lies."""

        def divided(shared: Any, *arrays: jax.Array) -> Any:
            if self._rows is None:
                return function(shared, *arrays)
            mesh, (names, *_) = self._rows.mesh, self._rows.spec
            names = names if isinstance(names, tuple) else (names,)
            parts = math.prod(mesh.shape[name] for name in names)
            if parts == 1 or any(array.ndim < 2 or array.shape[0] % parts for array in arrays):
                return function(shared, *arrays)
            # With the axes of one device, a kernel finds nothing left for XLA to divide.
            names = (*names, *(n for n, size in mesh.shape.items() if size == 1 and n not in names))
            spec = PartitionSpec(names)
            return jax.shard_map(
                function,
                mesh=mesh,
                in_specs=(PartitionSpec(), *[spec] * len(arrays)),
                out_specs=spec,
                axis_names=set(names),
                check_vma=False,
            )(shared, *arrays)

        return divided


def _adapter(module: nn.Module, *names: str) -> Params | None:
    """The adapter that the parameters of a module, or of one inside it, hold."""
    params = module.variables.get("params", {})
    for name in (*names, ADAPTER):
        params = params.get(name, {})
    return params or None
