"""`circflax`: look at adapters, merge and export them; make models to begin with."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax.numpy as jnp


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

    inspect = commands.add_parser(
        "inspect", help="show what an adapter is made of, or what adapters of a model would cost"
    )
    inspect.add_argument(
        "path",
        help="a run's directory or an adapter's; with --costs also a model's config.json, its"
        " directory or its name on the Hub",
    )
    inspect.add_argument(
        "--costs",
        action="store_true",
        help="show instead parameters, operations and memory, and of an adapter how its circulant"
        " products are computed",
    )
    _add_cost_options(inspect.add_argument_group("costs"))
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

    convert = commands.add_parser(
        "convert", help="make a Hugging Face checkpoint of a model of llama2.c"
    )
    convert.add_argument("model", help="the model's .bin file, in the legacy layout")
    convert.add_argument("output", help="directory to write; it must not exist yet")
    convert.add_argument("--tokenizer", required=True, help="its tokenizer's .bin file")
    convert.set_defaults(command=_convert)

    new = commands.add_parser("new", help="make a model with random weights from a configuration")
    new.add_argument(
        "config",
        help="a model's configuration, or its directory; files of a tokenizer or image processor"
        " beside a config.json are copied along",
    )
    new.add_argument("output", help="directory to write; it must not exist yet")
    new.add_argument("--head", required=True, help="the kind of head, such as image-classification")
    new.add_argument("--seed", type=int, default=0, help="decides the weights (default 0)")
    new.set_defaults(command=_new)
    return parser


def _add_cost_options(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--method",
        action="append",
        metavar="NAME[:FIELD=VALUE,…]",
        help="a method, such as c3a:b=128, none, bitfit or full; may be repeated (default all)",
    )
    group.add_argument("--targets", help="layers to adapt, such as query,value (default the usual)")
    group.add_argument("--batch", type=int, default=16, help="examples of a step (default 16)")
    group.add_argument("--length", type=int, help="tokens of each (default 128)")
    group.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="the base's"
    )
    group.add_argument(
        "--no-compile", action="store_true", help="leave out XLA's count and the memory"
    )
    group.add_argument(
        "--tokens", type=int, default=4096, help="tokens of an adapter's products (default 4096)"
    )


def _inspect(arguments: argparse.Namespace) -> None:
    from circflax.cli._costs import Batch, show_adapter_costs, show_model_costs
    from circflax.cli._products import show_products
    from circflax.tree import is_adapter, load_adapters, report_adapters

    directory = Path(arguments.path)
    if (directory / "adapter").is_dir():
        directory = directory / "adapter"
    batch = Batch(
        size=arguments.batch,
        length=arguments.length,
        dtype=arguments.dtype,
        compile=not arguments.no_compile,
    )
    if arguments.costs and not is_adapter(directory):
        show_model_costs(arguments.path, arguments.method, arguments.targets, batch)
        return
    file = load_adapters(directory)
    if arguments.costs:
        show_products(file.plan, arguments.tokens)
        show_adapter_costs(directory, file, batch)
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


def _convert(arguments: argparse.Namespace) -> None:
    import circflax as cf

    cf.interop.convert_llama2c(arguments.model, arguments.tokenizer, arguments.output)
    print(f"converted model: {arguments.output}")


def _new(arguments: argparse.Namespace) -> None:
    import jax

    import circflax as cf

    config = Path(arguments.config)
    if not config.exists():
        raise ValueError(f"`{config}` is neither a model's configuration nor a directory with one.")
    outline = cf.interop.outline_model(config, arguments.head)
    params = outline.init(arguments.seed)
    # A file of another name need not lie among a model's own.
    directory = config if config.is_dir() else config.parent
    companions = directory if config.is_dir() or config.name == "config.json" else None
    cf.interop.save_model(arguments.output, outline.model, params, companions=companions)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"new {type(outline.model).__name__} of {count:,} parameters: {arguments.output}")


def _dtype(arguments: argparse.Namespace) -> jnp.dtype:
    return jnp.dtype("float64" if arguments.float64 else "float32")


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code
