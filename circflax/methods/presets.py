"""The papers' hyperparameters, by experiment.

C3A's are those of its tables A4 to A6 (arXiv 2407.19342v4). CDVFT's and BCA's papers leave
learning rates and epochs open: theirs take C3A's epochs and batch sizes with the block sizes that
the papers state, p = d for RoBERTa and ViT, and learning rates that amount to C3A's practice at
that block size. Where C3A's paper has no such experiment, its nearest one stands in: RESISC45 for
CIFAR-100, its instruction tuning ("common") for Alpaca, and its mathematics for GSM8K.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from circflax.methods._method import Method
from circflax.methods.bca import BCA
from circflax.methods.c3a import C3A
from circflax.methods.cdvft import CDVFT


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One experiment's settings, with AdamW without weight decay.

    Attributes:
        model: the base model's name on the Hub.
        task: the GLUE task, or the name of the data set.
        method: the adapters' method.
        targets: the layers that have adapters, by the names of their modules.
        overrides: other hyperparameters for layers whose path a regular expression matches.
        learning_rate: peak learning rate of the adapters.
        head_learning_rate: peak learning rate of the head, if there is a new one.
        epochs: passes over the training split.
        batch_size: examples of one update.
        schedule: shape of the learning rate after the warm-up.
        warmup: part of the steps during which the learning rate rises.
        max_length: the longest sequence in tokens; None for images.
    """

    model: str
    task: str
    method: Method
    targets: tuple[str, ...] = ("query", "value")
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    learning_rate: float
    head_learning_rate: float | None
    epochs: int
    batch_size: int
    schedule: str = "linear"
    warmup: float = 0.06
    max_length: int | None = 512


# Task, epochs, batch size, learning rate of the kernels and of the head.
_C3A = {
    ("roberta-base", 768): (
        ("sst2", 40, 128, 2e-1, 2e-4),
        ("mrpc", 80, 128, 3e-1, 4e-6),
        ("cola", 80, 128, 2e-1, 3e-2),
        ("qnli", 40, 64, 7e-2, 8e-6),
        ("rte", 80, 64, 3e-1, 6e-3),
        ("stsb", 80, 128, 2e-1, 4e-2),
    ),
    ("roberta-large", 1024): (
        ("sst2", 10, 128, 9e-2, 2e-4),
        ("mrpc", 80, 128, 3e-1, 5e-6),
        ("cola", 70, 128, 2e-1, 3e-3),
        ("qnli", 30, 32, 7e-2, 8e-6),
        ("rte", 60, 64, 5e-2, 3e-3),
        ("stsb", 40, 128, 2e-1, 5e-4),
    ),
}
_BLOCKS_PER_SIDE = {"roberta-base": 6, "roberta-large": 8}


_SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_LLAMA = {"llama2-7b": "meta-llama/Llama-2-7b-hf", "llama3-8b": "meta-llama/Meta-Llama-3-8B"}


def _glue() -> Iterator[tuple[str, Preset]]:
    for (model, width), rows in _C3A.items():
        methods = (C3A(b=width // _BLOCKS_PER_SIDE[model]), CDVFT(p=width), BCA(p=width))
        for method in methods:
            for task, epochs, batch_size, rate, head_rate in rows:
                yield (
                    model,
                    Preset(
                        model=f"FacebookAI/{model}",
                        task=task,
                        method=method,
                        learning_rate=rate,
                        head_learning_rate=head_rate,
                        epochs=epochs,
                        batch_size=batch_size,
                    ),
                )


def _images() -> Iterator[tuple[str, Preset]]:
    for task in ("cifar100", "resisc45"):
        for method in (C3A(b=64), CDVFT(p=768), BCA(p=768)):
            yield (
                "vit-base",
                Preset(
                    model="google/vit-base-patch16-224-in21k",
                    task=task,
                    method=method,
                    learning_rate=2.0,
                    head_learning_rate=2e-2,
                    epochs=10,
                    batch_size=64,
                    schedule="constant",
                    warmup=0.0,
                    max_length=None,
                ),
            )


def _language() -> Iterator[tuple[str, Preset]]:
    def alpaca(model: str, method: Method) -> tuple[str, Preset]:
        return model, Preset(
            model=_LLAMA[model],
            task="alpaca",
            method=method,
            targets=("q_proj", "v_proj"),
            learning_rate=0.3,
            head_learning_rate=None,
            epochs=3,
            batch_size=16,
            schedule="cosine",
            warmup=0.05,
        )

    def gsm8k(method: Method, **where: Any) -> tuple[str, Preset]:
        return "llama2-7b", Preset(
            model=_LLAMA["llama2-7b"],
            task="gsm8k",
            method=method,
            learning_rate=0.4,
            head_learning_rate=None,
            epochs=2,
            batch_size=128,
            schedule="cosine",
            warmup=0.03,
            **where,
        )

    for method in (C3A(b=128), CDVFT(p=4096), BCA(p=1024)):
        yield alpaca("llama2-7b", method)
    yield alpaca("llama3-8b", CDVFT(p=4096))
    # C3A states parts of LLaMA's parameters, not the layers; these five come to them.
    five = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
    yield gsm8k(C3A(b=128), targets=five, overrides={".*/(up|down)_proj": {"b": 256}})
    for method in (CDVFT(p=1024), BCA(p=1024)):
        yield gsm8k(method, targets=_SEVEN)


PRESETS: Mapping[str, Preset] = {
    f"{preset.method.name}/{model}/{preset.task}": preset
    for experiments in (_glue, _images, _language)
    for model, preset in experiments()
}
"""Every preset by its name, `method/model/task`, such as `"c3a/roberta-base/mrpc"`."""
