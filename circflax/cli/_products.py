"""How an adapter's circulant products are computed, and what each way would cost."""

import itertools
import math
from collections import Counter
from typing import get_args

import jax.numpy as jnp

from circflax import ops
from circflax.tree import Plan


def show_products(plan: Plan, tokens: int) -> None:
    """Prints the estimated time of each strategy, by kernel, platform and dtype.

    Args:
        plan: the adapter's.
        tokens: of a training step.

    Raises:
        ValueError: if there are no tokens.
    """
    if tokens < 1:
        raise ValueError(f"`--tokens` must be a positive number, but is {tokens}.")
    kernels = Counter(
        kernel
        for target in plan.targets
        for kernel in target.method.kernels(target.in_features, target.out_features)
        for _ in range(math.prod(target.layers))
    )
    if not kernels:
        print("no adapter here multiplies by circulants.")
        return
    strategies = get_args(ops.Strategy)
    print(f"estimated ms of one product with its gradients, {tokens:,} tokens; * is chosen")
    for (out_blocks, in_blocks, block), count in kernels.items():
        print(f"\n{count} × {out_blocks} × {in_blocks} blocks of {block}")
        print("  platform  dtype   " + "".join(f"{name:>10}" for name in strategies))
        for platform, dtype in itertools.product(ops.PLATFORMS, ("float32", "bfloat16")):
            product = ops.Product(tokens, out_blocks, in_blocks, block, jnp.dtype(dtype), platform)
            chosen, costs = ops.choose_form(product), ops.estimate_costs(product)
            cells = []
            for strategy in strategies:
                best = min((c for f, c in costs.items() if f.strategy == strategy), default=None)
                star = "*" if strategy == chosen.strategy else " "
                runs = best is not None and math.isfinite(best)
                cells.append(f"{1e3 * best:9.3g}{star}" if runs else f"{'–':>9} ")
            print(f"  {platform:8}  {dtype:8}" + "".join(cells))
