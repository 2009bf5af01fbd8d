"""Linen layers with circulant weights, for models built from scratch."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Array, Dtype, Initializer

from circflax import ops


class CirculantDiagonal(nn.Module):
    """A linear layer whose matrix is a product of interleaved diagonals and circulants.

    `y = A_{2m-1} C_{2m-2} ... C_2 A_1 x + bias`, with the structure of `circflax.CDVFT` and about
    `factors * features` parameters instead of `in_features * features`.

    Attributes:
        features: width of the output.
        factors: number of factors, odd.
        p: block size of the first circulant, or None for the smaller of the two widths.
        use_bias: whether to add a bias.
        dtype: of the result, or None for the promoted dtype of input and parameters.
        param_dtype: of the parameters.
        circulant_init: initialiser of the circulants; None draws from a normal distribution whose
            variance keeps the size of the signal.
        diagonal_init: initialiser of the diagonals. Ones keep deep products trainable (Moczulski
            et al., "ACDC", arXiv 1511.05946).
        bias_init: initialiser of the bias.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer = CirculantDiagonal(features=6)
        >>> params = layer.init(jax.random.key(0), jnp.ones((2, 4)))["params"]
        >>> {name: array.shape for name, array in sorted(params.items())}
        {'a1': (4,), 'a3': (6,), 'bias': (6,), 'c2': (2, 1, 4)}
    """

    features: int
    factors: int = 3
    p: int | None = None
    use_bias: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    circulant_init: Initializer | None = None
    diagonal_init: Initializer = nn.initializers.ones
    bias_init: Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `(..., in_features)` to `(..., features)`.

        Raises:
            ValueError: if `factors` is even or not positive.
        """
        if self.factors < 1 or self.factors % 2 == 0:
            raise ValueError(f"`factors` must be odd and positive, but is {self.factors}.")
        in_features = x.shape[-1]
        p = self.p or min(in_features, self.features)
        width, diagonals, circulants = in_features, [], []
        for i in range(1, self.factors + 1):
            if i % 2:
                diagonal = self.param(f"a{i}", self.diagonal_init, (width,), self.param_dtype)
                diagonals.append(diagonal)
                continue
            block = p if i == 2 else self.features
            shape = (-(-self.features // block), -(-width // block), block)
            init = self.circulant_init or nn.initializers.normal(width**-0.5)
            circulants.append(self.param(f"c{i}", init, shape, self.param_dtype))
            width = self.features
        if width != self.features:
            raise ValueError(
                f"one diagonal keeps the width {width}, but `features` is {self.features}."
            )
        y = ops.circulant_diagonal_product(diagonals, circulants, _promoted(x, diagonals[0]))
        return _with_bias(self, y)


class BlockCirculant(nn.Module):
    """A linear layer whose matrix is block-circulant.

    `y = B(c) x + bias`, with `in_features * features / p` parameters in its matrix.

    Attributes:
        features: width of the output.
        p: block size, or None for the smaller of the two widths; where it does not divide a
            width, the last blocks are cut off.
        use_bias: whether to add a bias.
        dtype: of the result, or None for the promoted dtype of input and parameters.
        param_dtype: of the parameters.
        kernel_init: initialiser of the blocks' first columns; None draws from a normal
            distribution whose variance keeps the size of the signal.
        bias_init: initialiser of the bias.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer = BlockCirculant(features=6, p=2)
        >>> params = layer.init(jax.random.key(0), jnp.ones((2, 4)))["params"]
        >>> {name: array.shape for name, array in sorted(params.items())}
        {'bias': (6,), 'c': (3, 2, 2)}
    """

    features: int
    p: int | None = None
    use_bias: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer | None = None
    bias_init: Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `(..., in_features)` to `(..., features)`."""
        in_features = x.shape[-1]
        p = self.p or min(in_features, self.features)
        shape = (-(-self.features // p), -(-in_features // p), p)
        init = self.kernel_init or nn.initializers.normal(in_features**-0.5)
        c = self.param("c", init, shape, self.param_dtype)
        y = ops.block_circulant_product(c, _promoted(x, c), out_features=self.features)
        return _with_bias(self, y)


def _promoted(x: Array, param: Array) -> Array:
    # Products are in the dtype of x; nn.Dense's are in what input and parameters promote to.
    return x.astype(jnp.result_type(x, param))


def _with_bias(layer: Any, y: Array) -> Array:
    # As nn.Dense does: the result is in `dtype`, or in what input and parameters promote to.
    y = y.astype(layer.dtype or y.dtype)
    if layer.use_bias:
        bias = layer.param("bias", layer.bias_init, (layer.features,), layer.param_dtype)
        y = y + bias.astype(y.dtype)
    return y
