"""Settings that every test shares."""

import os

import jax
import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Compilation makes the first example slow, which says nothing about the code under test.
settings.register_profile(
    "circflax",
    deadline=None,
    max_examples=20,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("circflax")


@pytest.fixture
def x64():
    """Float64 inside one test."""
    with jax.enable_x64(True):
        yield
