"""Rows of softmax and loss that are divided over ranks: what the ranks exchange to know the whole row.

Megatron-LM's parallel cross entropy (arXiv 1909.08053, section 3) reduces a row's maximum, its target's logit and its
sum of exponentials; DTensor's loss_parallel sends the same three.
"""

from __future__ import annotations

from cosim.graph import OpGraph, OpKind, TensorSpec
from cosim.parallel.layout import TENSOR_AXES, base

_NUMBERS_PER_ROW = {
    "aten._softmax": 2,
    "aten._safe_softmax": 2,
    "aten._log_softmax": 2,
    "aten.nll_loss_forward": 1,
    "cosim.cross_entropy": 3,
}


def row_statistics(graph: OpGraph, kind: OpKind) -> list[tuple[TensorSpec, int]]:
    """(A tensor with a number per row, how many such tensors are reduced) for an op, or for each member of a fused one,
    whose rows are along an axis that tensor parallelism divides.
    """
    found: list[tuple[TensorSpec, int]] = []
    for member in (kind, *(graph.kinds[number] for number in kind.attribute("members", ()))):
        count = _NUMBERS_PER_ROW.get(member.target, 0)
        spec = graph.specs[member.inputs[0]] if count else None
        if spec and spec.dims and any(base(axis) in TENSOR_AXES for axis in spec.dims[-1]):
            found.append((TensorSpec(spec.dims[:-1], "fp32", 4), count))
    return found
