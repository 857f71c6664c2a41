"""Experts: rows of tokens go to the ranks that hold their experts, are worked on there, and come back.

Where `parallel.sequence` is on, or tensor parallelism is not, every rank of a stage has tokens of its own. Where
tensor-parallel ranks hold the same tokens, each sends its share of them and the results are gathered (DeepSpeed,
deepspeed/moe/mappings.py: drop_tokens, gather_tokens). Expert tensor parallelism gathers the rows of the ranks that
share an expert's matrices and reduce-scatters their results (Megatron-LM's all-to-all dispatcher), except where those
ranks are the tensor-parallel ones and hold the same tokens: then experts are cut as a dense MLP is.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cosim.graph import OpGraph, OpKind
from cosim.parallel.layout import ARRIVED, EXPERT, PARTIAL, SHARD, WHOLE, Layout
from cosim.parallel.rewriting import NOWHERE, Operand
from cosim.parallel.walk import Walk

GROUPED = ("cosim.grouped_mm", "cosim.grouped_mm_weight", "aten._grouped_mm")
_AMONG_ROWS = ("pointwise", "copy", "view", "random", "quantize")
_OF_TABLES = ("matmul", "gather", "scatter", "reduction")


@dataclass(slots=True)
class ExpertParallel:
    """The part of a walk that concerns experts."""

    walk: Walk
    _bound: set[int] = field(init=False)

    def __post_init__(self) -> None:
        self._bound = bound_for_experts(self.walk.graph)

    def has(self, kind: OpKind, inputs: list[int], outputs: list[int]) -> bool:
        """Whether the op works on rows that are with the experts: their products, and what stays among such rows."""
        walk = self.walk
        if kind.target in GROUPED or (kind.op_class == "quantize" and not self._bound.isdisjoint(outputs)):
            return True
        if kind.op_class in _OF_TABLES and any(walk.experts[walk.spec[t]] for t in (*inputs, *outputs)):
            return any(walk.has_sequence(tensor) for tensor in (*inputs, *outputs))
        rows = [bool(walk.layout[tensor] & EXPERT) for tensor in inputs if walk.has_sequence(tensor)]
        return any(rows) and all(rows) and kind.op_class in _AMONG_ROWS

    def visit(self, op: int, kind: OpKind, inputs: list[int], outputs: list[int]) -> None:
        """Write an op of experts, its operands sent to them before."""
        walk = self.walk
        for tensor in inputs:
            if walk.floating[walk.spec[tensor]] and walk.has_sequence(tensor) and not walk.layout[tensor] & EXPERT:
                self._send(op, tensor)
        operands = [self._operand(tensor) for tensor in inputs]
        term = kind.op_class in _OF_TABLES and any(walk.divided(tensor) for tensor in inputs)
        passed = 0 if kind.op_class in _OF_TABLES else PARTIAL
        for tensor in outputs:
            layout = EXPERT if walk.has_sequence(tensor) else WHOLE
            if term and layout and not walk.divided(tensor) and walk.floating[walk.spec[tensor]]:
                layout |= PARTIAL
            for source in inputs:
                layout |= walk.layout[source] & passed
            walk.layout[tensor] = layout
        if kind.op_class in ("view", "copy") and len(inputs) == 1:
            for tensor in outputs:
                walk.joins(tensor, inputs[0])
        walk.writer.op(op, operands, [(tensor, walk.layout[tensor]) for tensor in outputs])

    def leaves(self, op: int, kind: OpKind, inputs: list[int]) -> None:
        """Rows that another op reads go back first."""
        walk = self.walk
        for tensor in inputs:
            if walk.layout[tensor] & EXPERT and not walk.experts[walk.spec[tensor]] and kind.op_class != "fill":
                self._return(op, tensor)

    def _operand(self, tensor: int) -> Operand:
        """Indices of rows go with them: a rank knows which experts it has."""
        walk = self.walk
        if walk.has_sequence(tensor) and not walk.layout[tensor] & EXPERT:
            walk.layout[tensor] = EXPERT
        return tensor, walk.layout[tensor], NOWHERE

    def _home(self) -> Layout:
        sharding = self.walk.sharding
        return SHARD if sharding.sequence and sharding.tensor > 1 else WHOLE

    def _send(self, op: int, tensor: int) -> None:
        """Rows go to the ranks that hold their experts (dispatch)."""
        walk, sharding, writer = self.walk, self.walk.sharding, self.walk.writer
        layout = walk.layout[tensor]
        walk.move(tensor, EXPERT)
        if not sharding.routed:
            writer.renames(tensor, layout, EXPERT)
            return
        after = writer.result(tensor, EXPERT)
        before = writer.tensor(tensor, layout)
        if sharding.tensor > 1 and not layout & SHARD:
            before = writer.part(tensor, layout, SHARD)
        if sharding.expert > 1:
            arrived = after if sharding.expert_tensor == 1 else writer.tensor(tensor, ARRIVED)
            writer.communicate("all_to_all", "expert", op, [before], [arrived])
            writer.ends(tensor, layout)
            before = arrived
        if sharding.expert_tensor > 1:
            writer.communicate("all_gather", "expert_tensor", op, [before], [after])
            writer.ends(tensor, ARRIVED if sharding.expert > 1 else layout)

    def _return(self, op: int, tensor: int) -> None:
        """Rows go back to the ranks that they came from (combine), summed where experts' matrices are divided."""
        walk, sharding, writer = self.walk, self.walk.sharding, self.walk.writer
        layout, home = walk.layout[tensor], self._home()
        walk.move(tensor, home)
        if not sharding.routed:
            after = writer.renames(tensor, EXPERT, home)
            if layout & PARTIAL:
                writer.communicate("all_reduce", "tensor", op, [after], [after])
            return
        before = writer.tensor(tensor, EXPERT)
        gathers = sharding.tensor > 1 and home == WHOLE
        target = writer.result(tensor, SHARD if gathers else home)
        if sharding.expert_tensor > 1:
            arrived = writer.tensor(tensor, ARRIVED) if sharding.expert > 1 else target
            writer.communicate("reduce_scatter", "expert_tensor", op, [before], [arrived])
            writer.ends(tensor, EXPERT)
            before = arrived
        if sharding.expert > 1:
            writer.communicate("all_to_all", "expert", op, [before], [target])
            writer.ends(tensor, ARRIVED if sharding.expert_tensor > 1 else EXPERT)
        if gathers:
            writer.communicate("all_gather", "tensor", op, [target], [writer.tensor(tensor, home)])
            writer.ends(tensor, SHARD)


def bound_for_experts(graph: OpGraph) -> set[int]:
    """Tensors that grouped products read, and what was quantized for them: quantized where the experts are."""
    found: set[int] = set()
    grouped = [kind.target in GROUPED for kind in graph.kinds]
    if not any(grouped):
        return found
    passing = [kind.op_class in ("quantize", "view") for kind in graph.kinds]
    for op in range(len(graph) - 1, -1, -1):
        kind = int(graph.op_kind[op])
        if grouped[kind] or (passing[kind] and not found.isdisjoint(graph.op_outputs.row(op).tolist())):
            found.update(graph.op_inputs.row(op).tolist())
    return found
