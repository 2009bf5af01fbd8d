"""Linen: find layers, attach adapters, run a model on packed rows, with less memory, on devices.

Circulant layers to build with are here, too.
"""

from circflax.linen._attach import attach
from circflax.linen._layers import BlockCirculant, CirculantDiagonal
from circflax.linen._layouts import find_layouts
from circflax.linen._remat import rematerialize
from circflax.linen._rows import shard_rows
from circflax.linen._segments import keep_apart

__all__ = [
    "BlockCirculant",
    "CirculantDiagonal",
    "attach",
    "find_layouts",
    "keep_apart",
    "rematerialize",
    "shard_rows",
]
