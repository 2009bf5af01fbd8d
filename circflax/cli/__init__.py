"""`circflax inspect`, `merge` and `export`: what to do with an adapter once it is trained."""

import argparse
import itertools
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import jax.numpy as jnp

if TYPE_CHECKING:
    from circflax.tree import Plan


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments; None takes the process's own.

    Returns:
        The exit code: 0, 1 if a file cannot be written, 2 if arguments or files do not fit.
    """
    arguments = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], None] = arguments.command
    # Nothing here needs PyTorch, which transformers would import where it is installed.
    os.environ.setdefault("USE_TORCH", "0")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        command(arguments)
    except ValueError as error:
        return _fail(str(error), 2)
    except OSError as error:
        where = f" (`{error.filename}`)" if error.filename else ""
        return _fail(f"{error.strerror or error}{where}", 1)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="circflax", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    inspect = commands.add_parser("inspect", help="show what an adapter is made of")
    inspect.add_argument("adapter", help="a run's directory, or an adapter's")
    inspect.add_argument(
        "--costs",
        action="store_true",
        help="show instead how its circulant products are computed, and what each way would cost",
    )
    inspect.add_argument(
        "--tokens", type=int, default=4096, help="tokens of a training step (default 4096)"
    )
    inspect.set_defaults(command=_inspect)

    merge = commands.add_parser("merge", help="write merged Flax parameters (Orbax checkpoint)")
    merge.set_defaults(command=_merge)
    export = commands.add_parser(
        "export", help="write the merged model in Hugging Face's layout (safetensors)"
    )
    export.set_defaults(command=_export)
    export.add_argument(
        "--max-shard-size", default="5GB", help="largest weights file, such as 500MB (default 5GB)"
    )
    for command in (merge, export):
        command.add_argument("adapter", help="a run's directory, or an adapter's")
        command.add_argument("output", help="directory to write; it must not exist yet")
        command.add_argument("--base", help="the base model, if it is no longer where it was")
        command.add_argument(
            "--float64", action="store_true", help="merge in float64 instead of float32"
        )
    return parser


def _inspect(arguments: argparse.Namespace) -> None:
    from circflax.tree import load_adapters, report_adapters

    directory = Path(arguments.adapter)
    nested = directory / "adapter"
    file = load_adapters(nested if nested.is_dir() else directory)
    if arguments.costs:
        _show_costs(file.plan, arguments.tokens)
        return
    reports = report_adapters(file.adapters, file.plan)
    width = min(max(len(report.name) for report in reports), 44) if reports else 5
    print(f"{'layer':{width}}  {'method':6} {'parameters':>10} {'rank':>5} {'norm':>9}")
    for report in reports:
        name = report.name if len(report.name) <= width else "…" + report.name[1 - width :]
        print(
            f"{name:{width}}  {report.method:6} {report.parameter_count:>10,}"
            + (
                f" {'–':>5} {'–':>9}"
                if report.norm is None
                else f" {report.rank:>5} {report.norm:>9.3g}"
            )
        )
    for path in file.plan.trained:
        print("/".join(path), "trained in full")
    total = sum(report.parameter_count for report in reports)
    methods = {str(target.method): None for target in file.plan.targets}
    print(f"\n{len(reports)} layers, {total:,} adapter parameters; base {file.base or 'not named'}")
    for method in methods:
        print(method)


def _show_costs(plan: "Plan", tokens: int) -> None:
    from collections import Counter

    from circflax import ops

    if tokens < 1:
        raise ValueError(f"`--tokens` must be a positive number, but is {tokens}.")
    kernels = Counter(
        kernel
        for target in plan.targets
        for kernel in target.method.kernels(target.in_features, target.out_features)
        for _ in range(math.prod(target.layers))
    )
    if not kernels:
        print("no adapter here multiplies by circulants.")
        return
    strategies = get_args(ops.Strategy)
    print(f"estimated ms of one product with its gradients, {tokens:,} tokens; * is chosen")
    for (out_blocks, in_blocks, block), count in kernels.items():
        print(f"\n{count} × {out_blocks} × {in_blocks} blocks of {block}")
        print("  platform  dtype   " + "".join(f"{name:>10}" for name in strategies))
        for platform, dtype in itertools.product(ops.PLATFORMS, ("float32", "bfloat16")):
            product = ops.Product(tokens, out_blocks, in_blocks, block, jnp.dtype(dtype), platform)
            chosen, costs = ops.choose_form(product), ops.estimate_costs(product)
            cells = []
            for strategy in strategies:
                best = min((c for f, c in costs.items() if f.strategy == strategy), default=None)
                star = "*" if strategy == chosen.strategy else " "
                runs = best is not None and math.isfinite(best)
                cells.append(f"{1e3 * best:9.3g}{star}" if runs else f"{'–':>9} ")
            print(f"  {platform:8}  {dtype:8}" + "".join(cells))


def _merge(arguments: argparse.Namespace) -> None:
    import jax
    import orbax.checkpoint as ocp

    import circflax as cf

    output = Path(arguments.output).resolve()
    if output.exists():
        raise ValueError(f"`{output}` exists already; choose another directory.")
    output.parent.mkdir(parents=True, exist_ok=True)
    adapted = cf.interop.load_adapted(arguments.adapter, arguments.base)
    merged = cf.merge(
        adapted.params, adapted.file.adapters, adapted.file.plan, dtype=_dtype(arguments)
    )
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(merged))
    cf.tree.check_room(output.parent, size, "the merged checkpoint")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(output, merged)
    print(f"merged parameters: {output}")


def _export(arguments: argparse.Namespace) -> None:
    import circflax as cf

    cf.interop.export_adapted(
        arguments.adapter,
        arguments.output,
        arguments.base,
        dtype=_dtype(arguments),
        max_shard_size=arguments.max_shard_size,
    )
    print(f"merged model: {arguments.output}")


def _dtype(arguments: argparse.Namespace) -> jnp.dtype:
    return jnp.dtype("float64" if arguments.float64 else "float32")


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code
