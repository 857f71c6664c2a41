"""Attention where the ranks of a context-parallel group hold slices of the sequence.

Every rank holds an early and a late slice (zigzag), so that causal attention is the same work everywhere.
"""

from __future__ import annotations

from cosim.graph import OpGraph, OpKind
from cosim.parallel.layout import CONTEXT, HEADS, RING, SEQUENCE, WHOLE
from cosim.parallel.rewriting import NOWHERE, Operand
from cosim.parallel.walk import Walk
from hwmodels.units import InputError


def check_context(graph: OpGraph) -> None:
    """Raises InputError where attention is not one operator: scores of all pairs of tokens would be divided wrongly."""
    for spec in graph.specs:
        if sum(SEQUENCE in dim for dim in spec.dims) > 1:
            raise InputError(
                "parallel.context: this model's attention is not one operator (training.attention unfused, or trained "
                "biases of scores), and its scores are not divided; allowed: 1"
            )


def attention(walk: Walk, op: int, kind: OpKind, inputs: list[int], outputs: list[int]) -> None:
    """Write attention over the whole sequence, with what its rank must get before and give away after."""
    if walk.sharding.context_by == "all_to_all":
        _by_heads(walk, op, kind, inputs, outputs)
    else:
        _by_keys(walk, op, kind, inputs, outputs)


def _by_keys(walk: Walk, op: int, kind: OpKind, inputs: list[int], outputs: list[int]) -> None:
    """Keys and values come from all ranks, at once or around a ring; their gradients go back the same way."""
    backward = kind.op_class == "attention_backward"
    ring, writer, scope = walk.sharding.context_by == "ring", walk.writer, walk.scope(op)
    keys = inputs[1 + backward : 3 + backward]
    operands: list[Operand] = []
    for tensor in inputs:
        if tensor not in keys:
            operands.append((tensor, walk.layout[tensor], NOWHERE))
            continue
        sliced, made = writer.tensor(tensor, walk.layout[tensor]), writer.result(tensor, CONTEXT, scope)
        if ring:
            writer.holds(tensor, CONTEXT, scope, RING)
        writer.communicate("all_gather", "context", op, [sliced], [made], ring)
        operands.append((tensor, CONTEXT, scope))
    made_for_all = outputs[1:3] if backward else []
    for tensor in outputs:
        walk.layout[tensor] = WHOLE
    writer.op(op, operands, [(t, CONTEXT if t in made_for_all else WHOLE) for t in outputs])
    for tensor, layout, gathered in operands:
        if gathered >= 0:
            writer.ends(tensor, layout, gathered)
    for tensor in made_for_all:
        whole, own = writer.tensor(tensor, CONTEXT), writer.tensor(tensor, WHOLE)
        if ring:
            writer.holds(tensor, CONTEXT, NOWHERE, RING)
        writer.communicate("reduce_scatter", "context", op, [whole], [own], ring)
        writer.ends(tensor, CONTEXT)


def _by_heads(walk: Walk, op: int, kind: OpKind, inputs: list[int], outputs: list[int]) -> None:
    """Sequence is exchanged for heads before attention and back after it; what backward needs is kept exchanged."""
    backward, writer = kind.op_class == "attention_backward", walk.writer
    for tensor in inputs[:4] if backward else inputs[:3]:
        if walk.layout[tensor] & HEADS:
            continue
        before = writer.tensor(tensor, walk.layout[tensor])
        walk.move(tensor, HEADS)
        writer.communicate("all_to_all", "context", op, [before], [writer.result(tensor, HEADS)])
        writer.ends(tensor, WHOLE)
    heads = [(tensor, HEADS if walk.has_sequence(tensor) else WHOLE) for tensor in outputs]
    writer.op(op, [(tensor, HEADS, NOWHERE) for tensor in inputs], heads)
    for number, (tensor, layout) in enumerate(heads):
        walk.layout[tensor] = layout
        if layout and (backward or number == 0):
            walk.layout[tensor] = WHOLE
            sent, own = writer.tensor(tensor, HEADS), writer.tensor(tensor, WHOLE)
            writer.communicate("all_to_all", "context", op, [sent], [own])
            if backward:
                writer.ends(tensor, HEADS)
