"""Tokens and images a second in training, with adapters and of the frozen model alone."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
from rich.progress import track

import circflax as cf
from benchmarks.results import Record, Results, by_case, markdown_table, milliseconds
from benchmarks.steps import random_arrays, runner
from train.config import (
    AdapterConfig,
    Config,
    DataConfig,
    ImagesConfig,
    LanguageConfig,
    ModelConfig,
    OptimConfig,
)
from train.plan.step import make_step
from train.timing import time_interleaved

FORWARD = "frozen, forward alone"
# MiniLM's size, in each of the three kinds of task.
_WIDTHS = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}
_KINDS: dict[str, tuple[str, Record, Record, int | None, str]] = {
    "texts": ("BertConfig", _WIDTHS, {"data": DataConfig(task="rte")}, 128, "tokens"),
    "images": ("ViTConfig", _WIDTHS, {"images": ImagesConfig(dataset="digits")}, None, "images"),
    "language": (
        "LlamaConfig",
        _WIDTHS | {"num_key_value_heads": 4, "intermediate_size": 1024},
        {"language": LanguageConfig(dataset="any")},
        128,
        "tokens",
    ),
}
_TARGETS = {"texts": ("query", "value"), "images": ("query", "value")}
_METHODS: dict[str, Record] = {
    "frozen + head": {"method": "none"},
    "lora": {"method": "lora", "hyperparameters": {"r": 8}},
    "cdvft": {"method": "cdvft"},
    "c3a b=128": {"method": "c3a", "hyperparameters": {"b": 128}},
    "bca p=128": {"method": "bca", "hyperparameters": {"p": 128}},
    "full": {"method": "full"},
}


def grid(quick: bool) -> list[Record]:
    """The cases: a kind of task each."""
    if quick:
        return [{"kind": "language", "batch": 1, "length": 16, "layers": 1}]
    return [
        {"kind": kind, "batch": 16, "length": length, "layers": 6}
        for kind, (_, _, _, length, _) in _KINDS.items()
    ]


def run(results: Results, suite: str, quick: bool, rounds: int) -> None:
    """Measures what is missing."""
    import transformers

    for case in results.missing(suite, grid(quick)):
        kind, fields, section, _, unit = _KINDS[case["kind"]]
        if case["length"] is not None:
            section = {
                name: replace(examples, max_length=case["length"])
                for name, examples in section.items()
            }
        fields = fields | {"num_hidden_layers": case["layers"]}
        outline = cf.interop.outline_model(getattr(transformers, kind)(**fields))
        functions: dict[str, Callable[[], None]] = {}
        units = case["batch"] * (case["length"] or 1)
        targets = _TARGETS.get(case["kind"], ("q_proj", "v_proj"))
        base = random_arrays(outline.params)
        inputs = random_arrays(outline.inputs(case["batch"], case["length"]))
        functions[FORWARD] = _forward(outline, base, inputs)
        for name, adapter in track(_METHODS.items(), f"{case['kind']}: compiling"):
            if case["kind"] == "language" and adapter["method"] == "none":
                continue  # it has no head that would train
            config = Config(
                ModelConfig("shapes"),
                **section,
                adapter=AdapterConfig(targets=targets, **adapter),
                optim=OptimConfig(batch_size=case["batch"]),
            )
            step = make_step(config, outline)
            state, _, batch, _ = step.arguments
            compiled = step.run.lower(*step.arguments).compile()
            functions[name] = runner(compiled, random_arrays(state), base, random_arrays(batch))
        timings = time_interleaved(functions, rounds=rounds, budget=60.0)
        measured = {
            name: timing._asdict() | {"a_second": units / timing.median, "unit": unit}
            for name, timing in timings.items()
        }
        results.add(suite, case, measured)


def _forward(outline: cf.interop.Outline, base: Any, batch: Any) -> Callable[[], None]:
    compiled = jax.jit(outline.run).lower(base, batch).compile()
    return lambda: jax.block_until_ready(compiled(base, batch))


def table(records: Sequence[Record]) -> str:
    """Time of a step, what it comes to a second, and ratios to the frozen model and to LoRA."""
    sections = []
    for case, of in by_case(records):
        lora, frozen = of["lora"]["median"], of[FORWARD]["median"]
        unit = of["lora"]["unit"]
        rows = [
            [
                name,
                milliseconds(record["median"]),
                f"{record['a_second']:,.0f}",
                f"{record['median'] / frozen:.2f}",
                f"{record['median'] / lora:.3f}",
            ]
            for name, record in of.items()
        ]
        title = ", ".join(f"{key} {value}" for key, value in case.items() if value is not None)
        header = ["method", "ms", f"{unit}/s", "/ forward", "/ lora"]
        sections.append(f"{title}\n\n{markdown_table(header, rows)}")
    return "\n\n".join(sections)
