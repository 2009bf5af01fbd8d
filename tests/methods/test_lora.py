"""LoRA beside its implementation in PEFT, its start and its dtypes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from circflax.methods import LoRA


def peft_layer(in_features: int, out_features: int, method: LoRA, **options):
    """A linear layer without a bias, adapted by PEFT."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(in_features, out_features, bias=False))
    config = peft.LoraConfig(
        r=method.r,
        lora_alpha=method.r if method.alpha is None else method.alpha,
        use_rslora=method.rank_stabilized,
        target_modules=["0"],
        **options,
    )
    return peft.get_peft_model(base, config).base_model.model[0]


@pytest.mark.parametrize("rank_stabilized", [False, True])
@pytest.mark.parametrize(
    ("in_features", "out_features", "r", "alpha"),
    [(6, 9, 4, None), (6, 9, 12, 3.0), (128, 192, 1, 2.5), (768, 768, 8, 16), (768, 1536, 64, 16)],
)
def test_forward_and_merged_weights_are_those_of_peft(
    in_features, out_features, r, alpha, rank_stabilized
) -> None:
    ours = LoRA(r=r, alpha=alpha, rank_stabilized=rank_stabilized)
    layer = peft_layer(in_features, out_features, ours, init_lora_weights=False)
    trained = [p.detach().numpy() for p in layer.parameters() if p.requires_grad]
    assert ours.parameter_count(in_features, out_features) == sum(p.size for p in trained)

    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    params = {"a": a.detach().numpy().T, "b": b.detach().numpy().T}
    kernel = layer.weight.detach().numpy().T.copy()
    x = np.random.default_rng(0).standard_normal((5, in_features)).astype(np.float32)
    theirs = layer(layer.weight.new_tensor(x)).detach().numpy()
    np.testing.assert_allclose(ours.apply(params, x, x @ kernel), theirs, atol=1e-5)
    layer.merge()
    merged = layer.weight.detach().numpy().T
    np.testing.assert_allclose(ours.merge(params, kernel), merged, atol=1e-5)
    delta = ours.delta(params, in_features, out_features)
    np.testing.assert_allclose(delta, merged - kernel, atol=1e-5)


def test_fresh_factors_are_drawn_as_in_peft_and_follow_the_key() -> None:
    method, bound = LoRA(r=32), 1 / math.sqrt(256)
    ours, again, other = (method.init(jax.random.key(k), 256, 64) for k in (0, 0, 1))
    assert np.array_equal(ours["a"], again["a"]) and np.mean(ours["a"] == other["a"]) < 0.01
    layer = peft_layer(256, 64, method)
    for a in (ours["a"], layer.lora_A["default"].weight.detach().numpy()):
        assert 0.99 * bound < np.abs(a).max() <= bound
        assert np.std(a) == pytest.approx(bound / math.sqrt(3), rel=0.03)
        assert abs(np.mean(a)) < 0.03 * bound
    assert not np.any(ours["b"]) and not layer.lora_B["default"].weight.any()


@pytest.mark.parametrize("r", [1, 3, 5])
def test_update_has_the_rank_of_its_factors(r: int) -> None:
    rng = np.random.default_rng(0)
    params = {"a": rng.standard_normal((9, r)), "b": rng.standard_normal((r, 7))}
    assert np.linalg.matrix_rank(LoRA(r=r).delta(params, 9, 7)) == r


@pytest.mark.parametrize("given", ["bfloat16", "float16", "float32", "int32"])
def test_update_is_in_the_inputs_dtype(given: str) -> None:
    rng, method = np.random.default_rng(0), LoRA(r=4, alpha=6.0)
    shapes = method.shapes(24, 16)
    params = {k: jnp.asarray(rng.standard_normal(s.shape), s.dtype) for k, s in shapes.items()}
    x = jnp.asarray(rng.integers(-4, 5, (3, 24)), given)
    update = method.update(params, x, 16)
    expected = np.asarray(x, np.float64) @ np.asarray(method.delta(params, 24, 16), np.float64)
    assert update.dtype == ("float32" if given == "int32" else given)
    tolerance = 4 * float(jnp.finfo(update.dtype).eps) * np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(update, float), expected, atol=tolerance)
