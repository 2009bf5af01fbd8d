"""Adaptation methods: one file each, a frozen dataclass of hyperparameters with pure functions."""

from circflax.methods._method import Method, Params
from circflax.methods._registry import METHODS, make_method, replace_hyperparameters
from circflax.methods.bca import BCA
from circflax.methods.c3a import C3A
from circflax.methods.cdvft import CDVFT
from circflax.methods.lora import LoRA
from circflax.methods.presets import PRESETS, Preset

__all__ = [
    "BCA",
    "C3A",
    "CDVFT",
    "METHODS",
    "PRESETS",
    "LoRA",
    "Method",
    "Params",
    "Preset",
    "make_method",
    "replace_hyperparameters",
]
