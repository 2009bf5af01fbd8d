"""Sliding windows as PyTorch reads them; rotary tables are in `test_rotary`."""

import numpy as np
import pytest
import transformers

from circflax.interop import load_model
from tests.interop.test_rotary import LENGTH, TOKENS, family

oracle = pytest.importorskip("tests.interop.oracle", exc_type=ImportError)


@pytest.mark.parametrize("window", [None, 1, 6, LENGTH, 4096])
def test_sliding_windows(tmp_path, window: int | None) -> None:
    entry = family("mistral", sliding_window=window)
    base = oracle.save(oracle.torch_model(entry), tmp_path)
    model, params, _ = load_model(base, entry.head)
    assert model.config.sliding_window == window
    torch = oracle.reload(entry, base)
    expected = oracle.torch_logits(torch, entry)
    oracle.assert_close(oracle.flax_logits(model, params, entry), expected)
    wrong = transformers.FlaxMistralForCausalLM(model.config, _do_init=False)
    differs = np.abs(oracle.flax_logits(wrong, params, entry) - expected).max() > 0.01
    assert differs == (window in (None, 1, 6))
    if window in (None, 6):
        prompt, options = TOKENS[:, :20], dict(max_length=LENGTH, do_sample=False, pad_token_id=0)
        generated = torch.generate(oracle.torch.tensor(prompt).long(), **options).numpy()
        ours = model.generate(prompt, params=params, **options).sequences
        assert generated.shape == TOKENS.shape and np.array_equal(ours, generated)
