"""Block-circulant products by real fast Fourier transforms, in float32 or wider."""

import math

import jax
import jax.numpy as jnp


def product(kernel: jax.Array, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Multiplies by a block-circulant matrix.

    Args:
        kernel: first columns, `(out_blocks, in_blocks, block)`.
        x: `(tokens, in_blocks * block)`.
        dtype: the layer's; the transforms run in at least float32.

    Returns:
        `(tokens, out_blocks * block)`, in the transforms' dtype.
    """
    out_blocks, _, block = kernel.shape
    compute = jnp.promote_types(dtype, jnp.float32)
    weights = jnp.fft.rfft(kernel.astype(compute))
    y = jnp.fft.irfft(_contract(weights, _spectrum(x, block, compute)), n=block)
    return y.reshape(x.shape[0], out_blocks * block)


def correlation(x: jax.Array, g: jax.Array, block: int, dtype: jnp.dtype) -> jax.Array:
    """The gradient of `sum(g * product(kernel, x))` with respect to the kernel.

    Args:
        x: `(tokens, in_blocks * block)`.
        g: `(tokens, out_blocks * block)`.
        block: size of the blocks.
        dtype: the layer's; the transforms run in at least float32.

    Returns:
        `(out_blocks, in_blocks, block)`, in the transforms' dtype.
    """
    compute = jnp.promote_types(dtype, jnp.float32)
    weights = _correlate(_spectrum(g, block, compute), _spectrum(x, block, compute))
    return jnp.fft.irfft(weights, n=block)


def _spectrum(x: jax.Array, block: int, dtype: jnp.dtype) -> jax.Array:
    return jnp.fft.rfft(x.astype(dtype).reshape(x.shape[0], x.shape[1] // block, block))


def _contract(weights: jax.Array, x: jax.Array) -> jax.Array:
    """Contracts `(o, i, f)` and `(t, i, f)` over i to `(t, o, f)`."""
    # A sum of products that XLA fuses: its complex batched product is slow on CPU.
    return sum(weights[:, i] * x[:, i, None] for i in range(weights.shape[1]))


def _correlate(g: jax.Array, x: jax.Array) -> jax.Array:
    """Sums `g conj(x)` of `(t, o, f)` and `(t, i, f)` over the tokens to `(o, i, f)`."""
    if g.shape[1] == x.shape[1] == 1:
        # Some products are summed as they are made: XLA would write them all out before summing.
        parts = math.gcd(g.shape[0], 8)
        shape = g.shape[0] // parts, parts, g.shape[2]
        g, x = g.reshape(shape), x.reshape(shape)
        return jnp.sum(sum(g[:, i] * x[:, i].conj() for i in range(parts)), axis=0)[None, None]
    o, i = g.shape[1], x.shape[1]
    pairs = jnp.einsum("tof,tif->oif", _stack(g), _stack(x), precision="highest")
    real = pairs[:o, :i] + pairs[o:, i:]
    return jax.lax.complex(real, pairs[o:, :i] - pairs[:o, i:])


def _stack(spectra: jax.Array) -> jax.Array:
    """All real parts, then all imaginary parts: `(t, n, f)` to `(t, 2 n, f)`."""
    return jnp.concatenate([spectra.real, spectra.imag], axis=1)
