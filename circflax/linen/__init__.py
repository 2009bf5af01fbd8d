"""Linen: find a model's layers, attach adapters to them, and circulant layers to build with."""

from circflax.linen._attach import attach
from circflax.linen._layers import BlockCirculant, CirculantDiagonal
from circflax.linen._layouts import find_layouts

__all__ = ["BlockCirculant", "CirculantDiagonal", "attach", "find_layouts"]
