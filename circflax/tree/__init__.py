"""Param-tree surgery: choose layers in a tree of parameters, make adapters, merge, save."""

from circflax.tree._adapters import (
    AdapterReport,
    combine,
    dense_delta,
    init_adapters,
    merge,
    merge_bias,
    merge_kernel,
    report_adapters,
    switch_off,
    unmerge,
)
from circflax.tree._files import AdapterFile, check_room, load_adapters, save_adapters
from circflax.tree._layout import Layout
from circflax.tree._paths import Path, Patterns, Tree
from circflax.tree._plan import ADAPTER, AdapterConfig, Layouts, Plan, Target, make_plan
from circflax.tree._ranks import allocate_ranks
from circflax.tree._summary import Summary, summarize

__all__ = [
    "ADAPTER",
    "AdapterConfig",
    "AdapterFile",
    "AdapterReport",
    "Layout",
    "Layouts",
    "Path",
    "Patterns",
    "Plan",
    "Summary",
    "Target",
    "Tree",
    "allocate_ranks",
    "check_room",
    "combine",
    "dense_delta",
    "init_adapters",
    "load_adapters",
    "make_plan",
    "merge",
    "merge_bias",
    "merge_kernel",
    "report_adapters",
    "save_adapters",
    "summarize",
    "switch_off",
    "unmerge",
]
