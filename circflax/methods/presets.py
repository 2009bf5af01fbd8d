"""The papers' hyperparameters, by experiment.

C3A's are those of its tables A4 and A5 (arXiv 2407.19342v4). CDVFT's and BCA's papers leave
learning rates and epochs open: theirs take C3A's epochs and batch sizes with the block sizes that
the papers state, p = d, and learning rates that amount to C3A's practice at that block size.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from circflax.methods._method import Method
from circflax.methods.bca import BCA
from circflax.methods.c3a import C3A
from circflax.methods.cdvft import CDVFT


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One experiment's settings.

    Adapters sit on every query and value; AdamW without weight decay, sequences of up to 512
    tokens, a linear schedule after a warm-up of 6 % of the steps.

    Attributes:
        model: the base model's name on the Hub.
        task: the GLUE task.
        method: the adapters' method.
        learning_rate: peak learning rate of the adapters.
        head_learning_rate: peak learning rate of the classification head.
        epochs: passes over the training split.
        batch_size: examples of one update.
    """

    model: str
    task: str
    method: Method
    learning_rate: float
    head_learning_rate: float
    epochs: int
    batch_size: int


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


def _presets() -> dict[str, Preset]:
    presets = {}
    for (model, width), rows in _C3A.items():
        methods = (C3A(b=width // _BLOCKS_PER_SIDE[model]), CDVFT(p=width), BCA(p=width))
        for method in methods:
            for task, epochs, batch_size, rate, head_rate in rows:
                presets[f"{method.name}/{model}/{task}"] = Preset(
                    model=f"FacebookAI/{model}",
                    task=task,
                    method=method,
                    learning_rate=rate,
                    head_learning_rate=head_rate,
                    epochs=epochs,
                    batch_size=batch_size,
                )
    return presets


PRESETS: Mapping[str, Preset] = _presets()
"""Every preset by its name, `method/model/task`, such as `"c3a/roberta-base/mrpc"`."""
