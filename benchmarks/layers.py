"""One adapted layer, forward and backward: every strategy beside LoRA, frozen layer and PEFT."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
from rich.progress import track

import circflax as cf
from benchmarks.results import Record, Results, by_case, markdown_table, milliseconds
from circflax import ops
from train.timing import time_interleaved

Update = Callable[[cf.methods.Params, jax.Array], jax.Array]

LORA = "lora r=8"


def grid(quick: bool) -> list[Record]:
    """The cases of the suite `layer`."""
    if quick:
        return [_case(512, 384, 384, "float32"), _case(512, 384, 128, "float32")]
    cases = []
    for features in (384, 768, 1024, 4096):
        for block in dict.fromkeys((32, 128, features)):
            for tokens in (512, 4096, 16384):
                if tokens * features <= 16384 * 1024:
                    cases.append(_case(tokens, features, block, "float32"))
            cases.append(_case(1024, features, block, "bfloat16"))
    return cases


def gpu_grid(quick: bool) -> list[Record]:
    """The cases of the suite `gpu`."""
    shapes = [(4096, 768, 768), (4096, 768, 128), (4096, 4096, 4096), (4096, 4096, 256)]
    return [_case(*shape, "bfloat16") for shape in (shapes[:1] if quick else shapes)]


def _case(tokens: int, features: int, block: int, dtype: str) -> Record:
    return {"tokens": tokens, "features": features, "block": block, "dtype": dtype}


def run(results: Results, suite: str, cases: Sequence[Record], rounds: int) -> None:
    """Measures what is missing of a suite of layers."""
    from benchmarks import torch_layers

    for case in track(list(results.missing(suite, cases)), f"{suite}: cases"):
        functions = {**jax_layers(case), **torch_layers.layers(case)}
        timings = time_interleaved(functions, rounds=rounds, budget=2.0)
        chosen = ops.choose_form(product_of(case)).strategy
        measured = {
            name: {**timing._asdict(), "chosen": name.endswith(f" {chosen}")}
            for name, timing in timings.items()
        }
        results.add(suite, case, measured)


def jax_layers(case: Record) -> dict[str, Callable[[], None]]:
    """Functions that run one layer forward and backward, by name."""
    tokens, features, dtype = case["tokens"], case["features"], jnp.dtype(case["dtype"])
    keys = iter(jax.random.split(jax.random.key(0), 64))
    x, g = (jax.random.normal(next(keys), (tokens, features), dtype) for _ in range(2))
    kernel = jax.random.normal(next(keys), (features, features), dtype)
    functions = {"frozen": partial(frozen_gradient, kernel, x, g)}
    for name, update, shapes in updates(case):
        params = {k: jax.random.normal(next(keys), s.shape, s.dtype) for k, s in shapes.items()}
        functions[name] = partial(jax.jit(partial(gradient, update)), params, x, g)
    return {
        name: (lambda function=function: jax.block_until_ready(function()))
        for name, function in functions.items()
    }


def updates(
    case: Record, platform: str | None = None
) -> list[tuple[str, Update, dict[str, jax.ShapeDtypeStruct]]]:
    """The adapters to measure: name, update and shapes of the parameters."""
    features, block = case["features"], case["block"]
    lora = cf.LoRA(r=8)
    found = [(LORA, partial(_update, lora, None), lora.shapes(features, features))]
    costs = ops.estimate_costs(product_of(case, platform))
    for method in (cf.C3A(b=block), cf.CDVFT(p=block)):
        for strategy in get_args(ops.Strategy):
            seconds = [cost for form, cost in costs.items() if form.strategy == strategy]
            # Left out: what would be interpreted, and what would take seconds a run.
            if seconds and min(seconds) < 3.0:
                update = partial(_update, method, strategy)
                shapes = method.shapes(features, features)
                found.append((f"{method.name} {strategy}", update, shapes))
    return found


def product_of(case: Record, platform: str | None = None) -> ops.Product:
    """What the choice of a strategy depends on."""
    platform = platform or jax.devices()[0].platform
    blocks = case["features"] // case["block"]
    return ops.Product(
        tokens=case["tokens"],
        out_blocks=blocks,
        in_blocks=blocks,
        block=case["block"],
        dtype=jnp.dtype(case["dtype"]),
        platform="cuda" if platform == "gpu" else platform,
    )


def gradient(update: Update, params: cf.methods.Params, x: jax.Array, g: jax.Array) -> tuple:
    """The update, and its gradients with respect to the parameters and to x."""
    y, pullback = jax.vjp(update, params, x)
    return y, *pullback(g)


@jax.jit
def frozen_gradient(kernel: jax.Array, x: jax.Array, g: jax.Array) -> tuple:
    """The frozen layer's own product, and its gradient with respect to x."""
    return x @ kernel, g @ kernel.T


def _update(
    method: cf.methods.Method,
    strategy: ops.Strategy | None,
    params: cf.methods.Params,
    x: jax.Array,
) -> jax.Array:
    with ops.default_strategy(strategy):
        return method.update(params, x, x.shape[-1])


def table(records: Sequence[Record]) -> str:
    """Times in ms and ratios, a row a case; what the library chooses is starred."""
    names = dict.fromkeys(record["name"] for record in records)
    rows = []
    for case, of in by_case(records):
        chosen = [record for record in of.values() if record.get("chosen")]
        ours = next((r["median"] for r in chosen if r["name"].startswith("c3a")), None)
        cells = []
        for name in names:
            star = "*" if of.get(name, {}).get("chosen") else ""
            cells.append(milliseconds(of.get(name, {}).get("median")) + star)
        shape = f"{case['tokens']} × {case['features']}, {case['block']}"
        short = {"float32": "f32", "bfloat16": "bf16"}[case["dtype"]]
        lora, peft = (of.get(name, {}).get("median") for name in (LORA, "peft c3a"))
        rows.append([f"{shape} {short}", *cells, _ratio(ours, lora), _ratio(peft, ours)])
    header = ["tokens × d, block", *names, "c3a* / lora", "peft c3a / c3a*"]
    return "ms, forward and backward, the adapter alone\n\n" + markdown_table(header, rows)


def _ratio(a: float | None, b: float | None) -> str:
    return "–" if a is None or b is None else f"{a / b:.2f}"
