"""Layers with circulant weights, beside their dense matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from circflax.linen import BlockCirculant, CirculantDiagonal
from tests.linen.models import init
from tests.ops.operators import reference_block

IN = 6
LAYERS = (
    CirculantDiagonal(6),
    CirculantDiagonal(9),
    CirculantDiagonal(4, p=4),
    CirculantDiagonal(7, factors=5, p=4),
    CirculantDiagonal(6, factors=1, use_bias=False),
    BlockCirculant(6),
    BlockCirculant(9, p=3),
    BlockCirculant(7, p=4, use_bias=False),
)
over_layers = pytest.mark.parametrize(
    "layer", LAYERS, ids=lambda m: f"{type(m).__name__}-{m.features}-{m.p}"
)


def x(dtype=np.float32, batch=(2, 3)):
    return np.random.default_rng(0).standard_normal((*batch, IN)).astype(dtype)


def reference(layer, params) -> np.ndarray:
    params = {name: np.asarray(array, np.float64) for name, array in params.items()}
    if isinstance(layer, BlockCirculant):
        return reference_block(params["c"], "column")[: layer.features, :IN]
    matrix = np.diag(params["a1"])
    for i in range(2, layer.factors, 2):
        circulant = reference_block(params[f"c{i}"], "column")
        circulant = circulant[: layer.features, : matrix.shape[0]]
        matrix = np.diag(params[f"a{i + 1}"]) @ circulant @ matrix
    return matrix


@over_layers
def test_output_is_the_dense_matrix_product(layer) -> None:
    params = init(layer, x())
    assert ("bias" in params) == layer.use_bias
    expected = x() @ reference(layer, params).T + np.asarray(params.get("bias", 0.0))
    np.testing.assert_allclose(layer.apply({"params": params}, x()), expected, atol=1e-5)


@over_layers
def test_gradients_are_finite_and_reach_every_parameter(layer) -> None:
    params = layer.init(jax.random.key(0), x())["params"]
    loss = lambda p, x: jnp.sum(jnp.sin(layer.apply({"params": p}, x)))  # noqa: E731
    grads, dx = jax.jit(jax.grad(loss, (0, 1)))(params, x())
    for leaf in (*jax.tree.leaves(grads), dx):
        assert np.isfinite(leaf).all() and np.any(leaf)


@pytest.mark.parametrize("layer_class", [CirculantDiagonal, BlockCirculant])
@pytest.mark.parametrize(
    ("dtype", "param_dtype", "x_dtype", "result"),
    [
        (None, jnp.float32, jnp.float32, jnp.float32),
        (None, jnp.float32, jnp.bfloat16, jnp.float32),
        (None, jnp.bfloat16, jnp.bfloat16, jnp.bfloat16),
        (jnp.bfloat16, jnp.float32, jnp.float32, jnp.bfloat16),
        (jnp.float32, jnp.bfloat16, jnp.bfloat16, jnp.float32),
        (None, jnp.float32, jnp.int32, jnp.float32),
    ],
)
def test_dtypes_are_those_of_dense(layer_class, dtype, param_dtype, x_dtype, result) -> None:
    options = dict(dtype=dtype, param_dtype=param_dtype)
    layer, dense = layer_class(4, **options), nn.Dense(4, **options)

    def shapes(module):
        return jax.eval_shape(
            lambda x: module.init_with_output(jax.random.key(0), x),
            jax.ShapeDtypeStruct((2, IN), x_dtype),
        )

    (y, variables), (dense_y, _) = shapes(layer), shapes(dense)
    assert y.dtype == dense_y.dtype == result and y.shape == dense_y.shape
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(param_dtype)}


@over_layers
def test_fresh_layer_keeps_the_size_of_the_signal(layer) -> None:
    wide = layer.clone(features=64 * layer.features, p=layer.p and 16 * layer.p)
    data = np.random.default_rng(0).standard_normal((50, 64 * 6)).astype(np.float32)
    y, _ = wide.init_with_output(jax.random.key(0), data)
    assert float(jnp.std(y)) == pytest.approx(1.0, rel=0.25)


def test_initialisers_are_used() -> None:
    ones, twos = nn.initializers.ones, nn.initializers.constant(2.0)
    layer = CirculantDiagonal(4, circulant_init=ones, diagonal_init=twos, bias_init=ones)
    params = layer.init(jax.random.key(0), x())["params"]
    assert {k: float(v.mean()) for k, v in params.items()} == {"a1": 2, "a3": 2, "c2": 1, "bias": 1}
    params = BlockCirculant(4, kernel_init=twos).init(jax.random.key(0), x())["params"]
    assert {k: float(v.mean()) for k, v in params.items()} == {"c": 2, "bias": 0}


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (CirculantDiagonal(6, factors=4), "`factors` must be odd and positive, but is 4"),
        (CirculantDiagonal(6, factors=-1), "`factors` must be odd and positive, but is -1"),
        (CirculantDiagonal(7, factors=1), "keeps the width 6, but `features` is 7"),
    ],
)
def test_what_does_not_fit_is_named(layer, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer.init(jax.random.key(0), x())


@pytest.mark.parametrize("layer_class", [CirculantDiagonal, BlockCirculant])
def test_model_of_such_layers_learns(layer_class) -> None:
    model = nn.Sequential([layer_class(12), nn.gelu, nn.Dense(1)])
    data = x(batch=(64,))
    target = np.sin(data.sum(-1, keepdims=True))
    params = model.init(jax.random.key(0), data)
    optimizer = optax.adam(3e-2)

    @jax.jit
    def step(state, _):
        params, moments = state
        loss = lambda p: jnp.mean((model.apply(p, data) - target) ** 2)  # noqa: E731
        value, grads = jax.value_and_grad(loss)(params)
        updates, moments = optimizer.update(grads, moments)
        return (optax.apply_updates(params, updates), moments), value

    _, losses = jax.lax.scan(step, (params, optimizer.init(params)), length=60)
    assert losses[-1] < 0.5 * losses[0]
