"""Interleaved products of diagonal and circulant matrices."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from circflax.ops._checks import check_floating, check_kernel, check_vector
from circflax.ops._choice import Strategy, resolve_strategy
from circflax.ops._form import fitted_product
from circflax.ops._matrix import block_circulant_matrix


def circulant_diagonal_product(
    diagonals: Sequence[jax.Array],
    circulants: Sequence[jax.Array],
    x: jax.Array,
    *,
    strategy: Strategy | None = None,
) -> jax.Array:
    """Applies `A_m C_{m-1} A_{m-1} ... C_1 A_1` to a batch of vectors.

    The `A_j` are diagonal matrices and the `C_j` circulant ones, given by their first column, or
    block-circulant ones. A (block-)circulant factor whose sizes exceed those of its neighbouring
    diagonals acts as its upper left part: its input is padded with zeros and its output cut off.

    Precision and differentiation are as in `block_circulant_product`; reverse mode keeps only the
    arguments, none of the vectors between the factors.

    Args:
        diagonals: the m diagonals, first applied first, of shapes `(n_1,), ..., (n_m,)`.
        circulants: the m - 1 circulant factors, first applied first, each of shape `(n,)` or
            `(out_blocks, in_blocks, block)`.
        x: shape `(..., n_1)`, floating.
        strategy: how to compute it; None chooses by shape, dtype and platform.

    Returns:
        Shape `(..., n_m)`, in the dtype of `x`.

    Raises:
        ValueError: if the counts or the shapes do not fit or the strategy is unknown.
        TypeError: if an argument is not of a real floating dtype.

    Source:
        CDVFT (arXiv 2505.00580), equation 4; Huhtanen and Perämäki, "Factoring matrices into the
        product of circulant and diagonal matrices" (2015).

    Example:
        >>> import jax.numpy as jnp
        >>> from circflax import ops
        >>> a1, c, a3 = jnp.array([1.0, 2.0]), jnp.array([0.0, 1.0]), jnp.array([1.0, 10.0])
        >>> print(ops.circulant_diagonal_product([a1, a3], [c], jnp.array([3.0, 5.0])))
        [10. 30.]
    """
    strategy = resolve_strategy(strategy)
    check_floating(x=x)
    diagonals, kernels = _checked(diagonals, circulants)
    if x.ndim < 1 or x.shape[-1] != diagonals[0].size:
        raise ValueError(
            f"the first diagonal multiplies vectors of length {diagonals[0].size}, but `x` has"
            f" shape {x.shape}."
        )
    return _product(diagonals, kernels, x, strategy)


@partial(jax.jit, static_argnums=3)
def _product(
    diagonals: list[jax.Array],
    kernels: list[jax.Array],
    x: jax.Array,
    strategy: Strategy | None,
) -> jax.Array:
    def chain(diagonals: list[jax.Array], kernels: list[jax.Array], x: jax.Array) -> jax.Array:
        right = diagonals[0]
        for kernel, left in zip(kernels, diagonals[1:], strict=True):
            x = fitted_product(kernel, x, left, right, strategy)
            right = None
        return x

    if not kernels:
        return (x * diagonals[0]).astype(x.dtype)
    if len(kernels) > 1:
        # The products between are computed again in the backward pass, not kept.
        chain = jax.checkpoint(chain)
    return chain(diagonals, kernels, x)


@jax.jit
def circulant_diagonal_matrix(
    diagonals: Sequence[jax.Array], circulants: Sequence[jax.Array]
) -> jax.Array:
    """The dense matrix `A_m C_{m-1} A_{m-1} ... C_1 A_1`.

    Args:
        diagonals: as in `circulant_diagonal_product`.
        circulants: as in `circulant_diagonal_product`.

    Returns:
        Shape `(n_m, n_1)`, in the promoted dtype of the arguments.

    Raises:
        ValueError: if the counts or the shapes do not fit.
        TypeError: if an argument is not of a real floating dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> from circflax import ops
        >>> a1, c, a3 = jnp.array([1.0, 2.0]), jnp.array([0.0, 1.0]), jnp.array([1.0, 10.0])
        >>> print(ops.circulant_diagonal_matrix([a1, a3], [c]))
        [[ 0.  2.]
         [10.  0.]]
    """
    diagonals, kernels = _checked(diagonals, circulants)
    if not kernels:
        return jnp.diag(diagonals[0])
    product = None
    for kernel, before, after in zip(kernels, diagonals, diagonals[1:], strict=False):
        circulant = block_circulant_matrix(kernel)[: after.size, : before.size]
        # The left diagonal of a factor is the right one of the next: scale by it once.
        factor = after[:, None] * circulant
        if product is None:
            product = factor * before
        else:
            product = jnp.matmul(factor, product, precision="highest")
    return product


def _checked(
    diagonals: Sequence[jax.Array], circulants: Sequence[jax.Array]
) -> tuple[list[jax.Array], list[jax.Array]]:
    """The factors, circulants as block kernels, once their counts and shapes are known to fit."""
    diagonals, circulants = list(diagonals), list(circulants)
    if len(diagonals) != len(circulants) + 1:
        raise ValueError(
            "an interleaved product has one diagonal more than circulants, but was given"
            f" {len(diagonals)} diagonals and {len(circulants)} circulants."
        )
    check_floating(
        **{f"diagonals[{i}]": d for i, d in enumerate(diagonals)},
        **{f"circulants[{i}]": c for i, c in enumerate(circulants)},
    )
    kernels = [c[None, None] if c.ndim == 1 else c for c in circulants]
    for i, diagonal in enumerate(diagonals):
        check_vector(diagonal, f"diagonals[{i}]")
    for i, kernel in enumerate(kernels):
        check_kernel(kernel, f"circulants[{i}]")
        rows, columns = kernel.shape[0] * kernel.shape[2], kernel.shape[1] * kernel.shape[2]
        if rows < diagonals[i + 1].size or columns < diagonals[i].size:
            raise ValueError(
                f"`circulants[{i}]` is a matrix of {rows} x {columns}, too small for diagonals of"
                f" lengths {diagonals[i].size} before and {diagonals[i + 1].size} after it."
            )
    return diagonals, kernels
