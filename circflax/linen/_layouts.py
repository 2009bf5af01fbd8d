"""Finding out how each layer of a linen model uses its kernel, by looking at what it computes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
from flax import linen as nn
from flax.errors import FlaxError
from jax.extend.core import Jaxpr, Literal, Var

from circflax.linen._calls import intercept_calls
from circflax.linen._inputs import first_input, with_first_input
from circflax.tree import Layout, Path, Tree
from circflax.tree._paths import flatten, join


def find_layouts(run: Callable[[Tree], Any], params: Tree) -> dict[Path, Layout | str]:
    """Finds the layers of a linen model that can be adapted, and how each uses its kernel.

    A layer can be adapted if it multiplies its input by its one kernel, and adds at most a bias:
    `nn.Dense`, `nn.DenseGeneral`, `nn.Einsum` and whatever else computes so, kernels stored
    output-first included. This is read off the layer's own program (its jaxpr), never off its
    class, its name or the kernel's shape. Nothing is computed.

    A layer whose stored weights are transformed before it sees them (`nn.WeightNorm`,
    `nn.map_variables`) looks like a plain one from inside; leave such layers out of the targets.

    Args:
        run: calls the model with parameters: `lambda params: model(batch, params=params)`.
        params: the model's parameters, arrays or `jax.ShapeDtypeStruct`s.

    Returns:
        For each array of two axes or more whose module was called, by its path: its layout, or in
        a few words why it cannot be adapted.

    Raises:
        ValueError: if no module was called.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> model, x = nn.DenseGeneral(features=(2, 3), use_bias=False), jnp.ones((5, 4))
        >>> params = model.init(jax.random.key(0), x)["params"]
        >>> find_layouts(lambda p: model.apply({"params": p}, x), params)
        {('kernel',): Layout(roles=('in', 'out', 'out'), x_axes=(-1,), y_axes=(-2, -1))}
    """
    leaves = flatten(params)
    found: dict[Path, Layout | str] = {}
    readers = _Readers()
    examining = False

    def observe(
        module: nn.Module,
        layer: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        nonlocal examining
        # A layer under examination is called again, by itself; that call is none of the model's.
        if not examining:
            examining = True
            own = module.variables.get("params", {})
            arrays = [name for name, leaf in own.items() if not isinstance(leaf, Mapping)]
            for name in [name for name in arrays if own[name].ndim >= 2]:
                path = (*module.path, name)
                if path not in leaves:
                    # A model may apply a module by hand, as a tied head: not at its own path.
                    continue
                readers.add(path, first_input(args, kwargs))
                layout = _layout(module, own, name, args, kwargs, tuple(leaves[path].shape))
                if found.setdefault(path, layout) != layout:
                    found[path] = "it is called in two ways that use its kernel differently"
            examining = False
        return layer(*args, **kwargs)

    with intercept_calls(observe):
        jax.eval_shape(run, params)
    if not found:
        raise ValueError(
            "`run` called no linen module with these parameters: give the function itself, not one"
            " that `jax.jit` has compiled before."
        )
    for path, source in readers.sources().items():
        if isinstance(found[path], Layout):
            found[path] = replace(found[path], source=source)
    return found


class _Readers:
    """Which layers of one module read the very same array."""

    def __init__(self) -> None:
        self._inputs: list[tuple[Path, Any]] = []
        self._paths: list[list[Path]] = []

    def add(self, path: Path, x: Any) -> None:
        """Notes that the layer of a kernel reads an input."""
        module = path[:-2]
        for (known, array), paths in zip(self._inputs, self._paths, strict=True):
            if array is x and known == module:
                paths.append(path)
                return
        self._inputs.append((module, x))
        self._paths.append([path])

    def sources(self) -> dict[Path, str]:
        """The name of the first layer that reads the same, for those that always read together."""
        groups: dict[Path, set[tuple[Path, ...]]] = {}
        for paths in self._paths:
            together = tuple(dict.fromkeys(paths))
            for path in together:
                groups.setdefault(path, set()).add(together)
        return {
            path: join(min(together)[0][:-1])
            for path, together in groups.items()
            if len(together) == 1 and len(min(together)) > 1
        }


@dataclass(frozen=True)
class _Reason(Exception):
    """Why a layer cannot be adapted."""

    text: str


def _layout(
    module: nn.Module,
    own: Mapping[str, Any],
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    full: tuple[int, ...],
) -> Layout | str:
    if any(isinstance(leaf, Mapping) for leaf in own.values()):
        return "its module is made of other modules"
    kernel, x = own[name], first_input(args, kwargs)
    if not hasattr(x, "ndim"):
        return "its first argument is no array"
    stacked = len(full) - kernel.ndim
    if full[stacked:] != kernel.shape:
        return "its layers are stacked along another axis of the kernel than the first"
    try:
        program, y_shape = _program(module, own, name, args, kwargs)
        axes = _trace(program.jaxpr, kernel.ndim, x.ndim)
    except _Reason as reason:
        return reason.text
    except FlaxError as error:
        return f"its module cannot be called by itself ({type(error).__name__})"
    return _read(axes, kernel.ndim, x.ndim, len(y_shape), stacked)


def _program(
    module: nn.Module,
    own: Mapping[str, jax.Array],
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Any, tuple[int, ...]]:
    """The layer's jaxpr as a function of its kernel and its first argument."""
    unbound = module.clone(parent=None, name=None)
    shapes = {key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for key, leaf in own.items()}
    first = first_input(args, kwargs)

    def call(kernel: jax.Array, x: jax.Array, rest: dict[str, jax.Array]) -> Any:
        positional, keywords = with_first_input(args, kwargs, x)
        return unbound.apply({"params": {**rest, name: kernel}}, *positional, **keywords)

    x = jax.ShapeDtypeStruct(first.shape, first.dtype)
    kernel = shapes.pop(name)
    program, y = jax.make_jaxpr(call, return_shape=True)(kernel, x, shapes)
    if len(jax.tree.leaves(y)) != 1:
        raise _Reason("it returns several arrays")
    return program, y.shape


# What an axis of an intermediate array is: an axis of the kernel, or one of the input.
_Axis = tuple[str, int]
_PASS_THROUGH = ("convert_element_type", "copy", "copy_p", "stop_gradient", "optimization_barrier")


@dataclass(frozen=True)
class _Traced:
    """An array that depends on the kernel or the input: one of them, their product, or another.

    Attributes:
        kind: "kernel", "x", "y" for their product plus at most a bias, or "other".
        axes: where each of its axes comes from.
        contracted: for a product, pairs of a kernel's axis and the input's that it contracts with.
    """

    kind: str
    axes: tuple[_Axis, ...]
    contracted: tuple[tuple[int, int], ...] = ()


def _trace(jaxpr: Jaxpr, kernel_rank: int, x_rank: int) -> _Traced:
    kernel = _Traced("kernel", tuple(("kernel", i) for i in range(kernel_rank)))
    x = _Traced("x", tuple(("x", i) for i in range(x_rank)))
    known: dict[Var, _Traced] = {jaxpr.invars[0]: kernel, jaxpr.invars[1]: x}
    (y,) = _run(jaxpr, known)
    if y is None or y.kind != "y":
        raise _Reason("its output is not its input times its kernel, plus at most a bias")
    return y


def _run(jaxpr: Jaxpr, known: dict[Var, _Traced]) -> list[_Traced | None]:
    """Follows the kernel and the input through a program to its outputs."""

    def read(atom: Var | Literal) -> _Traced | None:
        return None if isinstance(atom, Literal) else known.get(atom)

    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        if not any(operands):
            continue
        result = None
        if not any(traced and traced.kind == "other" for traced in operands):
            result = _equation(equation, operands)
        for var in equation.outvars:
            known[var] = result or _Traced("other", ())
    return [read(atom) for atom in jaxpr.outvars]


def _equation(equation: Any, operands: list[_Traced | None]) -> _Traced | None:
    name, params = equation.primitive.name, equation.params
    inner = params.get("jaxpr") or params.get("call_jaxpr")
    if inner is not None and name in ("jit", "pjit", "closed_call", "custom_jvp_call", "remat2"):
        inner = getattr(inner, "jaxpr", inner)
        entering = zip(inner.invars, operands, strict=True)
        outputs = _run(inner, {var: traced for var, traced in entering if traced})
        return outputs[0] if len(outputs) == 1 else None
    operand = next(traced for traced in operands if traced)
    same_shape = equation.invars[0].aval.shape == equation.outvars[0].aval.shape
    if name in _PASS_THROUGH or (name == "reshape" and same_shape):
        return operand
    if name == "transpose":
        axes = tuple(operand.axes[i] for i in params["permutation"])
        return _Traced(operand.kind, axes, operand.contracted)
    if name == "dot_general":
        return _product(operands, params["dimension_numbers"])
    if name in ("add", "add_any") and operand.kind == "y" and operands.count(None) == 1:
        # The other operand must be a bias: it may not depend on the input or the kernel.
        return operand
    return None


def _product(operands: list[_Traced | None], dimension_numbers: Any) -> _Traced | None:
    left, right = operands
    if left is None or right is None or {left.kind, right.kind} != {"kernel", "x"}:
        return None
    (left_contracted, right_contracted), (left_batch, _) = dimension_numbers
    if left_batch:
        raise _Reason("it multiplies its input by its kernel in batches")
    pairs = []
    for i, j in zip(left_contracted, right_contracted, strict=True):
        pair = dict([left.axes[i], right.axes[j]])
        pairs.append((pair["kernel"], pair["x"]))
    free = [axis for i, axis in enumerate(left.axes) if i not in left_contracted]
    free += [axis for i, axis in enumerate(right.axes) if i not in right_contracted]
    return _Traced("y", tuple(free), tuple(sorted(pairs)))


def _read(y: _Traced, kernel_rank: int, x_rank: int, y_rank: int, stacked: int) -> Layout | str:
    if not y.contracted:
        return "it contracts no axis of its kernel with its input"
    x_axes = dict(y.contracted)
    batch = [axis for origin, axis in y.axes if origin == "x"]
    if batch != sorted(batch):
        return "its output has the input's axes in another order"
    y_axes = {axis: i - y_rank for i, (origin, axis) in enumerate(y.axes) if origin == "kernel"}
    roles = ["in" if axis in x_axes else "out" for axis in range(kernel_rank)]
    if "out" not in roles:
        return "it contracts every axis of its kernel"
    return Layout(
        roles=("layer",) * stacked + tuple(roles),
        x_axes=tuple(x_axes[axis] - x_rank for axis in sorted(x_axes)),
        y_axes=tuple(y_axes[axis] for axis in sorted(y_axes)),
    )
