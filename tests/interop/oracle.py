"""PyTorch models as the oracle: checkpoints that `transformers` writes, and logits it computes."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from tests.architectures import Architecture

transformers.logging.set_verbosity_error()
torch = pytest.importorskip("torch")


def torch_model(entry: Architecture, *, torch_class: str | None = None) -> Any:
    """A random PyTorch model; every parameter and buffer differs from what `transformers` sets."""
    torch.manual_seed(0)
    model = getattr(transformers, torch_class or entry.torch_class)(entry.config()).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.randn_like(tensor))
    return model


def save(model: Any, directory: Path, **options: Any) -> Path:
    """Writes a PyTorch model as safetensors."""
    model.save_pretrained(directory, safe_serialization=True, **options)
    return directory


def reload(entry: Architecture, directory: Path) -> Any:
    """Reads a directory in PyTorch, and sees to it that every tensor in it found its place."""
    model, info = getattr(transformers, entry.torch_class).from_pretrained(
        directory, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def torch_logits(model: Any, entry: Architecture) -> np.ndarray:
    inputs = {
        name: torch.from_numpy(array.astype(np.int64) if array.dtype == np.int32 else array)
        for name, array in entry.inputs().items()
    }
    with torch.no_grad():
        return _attended(model(**inputs).logits.float().numpy(), entry)


def flax_logits(model: Any, params: Any, entry: Architecture) -> np.ndarray:
    @jax.jit
    def apply(params: Any, inputs: dict[str, jax.Array]) -> jax.Array:
        return model(**inputs, params=params).logits

    return _attended(np.asarray(apply(params, entry.inputs()), np.float32), entry)


def _attended(logits: np.ndarray, entry: Architecture) -> np.ndarray:
    # What a decoder makes of padding is of no interest, and differs between the two libraries.
    mask = entry.inputs().get("attention_mask")
    causal = mask is not None and logits.shape[:2] == mask.shape and entry.head == "causal-lm"
    return logits[mask == 1] if causal else logits


def assert_close(actual: np.ndarray, expected: np.ndarray, atol: float = 1e-5) -> None:
    # Logits must be of a size that makes the tolerance mean something.
    assert jnp.abs(expected).max() > 0.01
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=atol)
