"""Checkpoints of every architecture, written once for all the tests here."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.architectures import architecture


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns the directory that PyTorch wrote for an architecture's id; not to be written to."""
    from tests.interop.oracle import save, torch_model

    directories: dict[str, Path] = {}

    def get(id: str) -> Path:
        if id not in directories:
            directory = tmp_path_factory.mktemp(id)
            directories[id] = save(torch_model(architecture(id)), directory)
        return directories[id]

    return get
