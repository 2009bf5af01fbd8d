"""C3A beside its reference implementation in PEFT, its gradients and its initialisations."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from circflax.methods import C3A


@pytest.mark.parametrize(
    ("in_features", "out_features", "b"),
    [(6, 9, 1), (6, 9, 3), (128, 192, 64), (768, 768, 768), (768, 1536, 768)],
)
def test_forward_and_merged_weights_are_those_of_peft(in_features, out_features, b) -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(in_features, out_features, bias=False))
    weight = base[0].weight.detach().numpy().copy()
    config = peft.C3AConfig(block_size=b, target_modules=["0"], init_weights="gaussian")
    layer = peft.get_peft_model(base, config).base_model.model[0]

    params = {"w": layer.c3a_kernel["default"].detach().numpy()}
    assert params["w"].shape == C3A(b=b).shapes(in_features, out_features)["w"].shape
    x = np.random.default_rng(0).standard_normal((5, in_features)).astype(np.float32)
    with torch.no_grad():
        theirs = layer(torch.from_numpy(x)).numpy() - x @ weight.T
        delta = layer.get_delta_weight("default").numpy()
    ours = C3A(b=b)
    np.testing.assert_allclose(ours.update(params, x, out_features), theirs, atol=3e-6)
    np.testing.assert_allclose(ours.delta(params, in_features, out_features), delta.T, atol=1e-6)


@pytest.mark.parametrize("b", [1, 2, 3, 6])
@pytest.mark.usefixtures("x64")
def test_input_gradients_are_those_of_the_dense_matrix(b: int) -> None:
    # The published backward pass, which PEFT has, is another one for b of 3 and more.
    rng = np.random.default_rng(0)
    params, x = {"w": rng.standard_normal((12 // b, 6 // b, b))}, rng.standard_normal((4, 6))
    y, vjp = jax.vjp(lambda x: C3A(b=b).update(params, x, 12), x)
    g = rng.standard_normal(y.shape)
    expected = g @ np.asarray(C3A(b=b).delta(params, 6, 12)).T
    np.testing.assert_allclose(vjp(g)[0], expected, atol=1e-13)


@pytest.mark.parametrize(
    ("init_weights", "deviation"),
    [
        ("xavier_uniform", math.sqrt(6 / (64 + 128)) / math.sqrt(3)),
        ("kaiming_uniform", math.sqrt(6 / 64) / math.sqrt(3)),
        ("gaussian", 1.0),
    ],
)
def test_random_starts_have_their_spread_and_follow_the_key(init_weights, deviation) -> None:
    method = C3A(b=2, init_weights=init_weights)
    w, again, other = (method.init(jax.random.key(k), 64, 128)["w"] for k in (0, 0, 1))
    assert np.array_equal(w, again) and not np.any(w == other)
    assert abs(float(jnp.mean(w))) < 0.06 * deviation
    assert float(jnp.std(w)) == pytest.approx(deviation, rel=0.05)
