"""Peak memory of the compiled training step, by method, beside the papers' figures.

Nothing is executed: the compilers say what their programs will hold at most.
"""

from collections.abc import Sequence

import jax
from rich.progress import track

import circflax as cf
from benchmarks import compiling, steps
from benchmarks.results import Record, Results, markdown_table
from train.plan.program import memory_wanted

_HEAD = ("classifier",)
_QUERY_VALUE = {"targets": ("query", "value"), "train": _HEAD}
# (IA)^3 as in C3A's Table 2: all six linear layers of a block, the last one by its input.
SIX = {
    "targets": r".*/layer/\d+/.*(query|key|value|dense)",
    "overrides": {r".*/layer/\d+/output/dense": {"feedforward": True}},
    "train": _HEAD,
}
# C3A (arXiv 2407.19342), Table 2: GB at length 256 and batch 64; full fine-tuning from version 4.
PAPER = {
    "roberta-base": {
        "full": 17.19,
        "bitfit": 12.60,
        "ia3, six linears": 19.86,
        "lora": 13.75,
        "vera": 15.51,
        "boft": 14.11,
        "c3a": 12.83,
        "c3a b=128": 12.72,
    },
    "roberta-large": {
        "full": 43.40,
        "bitfit": 30.65,
        "ia3, six linears": 48.81,
        "lora": 34.12,
        "vera": 34.16,
        "boft": 34.98,
        "c3a": 31.83,
        "c3a b=128": 31.79,
    },
}


def adapters(model: str) -> dict[str, cf.AdapterConfig]:
    """What to compile for a model: the papers' settings of every method, in the table's order."""
    rank = 256 if model == "roberta-large" else 1024
    methods = {
        "lora": cf.LoRA(r=8),
        "vera": cf.VeRA(r=rank),
        "fourierft": cf.FourierFT(n=1000),
        "ia3": cf.IA3(),
        "boft": cf.BOFT(b=8, m=2),
        "lamda": cf.LaMDA(r=32),
        "cdvft": cf.CDVFT(),
        "c3a": cf.C3A(),
        "c3a b=128": cf.C3A(b=128),
        "bca": cf.BCA(),
    }
    return {
        "frozen + head": cf.AdapterConfig(train=_HEAD),
        "bitfit": cf.AdapterConfig(train=(*_HEAD, "bias")),
        "full": cf.AdapterConfig(train=".*"),
        "ia3, six linears": cf.AdapterConfig(method=cf.IA3(), **SIX),
    } | {name: cf.AdapterConfig(method=each, **_QUERY_VALUE) for name, each in methods.items()}


def grid(chip: str | None, quick: bool) -> list[Record]:
    """The cases: a model and a method each, in float32 on CPU and in bfloat16 on TPU."""
    models, batch, length = ("roberta-base", "roberta-large"), 64, 256
    if quick:
        models, batch, length = ("minilm-l6",), 2, 16
    elif chip == "v5p":
        models = ("roberta-large",)
    return [
        {"chip": chip or "cpu", "model": model, "batch": batch, "length": length}
        | {"dtype": "bfloat16" if chip else "float32", "method": name}
        for model in models
        for name in adapters(model)
    ]


def run(results: Results, suite: str, chip: str | None, quick: bool) -> None:
    """Compiles what is missing, for this machine's CPU or for a TPU."""
    for case in track(list(results.missing(suite, grid(chip, quick))), "compiling"):
        step = steps.make_step(case, adapters(case["model"])[case["method"]])
        measured = {"trainable": step.trainable} | _measure(chip, step)
        results.add(suite, case, {case["method"]: measured})


def _measure(chip: str | None, step: steps.Step) -> Record:
    if chip is None:
        program = cf.costs.compile_program(step.run, *step.arguments)
        return {"peak": program.peak_memory, "compile": program.seconds, "fits": True}
    try:
        compiled, seconds = compiling.compile_for(chip, step.run, step.arguments)
    except jax.errors.JaxRuntimeError as error:
        # The compiler gives up on programs that do not fit, but says what they would take.
        if (wanted := memory_wanted(str(error))) is None:
            raise
        return {"peak": wanted[0], "compile": None, "fits": False}
    return {"peak": cf.costs.peak_memory(compiled), "compile": seconds, "fits": True}


def table(records: Sequence[Record]) -> str:
    """Peak memory with ratios to LoRA's, beside the paper's; one table a chip and model."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        case = {key: value for key, value in record["case"].items() if key != "method"}
        title = ", ".join(f"{key} {value}" for key, value in case.items())
        groups.setdefault(title, []).append(record)
    return "\n\n".join(f"{title}\n\n{_table(of)}" for title, of in groups.items())


def _table(records: Sequence[Record]) -> str:
    model = records[0]["case"]["model"]
    of = {record["name"]: record for record in records}
    paper = PAPER.get(model, {})
    rows = []
    for name in adapters(model):
        if name not in of:
            continue
        record, published = of[name], paper.get(name)
        rows.append(
            [
                name,
                f"{record['trainable']:,}",
                f"{record['peak'] / 1e9:.2f}" + ("" if record["fits"] else " †"),
                f"{record['peak'] / of['lora']['peak']:.3f}" if "lora" in of else "–",
                f"{published:.2f}" if published else "–",
                f"{published / paper['lora']:.3f}" if published else "–",
            ]
        )
    header = ["method", "trainable", "peak GB", "/ lora", "paper GB", "/ lora"]
    fits = all(record["fits"] for record in records)
    note = "" if fits else "\n\n† does not fit: what the compiler says that it would take."
    return markdown_table(header, rows) + note
