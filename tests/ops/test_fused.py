"""The kernel for TPU, interpreted, against dense matrices."""

import math
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
    block, how = a["kernel"].shape[2], {"interpret": True}
    # Vectors come and go in parts, here of a block each.
    xs, gs = (np.split(a[k], a[k].shape[1] // block, axis=1) for k in ("x", "g"))
    to_x, to_g = [block] * len(xs), [block] * len(gs)
    scales = a["left"], a["right"]
    forward, backward = (x * right) @ matrix.T * left, (g * left) @ matrix * right
    y = _fused.product(a["kernel"], xs, to_g, *scales, **how)
    assert_close(jnp.concatenate(y, axis=1), forward, 3e-6)
    y = _fused.product(a["kernel"], gs, to_x, *scales[::-1], transposed=True, **how)
    assert_close(jnp.concatenate(y, axis=1), backward, 3e-6)
    sums = _fused.inner_product(a["kernel"], xs, gs, a["right"], **how)
    assert_close(sums, np.sum(g * ((x * right) @ matrix.T), axis=0), 3e-6)
    sums = _fused.inner_product(a["kernel"], gs, xs, a["left"], transposed=True, **how)
    assert_close(sums, np.sum(x * ((g * left) @ matrix), axis=0), 3e-6)
    gradient = _fused.correlation(xs, gs, block, *scales, **how)
    outer = (g * left).T @ (x * right)
    expected = ops.block_circulant_projection(outer.astype(np.float32), block) * block
    assert_close(gradient, np.asarray(expected, np.float64), 3e-6)
    for side, product in (("x", backward), ("g", forward)):
        sought = (side, "left", "right")
        found = _fused.gradients(a["kernel"], xs, gs, *scales, sought, **how)
        assert_close(jnp.concatenate(found[side], axis=1), product, 3e-6)
        assert_close(found["kernel"][0], np.asarray(expected, np.float64), 3e-6)
        assert_close(found["left"][0], np.sum(g * ((x * right) @ matrix.T), axis=0), 3e-6)
        assert_close(found["right"][0], np.sum(x * ((g * left) @ matrix), axis=0), 3e-6)


@pytest.mark.parametrize(
    ("leading", "tile"),
    [
        ((512,), (256,)),
        ((8, 64), (4, 64)),
        ((2, 3, 32), (2, 32)),
        ((2, 384), (1, 128)),
        # Lines that registers or tiles do not hold are put together.
        ((8, 24), (64,)),
    ],
)
def test_tiles_follow_the_axes_of_tokens(leading, tile) -> None:
    assert _fused.tile_shape(leading, 256, 256) == tile
    tokens = math.prod(leading)
    a = arguments(1, 1, 256, tokens)
    x, g = (a[name].reshape(*leading, 256) for name in ("x", "g"))
    sides = a["left"], a["right"]
    (flat,) = _fused.product(a["kernel"], [a["x"]], [256], *sides, interpret=True)
    (y,) = _fused.product(a["kernel"], [x], [256], *sides, interpret=True)
    np.testing.assert_allclose(y, flat.reshape(x.shape), rtol=1e-6)
    sought = ("x", "left", "right")
    flat = _fused.gradients(a["kernel"], [a["x"]], [a["g"]], *sides, sought, interpret=True)
    found = _fused.gradients(a["kernel"], [x], [g], *sides, sought, interpret=True)
    for name, (gradient,) in flat.items():
        assert_close(found[name][0].reshape(gradient.shape), np.asarray(gradient), 1e-6)


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


@pytest.mark.parametrize("convention", ["column", "row"])
def test_products_of_one_input_in_bfloat16(convention) -> None:
    a = arguments(2, 1, 256, 16)
    kernels = [a["kernel"], a["kernel"][:1] + 1]

    def products(strategy, kernels, x):
        sizes = [512, 256]
        how = {"convention": convention, "strategy": strategy}
        both = ops.block_circulant_products(kernels, x, sizes, **how)
        # One of the results can go unused.
        return both[0], both[1], ops.block_circulant_products(kernels, x, sizes, **how)[1]

    x, cotangents = a["x"], (a["g"], a["g"][:, :256], a["g"][:, 256:])
    half = [array.astype(jnp.bfloat16) for array in (x, *cotangents)]
    got, got_vjp = jax.vjp(partial(products, "fused"), kernels, half[0])
    exact, exact_vjp = jax.vjp(partial(products, "fft"), kernels, half[0].astype(jnp.float32))
    wide = tuple(array.astype(jnp.float32) for array in half[1:])
    pairs = zip(
        jax.tree.leaves((got, got_vjp(tuple(half[1:])))),
        jax.tree.leaves((exact, exact_vjp(wide))),
        strict=True,
    )
    for ours, expected in pairs:
        assert_close(ours, np.asarray(expected, np.float64), 2e-2)


def test_products_that_do_not_fit() -> None:
    kernel = jnp.ones((1, 1, 256))
    for x in (jnp.ones((16, 256)), jnp.ones((5, 256), jnp.bfloat16)):
        with pytest.raises(ValueError, match="'fused' needs bfloat16"):
            ops.block_circulant_product(kernel, x, strategy="fused")
