"""The kernel for TPU, interpreted, against dense matrices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from circflax import ops
from circflax.ops import _fused

# Blocks, their size and tokens: one and several blocks, a radix of 3, one tile and several.
SHAPES = [(1, 1, 256, 32), (2, 1, 256, 16), (1, 2, 768, 16), (1, 1, 1024, 512)]


def arguments(out_blocks: int, in_blocks: int, block: int, tokens: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    shapes = {
        "kernel": (out_blocks, in_blocks, block),
        "left": (out_blocks * block,),
        "right": (in_blocks * block,),
        "x": (tokens, in_blocks * block),
        "g": (tokens, out_blocks * block),
    }
    return {k: jnp.asarray(rng.standard_normal(s), jnp.float32) for k, s in shapes.items()}


def assert_close(got: jax.Array, expected: np.ndarray, tolerance: float) -> None:
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, atol=tolerance * scale)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_are_the_dense_products(shape) -> None:
    a = arguments(*shape)
    left, right, x, g = (np.asarray(a[k], np.float64) for k in ("left", "right", "x", "g"))
    matrix = np.asarray(ops.block_circulant_matrix(a["kernel"]), np.float64)
    y = _fused.product(a["kernel"], a["x"], a["left"], a["right"], interpret=True)
    assert_close(y, (x * right) @ matrix.T * left, 3e-6)
    sums = _fused.inner_product(a["kernel"], a["x"], a["g"], a["right"], interpret=True)
    assert_close(sums, np.sum(g * ((x * right) @ matrix.T), axis=0), 3e-6)
    turned = partial(_fused.product, transposed=True, interpret=True)
    assert_close(
        turned(a["kernel"], a["g"], a["right"], a["left"]), (g * left) @ matrix * right, 3e-6
    )
    block = a["kernel"].shape[2]
    gradient = _fused.correlation(a["x"], a["g"], block, a["left"], a["right"], interpret=True)
    outer = (g * left).T @ (x * right)
    expected = ops.block_circulant_projection(outer.astype(np.float32), block) * block
    assert_close(gradient, np.asarray(expected, np.float64), 3e-6)


@pytest.mark.parametrize("shape", [(1, 1, 256, 32), (1, 2, 768, 16)], ids=str)
def test_gradients_in_bfloat16(shape) -> None:
    a = arguments(*shape)
    x, g = (a[name].astype(jnp.bfloat16) for name in ("x", "g"))

    def product(strategy, right, kernel, left, x):
        return ops.circulant_diagonal_product([right, left], [kernel], x, strategy=strategy)

    operands = (a["right"], a["kernel"], a["left"], x)
    y, vjp = jax.vjp(partial(product, "fused"), *operands)
    wide = (*operands[:3], x.astype(jnp.float32))
    exact, exact_vjp = jax.vjp(partial(product, "fft"), *wide)
    for got, expected in zip((y, *vjp(g)), (exact, *exact_vjp(g.astype(jnp.float32))), strict=True):
        assert_close(got, np.asarray(expected, np.float64), 2e-2)


def test_products_that_do_not_fit() -> None:
    kernel = jnp.ones((1, 1, 256))
    for x in (jnp.ones((16, 256)), jnp.ones((5, 256), jnp.bfloat16)):
        with pytest.raises(ValueError, match="'fused' needs bfloat16"):
            ops.block_circulant_product(kernel, x, strategy="fused")
