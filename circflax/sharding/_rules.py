"""Which axes of a model's arrays are used in parts: rules over the names of its leaves."""

import re
from collections.abc import Sequence

from jax.sharding import Mesh

from circflax.sharding._mesh import TENSOR, ShardingError

Axes = tuple[str | tuple[str, ...] | None, ...]
"""For each axis of an array, the last ones where it has more, the mesh's axes that cut it up."""

Rule = tuple[str, Axes]
"""A regular expression over whole slash-joined names, and how the leaves it matches are cut up."""

_SPLIT = r"query|key|value|[qkv]_proj|gate_proj|up_proj|fc1|intermediate/dense"
_JOIN = r"output/dense|(self|encoder)_attn/(o|out)_proj|down_proj|fc2"

RULES: tuple[Rule, ...] = (
    # Of two layers in a row the first makes a part of the features and the second reads that part:
    # attention's heads, and the features inside an MLP (Megatron-LM, arXiv 1909.08053, section 3).
    (rf".*/({_SPLIT})/kernel", (None, TENSOR)),
    (rf".*/({_SPLIT})/bias", (TENSOR,)),
    (rf".*/({_JOIN})/kernel", (TENSOR, None)),
    # GPT-2 keeps its kernels with the outputs first.
    (r".*/(c_attn|c_fc)/kernel", (TENSOR, None)),
    (r".*/(c_attn|c_fc)/bias", (TENSOR,)),
    (r".*/c_proj/kernel", (None, TENSOR)),
    (r".*/(word_embeddings|embed_tokens|shared|wte)/embedding", (TENSOR, None)),
    (r"lm_head/kernel", (None, TENSOR)),
)
"""For BERT, RoBERTa, ViT, BEiT, DINOv2, GPT-2, Llama, Mistral, Gemma and BART as `transformers`
names their leaves. Others can be put in front: the first rule that matches a leaf counts."""


def check_rules(rules: Sequence[Rule], mesh: Mesh) -> None:
    """Raises a ShardingError if a pattern is none or names an axis that the mesh lacks."""
    for pattern, axes in rules:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ShardingError(
                f"the rule {pattern!r} is not a regular expression: {error}."
            ) from error
        names = [name for entry in axes for name in names_of(entry)]
        for name in names:
            if name not in mesh.axis_names:
                raise ShardingError(
                    f"the rule {pattern!r} names the axis {name!r}, but the mesh has"
                    f" {', '.join(mesh.axis_names)}."
                )
        if len(set(names)) < len(names):
            raise ShardingError(f"the rule {pattern!r} names an axis of the mesh twice.")


def find_axes(rules: Sequence[Rule], name: str, rank: int) -> Axes:
    """The axes of a leaf's first rule, for each of its own axes; none without a rule.

    Raises:
        ShardingError: if the rule is for arrays with more axes.
    """
    for pattern, axes in rules:
        if re.fullmatch(pattern, name):
            if len(axes) > rank:
                raise ShardingError(
                    f"the rule {pattern!r} is for arrays with {len(axes)} axes, but `{name}` has"
                    f" {rank}."
                )
            # Stacked layers have axes in front, which a rule for one layer leaves alone.
            return (None,) * (rank - len(axes)) + axes
    return (None,) * rank


def names_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh's axes that cut up one axis of an array."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else entry
