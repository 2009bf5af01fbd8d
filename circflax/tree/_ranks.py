"""Ranks by layer, from the spectra of the layers' own weights."""

import dataclasses
import heapq

import jax.numpy as jnp
import numpy as np

from circflax.methods import LaMDA
from circflax.tree._adapters import check_plan
from circflax.tree._paths import Tree, flatten
from circflax.tree._plan import Plan


def allocate_ranks(params: Tree, plan: Plan) -> Plan:
    """Shares out the ranks of a plan's adapters by the spectra of the layers: LaMDA++.

    A rank holds a share of a layer's spectrum: the squares of the kernel's leading singular values
    over the squares of all. One by one, the plan's ranks go to the layer whose share is smallest,
    so that in the end all hold about the same, and layers with flat spectra have higher ranks.
    Every layer gets at least 1. A stack of layers counts as one, by the mean of its spectra.

    Args:
        params: the model's parameters, arrays.
        plan: as it was made for them, all of its adapters of the method LaMDA.

    Returns:
        The plan with other ranks, whose sum is the same.

    Raises:
        ValueError: if an adapter is of another method, or the plan was made for other parameters.

    Source:
        LaMDA (arXiv 2406.12832), on LaMDA++: ranks from normalised spectra. The rule is ours.

    Example:
        >>> import jax.numpy as jnp
        >>> from circflax import AdapterConfig, LaMDA, allocate_ranks, make_plan
        >>> spectra = {"flat": [1.0, 1.0, 1.0, 1.0], "steep": [9.0, 1.0, 1.0, 0.1]}
        >>> params = {name: {"kernel": jnp.diag(jnp.array(s))} for name, s in spectra.items()}
        >>> plan = make_plan(params, AdapterConfig(method=LaMDA(r=2), targets=".*"))
        >>> [(target.name, target.method.r) for target in allocate_ranks(params, plan).targets]
        [('flat', 3), ('steep', 1)]
    """
    leaves = flatten(params)
    check_plan(plan, leaves)
    for target in plan.targets:
        if not isinstance(target.method, LaMDA):
            raise ValueError(
                f"ranks are allocated to adapters of lamda, but {target.name!r} has one of"
                f" {target.method.name}."
            )
    shares = []
    for target in plan.targets:
        matrix = target.layout.matrix(leaves[target.kernel_path]).astype(np.float32)
        squares = np.asarray(jnp.linalg.svd(matrix, compute_uv=False), np.float64) ** 2
        squares = squares.reshape(-1, squares.shape[-1])
        shares.append(np.cumsum(squares / squares.sum(-1, keepdims=True), axis=-1).mean(0))
    ranks = _equal_shares(shares, sum(target.method.r for target in plan.targets))
    targets = [
        dataclasses.replace(target, method=dataclasses.replace(target.method, r=rank))
        for target, rank in zip(plan.targets, ranks, strict=True)
    ]
    return dataclasses.replace(plan, targets=tuple(targets))


def _equal_shares(shares: list[np.ndarray], budget: int) -> list[int]:
    """Ranks with a given sum, at which the smallest of the layers' shares is largest."""
    ranks = [1] * len(shares)
    smallest = [(share[0], number) for number, share in enumerate(shares)]
    heapq.heapify(smallest)
    for _ in range(budget - len(shares)):
        _, number = heapq.heappop(smallest)
        ranks[number] += 1
        # A layer whose rank is full holds all of its spectrum, and takes no more.
        if ranks[number] < len(shares[number]):
            heapq.heappush(smallest, (shares[number][ranks[number] - 1], number))
    return ranks
