"""How a tensor of the step lies over the ranks of one replica, and what its shape is on one of them.

A tensor's layout is a set of flags. Axes that tensor and expert parallelism divide (heads, ffn, vocabulary, experts)
are divided in every tensor that has them, so that they need no flag: their local size is bound once for the whole
graph. A flag renames axes of the one tensor that has it: the sequence of a sequence-parallel activation is the axis
`sequence_shard`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntFlag

from cosim.graph import Axis, Dim, TensorSpec
from hwmodels.units import InputError

TENSOR_AXES = ("heads", "kv_heads", "ffn", "vocabulary")
"""Axes that tensor parallelism divides, by their names; a second axis of a name has a number (`ffn_2`). A rank's part
of the vocabulary is rounded up, as its owner pads the table."""
EXPERTS = "experts"
SEQUENCE = "sequence"


class Layout(IntFlag):
    """What is special about a tensor on one rank; 0: whole, or divided along tensor-parallel axes."""

    WHOLE = 0
    PARTIAL = 1  # a term of a sum over the tensor-parallel group
    SHARD = 2  # sequence parallel: a slice along the sequence
    EXPERT = 4  # tokens that were sent to the experts of this rank
    CONTEXT = 8  # keys and values of the whole sequence, of which a context-parallel rank holds a slice
    HEADS = 16  # the whole sequence and a slice of the heads (all-to-all context parallelism)


_SHAPING = Layout.SHARD | Layout.EXPERT | Layout.CONTEXT | Layout.HEADS
_RENAMED: Mapping[Layout, Mapping[Axis, Axis]] = {
    Layout.SHARD: {SEQUENCE: "sequence_shard"},
    Layout.EXPERT: {SEQUENCE: "expert_sequence"},
    Layout.CONTEXT: {SEQUENCE: "context_sequence"},
    Layout.HEADS: {SEQUENCE: "context_sequence", "heads": "context_heads", "kv_heads": "context_kv_heads"},
}


@dataclass(frozen=True, slots=True)
class Sharding:
    """Into how many parts one replica's step is cut, and how.

    `sequence`: activations between tensor-parallel regions are cut along the sequence (Korthikanti et al. 2022, arXiv
    2205.05198). `context_by` is how attention sees the whole sequence: "all_gather" of keys and values (Llama 3, arXiv
    2407.21783), "ring" (Liu et al. 2023, arXiv 2310.01889) or "all_to_all" (Jacobs et al. 2023, arXiv 2309.14509).
    `imbalance` is the tokens of the busiest rank's experts over the mean.
    """

    tensor: int = 1
    sequence: bool = False
    context: int = 1
    context_by: str = "ring"
    expert: int = 1
    expert_tensor: int = 1
    imbalance: float = 1.0
    vocabulary_multiple: int = 1  # a rank's part of the vocabulary is padded to a multiple of this

    @property
    def trivial(self) -> bool:
        return self.tensor == self.context == self.expert == 1


def shape_flags(layout: Layout) -> Layout:
    """The flags of `layout` that decide a tensor's shape on a rank."""
    return layout & _SHAPING


def base(axis: Axis) -> Axis:
    """The name of an axis without the number that tells it from others of that name.

    The second vocabulary (of token types, of classes) is as small as that every rank holds it.
    """
    stem, _, number = axis.rpartition("_")
    return stem if number.isdigit() and stem in ("heads", "kv_heads", "ffn", EXPERTS) else axis


def rewritten(spec: TensorSpec, layout: Layout) -> TensorSpec:
    """`spec` as a tensor with this layout has it; `ffn` of experts is an axis of its own."""
    names: dict[Axis, Axis] = {}
    for flag, renamed in _RENAMED.items():
        if flag in layout:
            names.update(renamed)
    if Layout.EXPERT in layout or has(spec, EXPERTS):
        names.update({axis: f"expert_{axis}" for dim in spec.dims for axis in dim if base(axis) == "ffn"})
    if not names:
        return spec
    dims: tuple[Dim, ...] = tuple(tuple(names.get(axis, axis) for axis in dim) for dim in spec.dims)
    return TensorSpec(dims, spec.dtype, spec.itemsize, spec.expanded)


def has(spec: TensorSpec, *names: Axis) -> bool:
    """Whether a dimension of `spec` has one of these axes as a factor."""
    return any(base(axis) in names for dim in spec.dims for axis in dim)


def local_axes(axes: Mapping[Axis, int], sharding: Sharding) -> dict[Axis, int]:
    """The sizes of all axes on one rank, renamed ones included.

    Raises InputError: an axis that is not divisible by its degree.
    """
    local = dict(axes)
    sequence = _divided(axes, SEQUENCE, sharding.context, "parallel.context")
    shard = sequence
    if sharding.sequence and sharding.tensor > 1:
        shard = _divided({SEQUENCE: sequence}, SEQUENCE, sharding.tensor, "parallel.tensor")
    local[SEQUENCE], local["sequence_shard"] = sequence, shard
    local["context_sequence"] = axes.get(SEQUENCE, 1)
    local["expert_sequence"] = max(1, round(shard * sharding.expert_tensor * sharding.imbalance))
    if "vocabulary" in axes:
        parts = sharding.tensor * sharding.vocabulary_multiple
        local["vocabulary"] = -(-axes["vocabulary"] // parts) * sharding.vocabulary_multiple
    for axis in axes:
        if base(axis) in ("heads", "kv_heads", "ffn"):
            local[axis] = _divided(axes, axis, sharding.tensor, "parallel.tensor")
        if base(axis) == "ffn":
            local[f"expert_{axis}"] = _divided(axes, axis, sharding.expert_tensor, "parallel.expert_tensor")
        if base(axis) == EXPERTS:
            local[axis] = _divided(axes, axis, sharding.expert, "parallel.expert")
    if sharding.context_by == "all_to_all" and sharding.context > 1:
        for axis in ("heads", "kv_heads"):
            if axis in local:
                local[f"context_{axis}"] = _divided(local, axis, sharding.context, "parallel.context")
    return local


def _divided(axes: Mapping[Axis, int], axis: Axis, parts: int, key: str) -> int:
    size = axes.get(axis, 1)
    if axis in axes and size % parts:
        raise InputError(f"{key}: {parts} does not divide the {size} of the model's axis {axis}")
    return max(1, size // parts)
