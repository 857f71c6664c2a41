"""Backward in two parts: input gradients, which the stage before waits for, and weight gradients, which nobody does.

Zero-bubble schedules (Qi et al. 2023, arXiv 2401.10241) run the second part later. Weight gradients are the products
that only lead to gradients of parameters, with the views, casts and sums behind them; everything else, the gradients of
norms among it, is in the first part.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from cosim.graph import Csr, OpGraph, Phase
from cosim.parallel.stages import RankGraph

Bools = NDArray[np.bool_]
_BEHIND = frozenset(["view", "copy", "pointwise", "reduction"])


def weight_gradient_ops(graph: OpGraph) -> Bools:
    """Which ops of backward make weight gradients and nothing else."""
    count = len(graph)
    inputs, outputs = graph.op_inputs, graph.op_outputs
    classes = [kind.op_class for kind in graph.kinds]
    elsewhere: set[int] = set()  # tensors that something other than a gradient is made of
    found = np.zeros(count, dtype=np.bool_)
    phases, kinds = graph.op_phase.tolist(), graph.op_kind.tolist()
    for op in range(count - 1, -1, -1):
        if phases[op] == Phase.OPTIMIZER:
            continue
        op_class = classes[kinds[op]]
        made = outputs.row(op).tolist()
        mutates = bool(graph.kinds[kinds[op]].mutated)
        last = phases[op] == Phase.BACKWARD and made and not mutates and elsewhere.isdisjoint(made)
        found[op] = bool(last) and (op_class in _BEHIND or op_class == "matmul")
        if not (found[op] and op_class in _BEHIND):
            elsewhere.update(inputs.row(op).tolist())
    return found


def weight_gradients_last(part: RankGraph) -> tuple[RankGraph, Bools]:
    """The rank's graph with the weight gradients of each chunk behind all else of its backward, and which they are."""
    graph = part.graph
    late = weight_gradient_ops(graph)
    backward = np.isin(graph.op_phase, [Phase.BACKWARD, Phase.RECOMPUTE])
    order = np.arange(len(graph), dtype=np.int64)
    for chunk in np.unique(part.chunk[backward]).tolist():
        inside = np.flatnonzero(backward & (part.chunk == chunk))
        order[inside] = inside[np.argsort(late[inside], kind="stable")]
    moved = dataclasses.replace(
        graph,
        op_kind=graph.op_kind[order],
        op_phase=graph.op_phase[order],
        op_module=graph.op_module[order],
        op_layer=graph.op_layer[order],
        op_inputs=_reordered(graph.op_inputs, order),
        op_outputs=_reordered(graph.op_outputs, order),
    )
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    alloc = np.where(graph.storage_alloc >= 0, place[graph.storage_alloc], -1)
    free = _freed(graph, moved, place)
    moved = dataclasses.replace(moved, storage_alloc=alloc.astype(np.int32), storage_free=free)
    return RankGraph(moved, part.source[order], part.chunk[order]), late[order]


def _reordered(rows: Csr, order: NDArray[np.int64]) -> Csr:
    return Csr.of([rows.row(op).tolist() for op in order.tolist()])


def _freed(graph: OpGraph, moved: OpGraph, place: NDArray[np.int64]) -> NDArray[np.int32]:
    """Where each storage goes: as before, or behind its last reader where that comes later now."""
    count = len(graph)
    last = np.full(len(graph.storage_free), -1, dtype=np.int64)
    for rows in (moved.op_inputs, moved.op_outputs):
        ops = np.repeat(np.arange(count), np.diff(rows.indptr))
        np.maximum.at(last, graph.tensor_storage[rows.indices], ops)
    within = (graph.storage_free >= 0) & (graph.storage_free < count)
    free = np.where(within, place[np.where(within, graph.storage_free, 0)], graph.storage_free)
    return np.where(within, np.maximum(free, last), free).astype(np.int32)
