"""Pure functions on arrays: circulant, block-circulant and circulant-diagonal products.

Every product comes with its dense matrix (`*_matrix`), against which it is tested. Nothing here
knows Flax or any adaptation method.
"""

from circflax.ops._checks import Convention
from circflax.ops._choice import (
    PLATFORMS,
    Form,
    Product,
    Strategy,
    choose_form,
    default_strategy,
    estimate_costs,
)
from circflax.ops._circulant import (
    block_circulant_product,
    block_circulant_products,
    circulant_product,
)
from circflax.ops._circulant_diagonal import (
    circulant_diagonal_matrix,
    circulant_diagonal_product,
)
from circflax.ops._matrix import (
    block_circulant_matrix,
    block_circulant_projection,
    circulant_matrix,
)

__all__ = [
    "PLATFORMS",
    "Convention",
    "Form",
    "Product",
    "Strategy",
    "block_circulant_matrix",
    "block_circulant_product",
    "block_circulant_products",
    "block_circulant_projection",
    "choose_form",
    "circulant_diagonal_matrix",
    "circulant_diagonal_product",
    "circulant_matrix",
    "circulant_product",
    "default_strategy",
    "estimate_costs",
]
