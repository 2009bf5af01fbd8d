"""BCA's training rule and its initialisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from circflax import ops
from circflax.methods import BCA

SHAPES = [(8, 12, 4), (6, 6, 6)]


@pytest.mark.parametrize(("in_features", "out_features", "p"), SHAPES)
@pytest.mark.usefixtures("x64")
def test_sgd_at_the_methods_rate_is_dense_sgd_projected(in_features, out_features, p) -> None:
    method, eta = BCA(p=p), 0.1
    rng = np.random.default_rng(0)
    x, target = rng.standard_normal((20, in_features)), rng.standard_normal((20, out_features))
    c = rng.standard_normal((out_features // p, in_features // p, p))
    dense = np.asarray(method.delta({"c": c}, in_features, out_features))
    rate = method.learning_rates(in_features, out_features)["c"]

    def loss(c):
        return jnp.mean((method.update({"c": c}, x, out_features) - target) ** 2)

    for _ in range(3):
        c = c - eta * rate * jax.grad(loss)(c)
        gradient = 2 * x.T @ (x @ dense - target) / target.size
        projected = ops.block_circulant_projection((dense - eta * gradient).T, p)
        dense = ops.block_circulant_matrix(projected).T
        np.testing.assert_allclose(method.delta({"c": c}, *dense.shape), dense, atol=1e-12)


@pytest.mark.parametrize(("in_features", "out_features", "p"), SHAPES)
def test_projection_starts_at_the_nearest_block_circulant(in_features, out_features, p) -> None:
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((in_features, out_features)).astype(np.float32)
    method = BCA(p=p, init_weights="projection")
    params = method.init(jax.random.key(0), in_features, out_features, kernel)
    best = np.linalg.norm(kernel - method.delta(params, in_features, out_features))
    for size in (1e-2, 1.0):
        for _ in range(5):
            other = {"c": params["c"] + size * rng.standard_normal(params["c"].shape)}
            delta = method.delta(other, in_features, out_features)
            assert best < np.linalg.norm(kernel - delta)


def test_projection_of_a_block_circulant_layer_is_the_layer() -> None:
    for in_features, out_features, p in SHAPES:
        shape = (out_features // p, in_features // p, p)
        params = {"c": np.random.default_rng(0).standard_normal(shape)}
        kernel = BCA(p=p).delta(params, in_features, out_features)
        method = BCA(p=p, init_weights="projection")
        again = method.init(jax.random.key(0), in_features, out_features, kernel)
        np.testing.assert_allclose(again["c"], params["c"], atol=1e-6)
