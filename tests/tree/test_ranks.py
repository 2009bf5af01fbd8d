"""Ranks follow the spectra of the layers."""

import jax.numpy as jnp
import numpy as np
import pytest

from circflax.methods import CDVFT, LaMDA
from circflax.tree import AdapterConfig, Layout, allocate_ranks, make_plan


def layer(spectrum: np.ndarray, seed: int) -> jnp.ndarray:
    """A square kernel with given singular values."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((len(spectrum),) * 2))[0] for _ in range(2))
    return jnp.asarray(left * spectrum @ right, jnp.float32)


def planned(spectra: dict[str, np.ndarray], r: int):
    params = {name: {"kernel": layer(s, seed)} for seed, (name, s) in enumerate(spectra.items())}
    return params, make_plan(params, AdapterConfig(method=LaMDA(r=r, alpha=3.0), targets=".*"))


@pytest.mark.parametrize("r", [1, 2, 5, 11])
def test_ranks_keep_their_sum_and_hold_equal_shares(r: int) -> None:
    decays = {"steep": 0.6, "middle": 0.85, "flat": 1.0}
    spectra = {name: decay ** np.arange(16) for name, decay in decays.items()}
    params, plan = planned(spectra, r)
    allocated = allocate_ranks(params, plan)
    ranks = {target.name: target.method.r for target in allocated.targets}
    assert sum(ranks.values()) == 3 * r and ranks["steep"] <= ranks["middle"] <= ranks["flat"]
    assert {target.method.alpha for target in allocated.targets} == {3.0}
    shares = {n: np.cumsum(s**2 / np.sum(s**2)) for n, s in spectra.items()}
    smallest = min(shares[name][rank - 1] for name, rank in ranks.items())
    # Whoever has more than one rank needed the last one: without it its share was the smallest.
    for name, rank in ranks.items():
        assert rank == 1 or shares[name][rank - 2] <= smallest + 1e-5


def test_full_ranks_take_no_more() -> None:
    params, plan = planned({"a": np.ones(4), "b": np.geomspace(1, 1e-3, 4)}, 4)
    assert [target.method.r for target in allocate_ranks(params, plan).targets] == [4, 4]


def test_stack_of_layers_has_one_rank() -> None:
    params = {"stack": {"kernel": jnp.stack([layer(np.ones(6), i) for i in range(3)])}}
    layouts = {("stack", "kernel"): Layout.parse("layer,in,out")}
    plan = make_plan(params, AdapterConfig(method=LaMDA(r=2), targets=".*"), layouts)
    assert [target.method.r for target in allocate_ranks(params, plan).targets] == [2]


def test_other_methods_are_refused() -> None:
    params, _ = planned({"a": np.ones(4)}, 2)
    plan = make_plan(params, AdapterConfig(method=CDVFT(), targets=".*"))
    with pytest.raises(ValueError, match="adapters of lamda, but 'a' has one of cdvft"):
        allocate_ranks(params, plan)
