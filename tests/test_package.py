"""The library stands on its own: imports point downwards, and none needs the application's."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "circflax"
LAYERS = ("ops", "methods", "tree", "linen", "sharding", "costs", "interop", "cli")


def imported(file: Path) -> set[str]:
    """The parts of the package that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("circflax.")}


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_downwards(layer: str) -> None:
    above = set(LAYERS[LAYERS.index(layer) + 1 :])
    for file in (PACKAGE / layer).glob("*.py"):
        assert not imported(file) & above, file


def test_adapting_needs_neither_transformers_nor_pytorch() -> None:
    blocked = ("transformers", "datasets", "huggingface_hub", "torch", "train")
    code = f"""
import doctest, sys
sys.modules.update(dict.fromkeys({blocked}))
import circflax
from circflax.linen import _attach
results = doctest.testmod(_attach)
assert results.attempted and not results.failed
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
