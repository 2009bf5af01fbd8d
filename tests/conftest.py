"""Settings that every test shares."""

import os

import jax
import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The application switches PyTorch off for its process; here it is the oracle.
os.environ.setdefault("USE_TORCH", "AUTO")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# A mesh needs several devices; what names none runs on the first of them.
jax.config.update("jax_num_cpu_devices", 8)
# Many tests compile the same programs, in several processes.
jax.config.update(
    "jax_compilation_cache_dir",
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.abspath(".cache/jax-tests")),
)
for name, value in (("min_compile_time_secs", 0.2), ("min_entry_size_bytes", 0)):
    jax.config.update(f"jax_persistent_cache_{name}", value)

# Compilation makes the first example slow, which says nothing about the code under test.
settings.register_profile(
    "circflax",
    deadline=None,
    max_examples=10,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("circflax")


@pytest.fixture
def x64():
    """Float64 inside one test."""
    with jax.enable_x64(True):
        yield
