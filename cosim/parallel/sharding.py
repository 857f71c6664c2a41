"""From the one-device graph to one rank's: tensor, sequence, context and expert parallelism of a whole traced step.

Which axes are divided says how every tensor is cut (`cosim.parallel.layout`); what is left to find are the tensors of
which a rank has only a term of a sum, or only some of the tokens, and the places where an operator needs more. One walk
over the ops in the order in which they ran finds them (`cosim.parallel.walk`):

- An operator that contracts a divided axis (a row-parallel product, the gradient of a column-parallel one, the lookup
  in a divided table) makes a *partial* result. Partial results are added and cast as they are, and reduced where
  something else in their block reads them: an all-reduce, or with sequence parallelism a reduce-scatter along the
  sequence.
- An operator on divided axes gathers operands of which the rank has a slice of the sequence: once per block and phase,
  since what is saved for backward is the slice (Megatron-LM, arXiv 2205.05198).
- Gradients of parameters that every rank holds, made from a slice of the sequence, are summed before the update.
- Rows of softmax and loss over a divided vocabulary exchange their statistics (Megatron-LM's parallel cross entropy).
- Products of experts send their rows to the ranks that hold the experts, and back where something else reads them
  (`cosim.parallel.expert_parallel`).
- Attention with context parallelism gathers keys and values (at once, or around a ring under its own compute), or
  exchanges the sequence for heads (`cosim.parallel.context_parallel`).
"""

from __future__ import annotations

from cosim.graph import Category, OpGraph, Phase
from cosim.parallel.context_parallel import attention, check_context
from cosim.parallel.expert_parallel import ExpertParallel
from cosim.parallel.layout import (
    EXPERT,
    EXPERTS,
    PARTIAL,
    TENSOR_AXES,
    WHOLE,
    Sharding,
    copies_of_kv_heads,
    has,
    local_axes,
)
from cosim.parallel.rewriting import NOWHERE
from cosim.parallel.walk import Walk


def shard(graph: OpGraph, sharding: Sharding) -> OpGraph:
    """The step of one rank of a replica that is cut as `sharding` says; every rank of the replica has one of this
    shape. Its collectives are ops of class "collective" (`cosim.parallel.communication`).

    Raises InputError: a degree that does not divide its axis.
    """
    if sharding.trivial:
        return graph
    axes = local_axes(graph.axes, sharding, [graph.specs[p.spec] for p in graph.parameters])
    if sharding.context > 1:
        check_context(graph)
    walk = Walk(graph, sharding)
    _visit_all(walk)
    return walk.writer.finish(axes)


def replicated(graph: OpGraph, sharding: Sharding) -> tuple[str, ...]:
    """Names of blocks' matrices that every tensor-parallel rank holds whole, because no axis of theirs is divided."""
    if sharding.tensor == 1:
        return ()
    matrices = [p for p in graph.parameters if len(graph.specs[p.spec].dims) > 1 and p.layer >= 0]
    return tuple(p.name for p in matrices if not has(graph.specs[p.spec], *TENSOR_AXES, EXPERTS))


def _visit_all(walk: Walk) -> None:
    graph, writer = walk.graph, walk.writer
    experts = ExpertParallel(walk)
    context = walk.sharding.context > 1
    kinds, phases = graph.op_kind.tolist(), graph.op_phase.tolist()
    update = phases.index(Phase.OPTIMIZER) if Phase.OPTIMIZER in phases else -1
    ins, in_start = graph.op_inputs.indices.tolist(), graph.op_inputs.indptr.tolist()
    outs, out_start = graph.op_outputs.indices.tolist(), graph.op_outputs.indptr.tolist()
    for op, number in enumerate(kinds):
        inputs, outputs = ins[in_start[op] : in_start[op + 1]], outs[out_start[op] : out_start[op + 1]]
        if walk.sums_wait:
            walk.close_others(op)
        if op == update:
            _reduce_gradients(walk, op)
        if phases[op] == Phase.OPTIMIZER:  # works on what a rank holds
            writer.op(op, [(t, walk.layout[t], NOWHERE) for t in inputs], [(t, WHOLE) for t in outputs])
            continue
        if walk.known(op, number, inputs, outputs):
            continue
        kind = graph.kinds[number]
        if context and kind.op_class in ("attention", "attention_backward"):
            attention(walk, op, kind, inputs, outputs)
            continue
        if any(walk.layout[tensor] & EXPERT for tensor in inputs) or experts.has(kind, inputs, outputs):
            if experts.has(kind, inputs, outputs):
                experts.visit(op, kind, inputs, outputs)
                continue
            experts.leaves(op, kind, inputs)
        if kind.target == "fused":
            inputs = walk.summed(op, inputs)
        if not walk.settle(op, kind, inputs, outputs):
            walk.ordinary(op, kind, inputs, outputs)


def _reduce_gradients(walk: Walk, op: int) -> None:
    """Once before the update: gradients of replicated parameters are summed over tensor parallelism, and those of heads
    of keys and values that several ranks hold.
    """
    graph = walk.graph
    shared = copies_of_kv_heads(graph.axes, walk.sharding.tensor) > 1
    category = graph.storage_category[graph.tensor_storage].tolist()

    def is_shared(tensor: int) -> bool:
        spec = graph.specs[walk.spec[tensor]]
        of_keys = has(spec, "kv_heads") and not has(spec, "groups")
        return shared and of_keys and category[tensor] == Category.GRADIENTS

    read = dict.fromkeys(graph.op_inputs.indices[graph.op_inputs.indptr[op] :].tolist())
    rest = [tensor for tensor in read if walk.layout[tensor] & PARTIAL or is_shared(tensor)]
    if rest:
        tensors = [walk.writer.tensor(tensor, walk.layout[tensor]) for tensor in rest]
        walk.writer.communicate("all_reduce", "tensor", op, tensors, tensors)
        for tensor in rest:
            walk.move(tensor, walk.layout[tensor] & ~PARTIAL)
