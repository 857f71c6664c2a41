"""Gradients that every micro-step adds to one buffer, which is there all the time, is reduced, and zeroed each step.

A rewrite of the traced graph: Megatron's `main_grad` (NVIDIA/Megatron-LM megatron/model/distributed.py) and the fp32
gradients of DeepSpeed's BF16_Optimizer. What backward makes is added to the buffer by a kernel and gone; or a product
that makes a weight's gradient adds to the buffer itself ("gradient accumulation fusion", apex's
fused_weight_gradient_mlp_cuda: it reads and writes 4 bytes instead of writing 2). A buffer in the optimizer's format
needs no cast before the update.
"""

from __future__ import annotations

import numpy as np

from cosim.graph import Category, OpGraph, Phase, TensorSpec
from cosim.techniques.edit import GraphEdit, is_cast

ACCUMULATES = "accumulates"
"""Attribute of a product that adds to what it writes."""


def buffer_gradients(graph: OpGraph, buffer: str | None, fused: bool) -> OpGraph:
    """The step with a buffer of format `buffer` (None: without one); `fused`: products add to a buffer in fp32."""
    casts = _gradient_casts(graph) if buffer is not None else []
    if not casts:
        return graph
    edit = GraphEdit(graph)
    before = np.flatnonzero(graph.op_phase != Phase.OPTIMIZER).tolist()
    writer = {storage: op for op in before for storage in _written(graph, op)}  # the last one
    kept: list[int] = []
    for cast in casts:
        gradient = int(graph.op_inputs.row(cast)[0])
        producer = writer[int(graph.tensor_storage[gradient])]
        wide = int(graph.op_outputs.row(cast)[0])
        if graph.specs[graph.tensor_spec[wide]].dtype == buffer:
            kept.append(_keep_wide(edit, cast, gradient, wide, producer, fused and buffer == "fp32"))
        else:
            kept.append(_keep_narrow(edit, cast, gradient, producer))
    zero = ("aten._foreach_zero_", "fill", ())
    where = (Phase.OPTIMIZER, int(graph.op_module[casts[0]]), int(graph.op_layer[casts[0]]))
    edit.add(edit.place_before(len(graph)), zero, where, kept, [], tuple(range(len(kept))))
    return edit.apply()


def buffer_bytes(graph: OpGraph) -> int:
    """Bytes of the buffer that a graph has; 0 where it has none."""
    held = (graph.storage_category == Category.GRADIENTS) & (graph.storage_alloc < 0) & (graph.storage_free >= 0)
    return int(graph.storage_bytes[held].sum())


def _gradient_casts(graph: OpGraph) -> list[int]:
    """The update's casts of whole gradients that backward made."""
    casts = []
    for op in np.flatnonzero(graph.op_phase == Phase.OPTIMIZER).tolist():
        if not is_cast(graph.kinds[graph.op_kind[op]]):
            continue
        storage = graph.tensor_storage[graph.op_inputs.row(op)[0]]
        made = graph.storage_alloc[storage]
        if graph.storage_category[storage] == Category.GRADIENTS and made >= 0:
            casts.append(op)
    return casts


def _written(graph: OpGraph, op: int) -> list[int]:
    """Storages that an op writes, as results or in place."""
    kind = graph.kinds[graph.op_kind[op]]
    if kind.op_class == "view":
        return []
    inputs = graph.op_inputs.row(op).tolist()
    tensors = [*graph.op_outputs.row(op).tolist(), *(inputs[place] for place in kind.mutated)]
    storages: list[int] = graph.tensor_storage[tensors].tolist() if tensors else []
    return storages


def _keep_wide(edit: GraphEdit, cast: int, gradient: int, wide: int, producer: int, fused: bool) -> int:
    """The cast's result is the buffer: the product writes it, or what it made is added to it; the cast goes."""
    graph = edit.graph
    storage, buffer = int(graph.tensor_storage[gradient]), int(graph.tensor_storage[wide])
    edit.alloc[buffer], edit.free[buffer] = -1, len(graph)
    kind = graph.kinds[graph.op_kind[producer]]
    if fused and kind.op_class == "matmul" and len(kind.outputs) == 1:
        old = graph.specs[kind.outputs[0]]
        spec = edit.spec(TensorSpec(old.dims, "fp32", 4.0, old.expanded))
        edit.replace_output(producer, edit.tensor(spec, buffer), ((ACCUMULATES, True),))
        edit.alloc[storage] = edit.free[storage] = -1
        edit.category[storage] = int(Category.TEMPORARY)
    else:
        _add(edit, wide, gradient, producer)
    edit.drop(cast)
    return wide


def _keep_narrow(edit: GraphEdit, cast: int, gradient: int, producer: int) -> int:
    """The buffer is in backward's format, and the cast reads it."""
    spec = edit.tensor_spec[gradient]
    storage = edit.storage(spec, Category.GRADIENTS, -1, len(edit.graph))
    buffer = edit.tensor(spec, storage)
    _add(edit, buffer, gradient, producer)
    edit.replace_inputs(cast, {0: buffer}, {})
    return buffer


def _add(edit: GraphEdit, buffer: int, gradient: int, producer: int) -> None:
    graph = edit.graph
    storage = edit.tensor_storage[gradient]
    place = edit.place_before(producer + 1)
    where = (Phase.BACKWARD, int(graph.op_module[producer]), int(graph.op_layer[producer]))
    edit.add(place, ("aten.add_", "pointwise", ()), where, [buffer, gradient], [], (0,))
    edit.category[storage] = int(Category.TEMPORARY)
    edit.free[storage] = place
