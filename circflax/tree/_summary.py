"""What a plan trains, in numbers."""

import math
from dataclasses import dataclass

import jax

from circflax.tree._paths import Tree, flatten, join, starred
from circflax.tree._plan import Plan, bytes_of


@dataclass(frozen=True)
class SummaryRow:
    """Layers that differ only in their numbers, or leaves trained in full likewise.

    Attributes:
        name: their name, numbers replaced by `*`.
        method: the adapter's method, or "full".
        shape: what one of them looks like, `in x out` for a layer.
        count: how many there are.
        parameters: how many parameters of all of them train.
    """

    name: str
    method: str
    shape: str
    count: int
    parameters: int


@dataclass(frozen=True)
class Summary:
    """What trains and how much of the model that is; printing it gives a table.

    Attributes:
        rows: the layers and leaves, grouped.
        targets: number of adapted layers.
        adapter_parameters: parameters of the adapters.
        trained_parameters: parameters of the leaves trained in full.
        base_parameters: parameters of the base model, trained leaves included.
        trainable_bytes: size of the small tree in float32, its arrays that never train included.
        base_bytes: size of the base model as it is.
    """

    rows: tuple[SummaryRow, ...]
    targets: int
    adapter_parameters: int
    trained_parameters: int
    base_parameters: int
    trainable_bytes: int
    base_bytes: int

    @property
    def trainable_parameters(self) -> int:
        """Adapters and leaves trained in full together."""
        return self.adapter_parameters + self.trained_parameters

    @property
    def percent(self) -> float:
        """Trainable parameters as a percentage of the adapted model's."""
        return 100 * self.trainable_parameters / (self.base_parameters + self.adapter_parameters)

    def __str__(self) -> str:
        width = max([len(row.name) for row in self.rows] + [6])
        shape = max([len(row.shape) for row in self.rows] + [13])
        sizes = max([len(f"{row.parameters:,}") for row in self.rows] + [11])
        width = min(width, 64 - shape - sizes)
        lines = [
            f"{'module':{width}}  {'method':6} {'shape':>{shape}} {'count':>5}"
            f" {'parameters':>{sizes}}"
        ]
        for row in self.rows:
            name = row.name if len(row.name) <= width else "…" + row.name[-(width - 1) :]
            lines.append(
                f"{name:{width}}  {row.method:6} {row.shape:>{shape}} {row.count:>5}"
                f" {row.parameters:>{sizes},}"
            )
        lines.append("")
        lines.append(
            f"{self.targets} layers adapted; {self.trainable_parameters:,} of"
            f" {self.base_parameters + self.adapter_parameters:,} parameters train"
            f" ({self.percent:.3f} %)"
        )
        lines.append(
            f"adapters {self.adapter_parameters:,}, in full {self.trained_parameters:,};"
            f" {human_bytes(self.trainable_bytes)} beside a base of {human_bytes(self.base_bytes)}"
        )
        return "\n".join(lines)


def summarize(params: Tree, plan: Plan) -> Summary:
    """Counts what a plan trains.

    Args:
        params: the model's parameters, arrays or `jax.ShapeDtypeStruct`s.
        plan: as `make_plan` found it.

    Returns:
        The summary, which prints as a table of at most 80 columns.

    Example:
        >>> import jax.numpy as jnp
        >>> from circflax import C3A, AdapterConfig, make_plan, summarize
        >>> params = {str(i): {"query": {"kernel": jnp.zeros((64, 64))}} for i in range(2)}
        >>> plan = make_plan(params, AdapterConfig(method=C3A(), targets=("query",)))
        >>> print(summarize(params, plan))
        module   method         shape count  parameters
        */query  c3a          64 x 64     2         128
        <BLANKLINE>
        2 layers adapted; 128 of 8,320 parameters train (1.538 %)
        adapters 128, in full 0; 512 B beside a base of 32.8 kB
    """
    leaves = flatten(params)
    groups: dict[tuple[str, str, str], list[int]] = {}
    targets = 0
    for target in plan.targets:
        count = math.prod(target.layers)
        targets += count
        key = (
            starred(target.name),
            target.method.name,
            f"{target.in_features} x {target.out_features}",
        )
        groups.setdefault(key, []).extend([target.parameter_count // count] * count)
    adapters = sum(map(sum, groups.values()))
    for path in plan.trained:
        shape = leaves[path].shape
        key = (starred(join(path)), "full", " x ".join(map(str, shape)) or "scalar")
        groups.setdefault(key, []).append(math.prod(shape))
    trained = sum(map(sum, groups.values())) - adapters
    return Summary(
        rows=tuple(SummaryRow(*key, len(sizes), sum(sizes)) for key, sizes in groups.items()),
        targets=targets,
        adapter_parameters=adapters,
        trained_parameters=trained,
        base_parameters=sum(math.prod(leaf.shape) for leaf in leaves.values()),
        trainable_bytes=4 * trained
        + sum(bytes_of(shape) for target in plan.targets for shape in target.shapes.values()),
        base_bytes=sum(bytes_of(leaf) for leaf in jax.tree.leaves(leaves)),
    )


def human_bytes(size: int) -> str:
    """A number of bytes with a decimal unit, three significant digits.

    Example:
        >>> human_bytes(90_900_000)
        '90.9 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
