"""How a tensor of the step lies over the ranks of one replica, and what its shape is on one of them.

A tensor's layout is a set of flags. Axes that tensor and expert parallelism divide (heads, ffn, vocabulary, experts)
are divided in every tensor that has them, so that they need no flag: their local size is bound once for the whole
graph. A flag renames axes of the one tensor that has it: the sequence of a sequence-parallel activation is the axis
`sequence_shard`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cosim.graph import Axis, Dim, TensorSpec
from hwmodels.units import InputError

TENSOR_AXES = ("heads", "kv_heads", "ffn", "vocabulary")
"""Axes that tensor parallelism divides, by their names; a second axis of a name has a number (`ffn_2`). A rank's part
of the vocabulary is rounded up, as its owner pads the table."""
EXPERTS = "experts"
SEQUENCE = "sequence"

Layout = int
"""A sum of the flags below; plain integers, since a step has ten thousands of tensors."""
WHOLE = 0  # whole, or divided along tensor-parallel axes
PARTIAL = 1  # a term of a sum over the tensor-parallel group
SHARD = 2  # sequence parallel: a slice along the sequence
EXPERT = 4  # rows of tokens that were sent to the experts of this rank
ARRIVED = 8  # such rows before the ranks that share an expert's matrices have gathered each other's
CONTEXT = 16  # keys and values of the whole sequence, of which a context-parallel rank holds a slice
HEADS = 32  # the whole sequence and a slice of the heads (all-to-all context parallelism)
RING = 64  # the two parts of those that a rank holds at a time where they go around
PENDING = 128  # a sum of which some terms are not reduced yet: it is in no memory

SHAPING = SHARD | EXPERT | ARRIVED | CONTEXT | HEADS | RING
"""The flags that decide a tensor's shape on a rank."""
_RENAMED: Mapping[Layout, Mapping[Axis, Axis]] = {
    SHARD: {SEQUENCE: "sequence_shard"},
    EXPERT: {SEQUENCE: "expert_sequence"},
    ARRIVED: {SEQUENCE: "arrived_sequence"},
    CONTEXT: {SEQUENCE: "context_sequence"},
    RING: {SEQUENCE: "ring_sequence"},
    HEADS: {SEQUENCE: "context_sequence", "heads": "context_heads", "kv_heads": "context_kv_heads"},
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
    keeps_gathered: bool = False  # backward reads what forward gathered (DTensor), instead of gathering it again
    vocabulary_multiple: int = 1  # a rank's part of the vocabulary is padded to a multiple of this

    @property
    def trivial(self) -> bool:
        return self.tensor == self.context == self.expert == self.expert_tensor == 1

    @property
    def routed(self) -> bool:
        """Whether rows of tokens travel between ranks on their way to the experts and back."""
        return self.expert > 1 or (self.expert_tensor > 1 and not self.experts_like_dense)

    @property
    def experts_like_dense(self) -> bool:
        """Whether each expert's matrices are cut over ranks that hold the same tokens, as those of a dense MLP."""
        return self.expert == 1 and self.expert_tensor == self.tensor and not self.sequence


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
        if flag & layout:
            names.update(renamed)
    if layout & EXPERT or has(spec, EXPERTS):
        names.update({axis: f"expert_{axis}" for dim in spec.dims for axis in dim if base(axis) == "ffn"})
    if not names:
        return spec
    dims: tuple[Dim, ...] = tuple(tuple(names.get(axis, axis) for axis in dim) for dim in spec.dims)
    return TensorSpec(dims, spec.dtype, spec.itemsize, spec.expanded)


def has(spec: TensorSpec, *names: Axis) -> bool:
    """Whether a dimension of `spec` has one of these axes as a factor."""
    return any(base(axis) in names for dim in spec.dims for axis in dim)


def copies_of_kv_heads(axes: Mapping[Axis, int], tensor: int) -> int:
    """How many tensor-parallel ranks hold the same key and value heads: more than one where they are fewer than ranks
    (the rule of vLLM's QKVParallelLinear, vllm/model_executor/layers/linear.py).
    """
    sizes = [size for axis, size in axes.items() if base(axis) == "kv_heads"]
    return max((tensor // size for size in sizes if size and tensor % size == 0), default=1) or 1


def local_axes(axes: Mapping[Axis, int], sharding: Sharding, parameters: Iterable[TensorSpec] = ()) -> dict[Axis, int]:
    """The sizes of all axes on one rank, renamed ones included; `parameters` are the layouts of the model's.

    Raises InputError: an axis that is not divisible by its degree.
    """
    local = dict(axes)
    if sharding.context > 1 and SEQUENCE not in axes:
        raise InputError(
            f"parallel.context: {sharding.context} parts of a sequence that this model's step does not have"
        )
    sequence = _divided(axes, SEQUENCE, sharding.context, "parallel.context")
    shard = sequence
    if sharding.tensor > 1 and (sharding.sequence or sharding.routed) and SEQUENCE in axes:
        shard = _divided({SEQUENCE: sequence}, SEQUENCE, sharding.tensor, "parallel.tensor")
    local[SEQUENCE], local["sequence_shard"] = sequence, shard
    local["context_sequence"] = axes.get(SEQUENCE, 1)
    local["ring_sequence"] = min(local["context_sequence"], 2 * sequence)
    busiest = shard * (sharding.imbalance if sharding.expert > 1 else 1.0)
    local["arrived_sequence"] = max(1, round(busiest))
    local["expert_sequence"] = max(1, round(busiest * (sharding.expert_tensor if sharding.routed else 1)))
    if "vocabulary" in axes:
        parts = sharding.tensor * sharding.vocabulary_multiple
        local["vocabulary"] = -(-axes["vocabulary"] // parts) * sharding.vocabulary_multiple
    for axis in axes:
        if base(axis) in ("heads", "ffn"):
            local[axis] = _divided(axes, axis, sharding.tensor, "parallel.tensor")
        if base(axis) == "ffn":
            local[f"expert_{axis}"] = _divided(axes, axis, sharding.expert_tensor, "parallel.expert_tensor")
        if base(axis) == EXPERTS:
            local[axis] = _divided(axes, axis, sharding.expert, "parallel.expert")
    local |= _kv_heads(axes, sharding.tensor, parameters)
    if sharding.context_by == "all_to_all" and sharding.context > 1:
        for axis in ("heads", "kv_heads"):
            if axis in local:
                local[f"context_{axis}"] = _divided(local, axis, sharding.context, "parallel.context")
    return local


def _kv_heads(axes: Mapping[Axis, int], tensor: int, parameters: Iterable[TensorSpec]) -> dict[Axis, int]:
    """Key and value heads of a rank: its part of them, or one that other ranks hold too."""
    found: dict[Axis, int] = {}
    copies = copies_of_kv_heads(axes, tensor)
    for axis in (axis for axis in axes if base(axis) == "kv_heads"):
        if axes[axis] % tensor == 0 or copies == 1:
            found[axis] = _divided(axes, axis, tensor, "parallel.tensor")
            continue
        beside = {other for spec in parameters for dim in spec.dims if axis in dim for other in dim}
        if beside - {axis, "groups", "head_dim"} or axes.get("groups", copies) % copies:
            raise InputError(
                f"parallel.tensor: {tensor} is more than the {axes[axis]} heads of keys and values, which the model "
                "packs together with its queries; allowed: what divides them"
            )
        found[axis] = 1
        if "groups" in axes:
            found["groups"] = axes["groups"] // copies
    return found


def _divided(axes: Mapping[Axis, int], axis: Axis, parts: int, key: str) -> int:
    size = axes.get(axis, 1)
    if axis in axes and size % parts:
        raise InputError(f"{key}: {parts} does not divide the {size} of the model's axis {axis}")
    return max(1, size // parts)
