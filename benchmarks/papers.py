"""The papers' tables of parameters and operations beside the library's own counts.

`python -m benchmarks.papers` writes the tables anew into the documents under `docs/results`, each
between the comments that name it.
"""

import math
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import circflax as cf
from benchmarks import memory, steps
from benchmarks.results import Results, markdown_table

_RESULTS = Path(__file__).parents[1] / "docs" / "results"
DOCUMENTS = (_RESULTS / "costs.md", _RESULTS / "memory.md")
MODELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "roberta-base": ("RobertaConfig", steps.ROBERTA),
    "roberta-large": ("RobertaConfig", steps.ROBERTA | steps.MODELS["roberta-large"]),
    "vit-base": ("ViTConfig", {}),
    "vit-large": ("ViTConfig", steps.MODELS["roberta-large"]),
    "llama-2-7b": ("LlamaConfig", {}),
    "llama-3-8b": (
        "LlamaConfig",
        {
            "vocab_size": 128256,
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
        },
    ),
}
_QUERY_VALUE = ".*/(query|value|q_proj|v_proj)"
# C3A states percentages of LLaMA's parameters, not the layers; they come out for these five, with
# wider blocks in the feed-forward network.
_FIVE = {"targets": r".*/(q|k|v|up|down)_proj"}
_WIDE = r".*/(up|down)_proj"
_SEVEN = {"targets": r".*/(q|k|v|o|gate|up|down)_proj"}
_TOKENS = (1, 12, 32, 128, 512, 4096, math.inf)


@cache
def outline(model: str) -> cf.interop.Outline:
    """One of the papers' models, without weights."""
    import transformers

    config, sizes = MODELS[model]
    return cf.interop.outline_model(getattr(transformers, config)(**sizes))


def count(model: str, method: cf.Method | None = None, **config: Any) -> cf.costs.Costs:
    """What adapters of a model cost, on every query and value unless told otherwise."""
    if method is not None:
        config = {"method": method, "targets": _QUERY_VALUE} | config
    params = outline(model).params
    return cf.costs.count(params, cf.make_plan(params, cf.AdapterConfig(**config)))


def parameters(model: str, method: cf.Method, **config: Any) -> int:
    """Trainable parameters of adapters on a model."""
    return count(model, method, **config).adapter_parameters


def biases(model: str) -> int:
    """Parameters that BitFit trains: the base model's biases, without the head's."""
    return count(model, train=r"roberta/.*/bias").trained_parameters


def glue() -> str:
    """C3A's Table 2, column of parameters, as printed and as counted."""

    def row(name: str, printed: tuple[str, str], counted: Callable[[str], int]) -> list[str]:
        numbers = [f"{counted(model):,}" for model in ("roberta-base", "roberta-large")]
        return [name, printed[0], numbers[0], printed[1], numbers[1]]

    def adapters(method: cf.Method, **config: Any) -> Callable[[str], int]:
        return lambda model: parameters(model, method, **config)

    rows = [
        row("BitFit", ("102K", "271K"), biases),
        row("(IA)³, six linears a block", ("111K", "295K"), adapters(cf.IA3(), **memory.SIX)),
        row("LoRA r=8", ("295K", "786K"), adapters(cf.LoRA(r=8))),
        row(
            "VeRA r=1024, 256",
            ("43K", "61K"),
            lambda model: parameters(model, cf.VeRA(r=1024 if model == "roberta-base" else 256)),
        ),
        row("BOFT m=2, b=8", ("166K", "442K"), adapters(cf.BOFT(m=2, b=8))),
        row("… without what is redundant", ("166K", "442K"), effective_boft),
        row("C3A, one block", ("18K", "49K"), adapters(cf.C3A())),
        row("C3A b=128", ("111K", "393K"), adapters(cf.C3A(b=128))),
        row("CDVFT", ("55.3K", "–"), adapters(cf.CDVFT())),
        row("BCA p=d", ("–", "–"), adapters(cf.BCA())),
        row("FourierFT n=1000", ("24K", "–"), adapters(cf.FourierFT(n=1000))),
    ]
    return markdown_table(["method", "paper, base", "counted", "paper, large", "counted"], rows)


def effective_boft(model: str, b: int = 8, m: int = 2) -> int:
    """BOFT's parameters with b (b - 1) / 2 for a rotation in place of the b² that are stored."""
    config = outline(model).model.config
    rotations = 2 * config.num_hidden_layers * m * config.hidden_size // b
    return parameters(model, cf.BOFT(b=b, m=m)) - rotations * (b * b - b * (b - 1) // 2)


def images() -> str:
    """ViT's parameters, as C3A, FourierFT and CDVFT print them."""
    methods = {
        "LoRA r=16": ("0.59M", cf.LoRA(r=16)),
        "C3A b=64": ("0.22M, 0.79M", cf.C3A(b=64)),
        "FourierFT n=3000": ("72K", cf.FourierFT(n=3000)),
        "VeRA r=256": ("–", cf.VeRA(r=256)),
        "CDVFT": ("55.3K", cf.CDVFT()),
    }
    rows = [
        [name, printed, *[f"{parameters(f'vit-{size}', method):,}" for size in ("base", "large")]]
        for name, (printed, method) in methods.items()
    ]
    return markdown_table(["method", "paper", "ViT-base", "ViT-large"], rows)


def commonsense() -> str:
    """C3A's Table 3: percentages of LLaMA's parameters."""
    wide = _FIVE | {"overrides": {_WIDE: {"b": 256}}}
    settings = {
        "LoRA r=32": (("0.83", "0.70"), cf.LoRA(r=32), _FIVE),
        "VeRA r=16384": (("0.05", "–"), cf.VeRA(r=16384), _FIVE),
        "C3A b=128, 256": (("0.35", "0.26"), cf.C3A(b=128), wide),
        "C3A b=128": (("0.35", "0.26"), cf.C3A(b=128), _FIVE),
    }
    rows = []
    for name, (printed, method, config) in settings.items():
        row = [name]
        for model, percent in zip(("llama-2-7b", "llama-3-8b"), printed, strict=True):
            number = parameters(model, method, **config)
            row += [percent, f"{100 * number / _size(model):.3f}", f"{number:,}"]
        rows.append(row)
    columns = ["counted %", "parameters"]
    return markdown_table(
        ["method", "LLaMA-2-7B paper %", *columns, "LLaMA-3-8B paper %", *columns], rows
    )


def _size(model: str) -> int:
    import jax

    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(outline(model).params))


def blocks() -> str:
    """Millions of parameters on LLaMA-2-7B by block size."""
    sizes = (4096, 2048, 1024, 512, 256, 128)
    rows = []
    for name, method in (("BCA", cf.BCA), ("CDVFT", cf.CDVFT)):
        for where, config in (("query, value", {}), ("all seven", _SEVEN)):
            numbers = [parameters("llama-2-7b", method(p=p), **config) for p in sizes]
            rows.append([f"{name}, {where}", *[f"{number / 1e6:.3f}" for number in numbers]])
    return markdown_table(["M parameters, p =", *map(str, sizes)], rows)


def ratios() -> str:
    """Claims of how many times fewer parameters, and what they come to."""
    base, large, llama = "roberta-base", "roberta-large", "llama-2-7b"
    lora, vera = cf.LoRA(r=8), cf.VeRA(r=1024)
    claims = [
        ("BCA, LoRA r=8", "16", base, lora, {}, cf.BCA()),
        ("BCA, LoRA r=8", "16", large, lora, {}, cf.BCA()),
        ("BCA, VeRA r=1024", "14", base, vera, {}, cf.BCA()),
        ("BCA, VeRA r=256", "14", large, cf.VeRA(r=256), {}, cf.BCA()),
        ("BCA, VeRA r=1024 on all seven", "14", llama, vera, _SEVEN, cf.BCA()),
        ("BCA, VeRA r=16384 on five", "14", llama, cf.VeRA(r=16384), _FIVE, cf.BCA()),
        ("CDVFT, LoRA r=8", "5.33", base, lora, {}, cf.CDVFT()),
        ("CDVFT, LoRA r=16", "10.67", "vit-base", cf.LoRA(r=16), {}, cf.CDVFT()),
    ]
    rows = []
    for names, claimed, model, theirs, config, ours in claims:
        numbers = parameters(model, theirs, **config), parameters(model, ours)
        rows.append(
            [f"{names}, {model}", claimed, f"{numbers[0] / numbers[1]:.2f}"]
            + [f"{number:,}" for number in reversed(numbers)]
        )
    return markdown_table(["fewer parameters", "paper", "counted", "its", "the other's"], rows)


def block_flops() -> str:
    """BCA's operations, forward for one token, by its paper's convention and by the library's."""
    cases = [
        ("roberta-base", 768, "2.5M"),
        ("roberta-base", 256, "3.8M"),
        ("roberta-large", 512, "9.0M"),
        ("roberta-large", 1024, "7.5M"),
    ]
    rows = []
    for model, p, printed in cases:
        config = outline(model).model.config
        theirs = 2 * config.num_hidden_layers * paper_flops(config.hidden_size, p)
        flops = count(model, cf.BCA(p=p)).flops
        numbers = theirs, flops.forward + flops.step_forward, flops.forward
        rows.append([f"{model}, p={p}", printed, *map(_mega, numbers)])
    return markdown_table(
        ["BCA on query and value", "paper", "its convention", "ours, T = 1", "ours, T → ∞"], rows
    )


def paper_flops(width: int, p: int) -> int:
    """One layer's forward pass for one token as BCA's paper counts it.

    Every transform is charged as complex, with its number of stages rounded down, that of the
    kernel for each token; a product of spectra as one multiplication and one addition.
    """
    q = width // p
    transforms = q + q * q + q
    return 5 * p * int(math.log2(p)) * transforms + 2 * q * q * p


def fourier() -> str:
    """FourierFT's operations over the circulant methods', forward, by tokens of a step."""
    rows = []
    for name, method in (("CDVFT", cf.CDVFT()), ("C3A, BCA", cf.BCA())):
        rows.append([f"{name}, real transforms", *[f"{ratio(method, t):.4g}" for t in _TOKENS]])
    rows.append(["CDVFT, complex transforms", *[f"{complex_ratio(t):.4g}" for t in _TOKENS]])
    return markdown_table(["FourierFT over …, T =", *map(str, _TOKENS[:-1]), "∞"], rows)


def operations() -> str:
    """Every method's operations for one square layer, in both passes, beside LoRA's."""
    methods = [cf.LoRA(r=8), cf.CDVFT(), cf.C3A(), cf.C3A(b=128), cf.BCA()]
    methods += [cf.VeRA(r=256), cf.FourierFT(n=1000), cf.IA3(), cf.BOFT(b=8, m=2), cf.LaMDA(r=32)]
    rows = []
    for method in methods:
        row = [f"{method.name} b=128" if method == cf.C3A(b=128) else method.name]
        for width in (768, 4096):
            flops, lora = method.flops(width, width), methods[0].flops(width, width)
            tokens, step = sum(flops[:2]), sum(flops[2:])
            row += [f"{tokens / 1e3:,.1f}", f"{tokens / sum(lora[:2]):.2f}", f"{step / 1e3:,.0f}"]
        rows.append(row)
    header = ["k a token, 768", "/ lora", "once a step", "k a token, 4096", "/ lora", "once a step"]
    return markdown_table(["both passes", *header], rows)


def ratio(method: cf.Method, tokens: float, width: int = 768) -> float:
    """Operations of FourierFT's forward pass over another method's, for a square layer."""
    theirs, ours = (each.flops(width, width) for each in (cf.FourierFT(), method))
    return (theirs.forward + theirs.step_forward / tokens) / (
        ours.forward + ours.step_forward / tokens
    )


def complex_ratio(tokens: float, width: int = 768) -> float:
    """`ratio` of CDVFT with its transforms charged as complex and its products as real."""
    entries, transform = width**2, 5 * width * math.log2(width)
    theirs = 2 * entries + 5 * entries * math.log2(entries) / tokens
    return theirs / (2 * transform + 4 * width + transform / tokens)


def measured() -> str:
    """Peak memory by compiler and model, from the file of results."""
    return memory.table(Results(_RESULTS / "costs" / "memory.json").of("memory"))


TABLES: Mapping[str, Callable[[], str]] = {
    "glue": glue,
    "images": images,
    "commonsense": commonsense,
    "blocks": blocks,
    "ratios": ratios,
    "block flops": block_flops,
    "fourier": fourier,
    "operations": operations,
    "memory": measured,
}


def fill(document: str) -> str:
    """A document with its tables written anew."""
    return re.sub(
        r"(<!-- table: (.+?) -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}",
        document,
        flags=re.DOTALL,
    )


def main() -> None:
    """Writes the tables of both documents."""
    for path in DOCUMENTS:
        path.write_text(fill(path.read_text()))


def _mega(number: float) -> str:
    return f"{number / 1e6:.2f}M"


if __name__ == "__main__":
    main()
