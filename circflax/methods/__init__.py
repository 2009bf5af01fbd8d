"""Adaptation methods: one file each, a frozen dataclass of hyperparameters with pure functions."""

from circflax.methods._method import Method, Params
from circflax.methods._registry import METHODS, make_method, replace_hyperparameters
from circflax.methods.bca import BCA
from circflax.methods.c3a import C3A
from circflax.methods.cdvft import CDVFT

__all__ = [
    "BCA",
    "C3A",
    "CDVFT",
    "METHODS",
    "Method",
    "Params",
    "make_method",
    "replace_hyperparameters",
]
