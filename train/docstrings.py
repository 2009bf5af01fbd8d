"""A task that needs no download: which module of Python's standard library is a docstring of?"""

import ast
import functools
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

NAME = "docstrings"
MODULES, MOST = 20, 160
# Their sources are not part of every installation, or change much between versions of Python.
LEFT_OUT = {"distutils", "ensurepip", "idlelib", "lib2to3", "pyrepl", "site-packages", "tkinter"}
# Of ten examples of a module 7 train, 1 validates and 2 test.
PARTS = {"train": slice(0, 7), "validation": slice(7, 8), "test": slice(8, 10)}


def examples(part: str) -> list[tuple[str, str]]:
    """The docstrings of one split.

    Args:
        part: One of `PARTS`.

    Returns:
        Texts with the names of their modules.
    """
    return [
        (text, module)
        for module, texts in collect().items()
        for start in range(0, len(texts), 10)
        for text in texts[start : start + 10][PARTS[part]]
    ]


@functools.cache
def collect() -> dict[str, list[str]]:
    """The docstrings of the standard library's best documented modules.

    Returns:
        For each of `MODULES` modules up to `MOST` of its docstrings, cut to 40 words and in a
        random order that is the same every time. A text that two modules share is left out.
    """
    root = Path(sysconfig.get_path("stdlib"))
    owners: dict[str, set[str]] = {}
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        if LEFT_OUT.isdisjoint(parts) and not {"test", "tests"} & set(parts):
            module = parts[0].removesuffix(".py").lstrip("_")
            for text in _docstrings(file):
                owners.setdefault(text, set()).add(module)
    texts: dict[str, list[str]] = {}
    for text, modules in owners.items():
        if len(modules) == 1:
            texts.setdefault(*modules, []).append(text)
    largest = sorted(texts, key=lambda module: (-len(texts[module]), module))[:MODULES]
    shuffle = random.Random(0)
    return {
        module: shuffle.sample(texts[module], min(MOST, len(texts[module])))
        for module in sorted(largest)
    }


def _docstrings(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_bytes())
    except SyntaxError:  # some files of the library are broken on purpose
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            words = (ast.get_docstring(node) or "").split()
            if len(words) >= 5:
                yield " ".join(words[:40])
