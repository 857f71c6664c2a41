"""Fusion as torch.compile does it: runs of pointwise, copying and row-wise ops become one kernel each.

A rewrite of the traced graph. Between matrix products, attention and indexed ops, consecutive ops of a block and phase
form one kernel that reads what comes from outside it and writes what is read after it; what only passes between its ops
stays in registers and is never allocated. The search for a tensor's largest value ends a kernel: the cast that needs
the value begins another. (Ansel et al. 2024, PyTorch 2, ASPLOS: Inductor's pointwise and reduction fusion. What its
partitioner recomputes in backward instead of saving is not modelled.)
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from cosim.graph import Csr, Ints, OpGraph, OpKind, Phase

_ROWS = frozenset(["norm", "norm_backward", "reduction", "softmax", "softmax_backward", "loss"])
_LONGEST = 16  # ops of a pattern
FUSIBLE = _ROWS - {"loss"} | {"pointwise", "copy", "quantize", "random", "fill"}


def fuse(graph: OpGraph, scope: str, loss: bool = False) -> OpGraph:
    """The graph with fused kernels in its repeated blocks (scope "block") or all of it ("model"); `loss`: there too."""
    groups = _groups(graph, scope, FUSIBLE | {"loss"} if loss else FUSIBLE, loss)
    return _rewrite(graph, groups) if groups else graph


def compiled_ops(graph: OpGraph, scope: str) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which ops the compiler launches: those of blocks, or all but the optimizer's."""
    in_step: np.ndarray[tuple[int], np.dtype[np.bool_]] = graph.op_phase != Phase.OPTIMIZER
    return in_step & (graph.op_layer >= 0) if scope == "block" else in_step


@dataclass(frozen=True, slots=True)
class HandFused:
    """Which patterns are one kernel each in eager mode.

    `softmax_longest`: keys of the longest row that the kernel of scale, mask and softmax takes, 0 without one; it also
    wants batch x heads of a rank, `tensor` of which share the heads, in fours (NVIDIA/Megatron-LM
    megatron/model/fused_softmax.py).
    """

    softmax_longest: int = 0
    dropout_add: bool = False
    rotary: bool = False
    tensor: int = 1


_ROTARY = (
    ("aten.mul", "aten.neg", "aten.cat", "aten.mul", "aten.add"),
    ("aten.mul", "aten.neg", "aten.mul", "aten.cat", "aten.add"),  # backward
)


def fuse_by_hand(graph: OpGraph, fused: HandFused) -> OpGraph:
    """The graph with the patterns that are fused by hand as one kernel each; everything else as it is."""
    if not (fused.softmax_longest or fused.dropout_add or fused.rotary):
        return graph
    real = [op for op, kind in enumerate(graph.op_kind.tolist()) if graph.kinds[kind].op_class != "view"]
    targets = [graph.kinds[graph.op_kind[op]].target for op in real]
    found: list[list[int]] = []
    at = 0
    while at < len(real):
        length = _pattern(graph, real, targets, at, fused)
        if length > 1:
            found.append(real[at : at + length])
        at += max(1, length)
    return _rewrite(graph, found) if found else graph


def _pattern(graph: OpGraph, real: list[int], targets: list[str], at: int, fused: HandFused) -> int:
    """How many ops from `at` on are one kernel; ops of other blocks or phases end a pattern."""
    together = _run(graph, real, at)
    if fused.dropout_add and targets[at : at + 2] == ["aten.native_dropout", "aten.add"] and together > 1:
        dropped = graph.tensor_storage[graph.op_outputs.row(real[at])[0]]
        if dropped in graph.tensor_storage[graph.op_inputs.row(real[at + 1])]:
            return 2
    if fused.rotary and together >= 5 and tuple(targets[at : at + 5]) in _ROTARY:
        return 5
    if targets[at] == "aten._softmax_backward_data" and _kernel_takes(graph, real[at], fused):
        return 1 + _run(graph, real, at + 1, ("pointwise",)) if together > 1 else 1
    before = _run(graph, real, at, ("pointwise", "copy", "fill"))
    ends = 0 < before < together and targets[at + before] == "aten._softmax"
    return before + 1 if ends and _kernel_takes(graph, real[at + before], fused) else 1


def _run(graph: OpGraph, real: list[int], at: int, classes: tuple[str, ...] = ()) -> int:
    """How many ops from `at` on are of one block and phase, and of these classes."""
    if at >= len(real):
        return 0
    first = real[at]
    for length, op in enumerate(real[at : at + _LONGEST]):
        same = graph.op_phase[op] == graph.op_phase[first] and graph.op_layer[op] == graph.op_layer[first]
        if not same or (classes and graph.kinds[graph.op_kind[op]].op_class not in classes):
            return length
    return min(_LONGEST, len(real) - at)


def _kernel_takes(graph: OpGraph, softmax: int, fused: HandFused) -> bool:
    shape = graph.shapes[graph.tensor_spec[graph.op_inputs.row(softmax)[0]]]
    if graph.op_layer[softmax] < 0 or len(shape) != 4:
        return False
    batch, heads, rows, keys = shape
    return bool(16 < keys <= fused.softmax_longest and rows % 4 == 0 and batch * heads // fused.tensor % 4 == 0)


def _groups(graph: OpGraph, scope: str, fusible: frozenset[str], loss: bool) -> list[list[int]]:
    """Runs of at least two fusible ops; views do not part them."""
    classes = [kind.op_class for kind in graph.kinds]
    allowed = compiled_ops(graph, scope)
    after_blocks = graph.op_layer < 0
    kinds, phases, layers = graph.op_kind.tolist(), _regions(graph).tolist(), graph.op_layer.tolist()
    groups: list[list[int]] = []
    current: list[int] = []
    for op, kind in enumerate(kinds):
        op_class = classes[kind]
        if op_class == "view":
            continue
        inside = allowed[op] or (loss and after_blocks[op] and phases[op] != Phase.OPTIMIZER)
        joins = inside and op_class in fusible
        same = current and (phases[op], layers[op]) == (phases[current[-1]], layers[current[-1]])
        if current and not (joins and same):
            groups.append(current)
            current = []
        if joins:
            current.append(op)
        if graph.kinds[kind].target == "cosim.amax" and current:
            groups.append(current)
            current = []
    groups.append(current)
    return [group for group in groups if len(group) > 1]


def _regions(graph: OpGraph) -> np.ndarray[tuple[int], np.dtype[np.int8]]:
    """The phase of each op; what the compiler's partitioner recomputes is part of the backward graph."""
    if graph.provenance.get("options", {}).get("frontend") != "compile":
        return graph.op_phase
    return np.where(graph.op_phase == Phase.RECOMPUTE, np.int8(Phase.BACKWARD), graph.op_phase)


@dataclass(frozen=True, slots=True)
class _Fused:
    """What one kernel for a group of ops reads and writes, as tensors, and the storages that it makes and keeps."""

    reads: list[int]
    mutated: tuple[int, ...]  # positions in `reads`
    writes: list[int]
    made: frozenset[int]
    inner: frozenset[int]  # of those made: read by nobody after it


def _rewrite(graph: OpGraph, groups: list[list[int]]) -> OpGraph:
    """New columns in which the last op of each group is the fused one and the others are gone."""
    count = len(graph)
    last_read = _last_reads(graph)
    known = {kind: number for number, kind in enumerate(graph.kinds)}
    op_kind, op_module = graph.op_kind.copy(), graph.op_module.copy()
    alloc, free = graph.storage_alloc.copy(), graph.storage_free.copy()
    place = np.arange(count, dtype=np.float64)  # where an op goes, in numbers of the old graph; -1: it is gone
    stands_for, ends_with = np.arange(count), np.arange(count)  # the op that now allocates, and that now frees
    inputs: dict[int, list[int]] = {}
    outputs: dict[int, list[int]] = {}
    for group in groups:
        first, last = group[0], group[-1]
        fused = _operands(graph, group, last_read)
        op_kind[last] = known.setdefault(_fused_kind(graph, group, fused), len(known))
        op_module[last] = graph.op_module[first]
        inputs[last], outputs[last] = fused.reads, fused.writes
        place[group[:-1]] = -1
        for view in set(range(first, last)).difference(group):
            place[view] = _place_of_view(graph, view, last, fused)
        gone = [op for op in range(first, last) if place[op] < 0]
        stands_for[gone] = last
        ends_with[first:last] = last
        alloc[list(fused.inner)] = free[list(fused.inner)] = -1
    kept = np.argsort(place, kind="stable")[int((place < 0).sum()) :]
    new_index = np.full(count + 1, -1, dtype=np.int64)
    new_index[kept] = np.arange(len(kept))
    new_index[count] = len(kept)
    born, dies = new_index[stands_for], new_index[np.append(ends_with, count)]
    return dataclasses.replace(
        graph,
        kinds=tuple(known),
        op_kind=op_kind[kept],
        op_phase=graph.op_phase[kept],
        op_module=op_module[kept],
        op_layer=graph.op_layer[kept],
        op_inputs=_rows(graph.op_inputs, kept, inputs),
        op_outputs=_rows(graph.op_outputs, kept, outputs),
        storage_alloc=np.where(alloc < 0, alloc, born[alloc]).astype(np.int32),
        storage_free=np.where(free < 0, free, dies[np.minimum(free, count)]).astype(np.int32),
        blocks=tuple(block.counted(graph.op_layer[kept], graph.op_phase[kept]) for block in graph.blocks),
    )


def _operands(graph: OpGraph, group: list[int], last_read: Ints) -> _Fused:
    storage = graph.tensor_storage
    made: dict[int, int] = {}
    reads: dict[int, int] = {}
    written: set[int] = set()
    first, last = group[0], group[-1]
    for op in group:
        tensors = graph.op_inputs.row(op).tolist()
        for tensor in tensors:
            if storage[tensor] not in made:
                reads.setdefault(int(storage[tensor]), tensor)
        written |= {int(storage[tensors[i]]) for i in graph.kinds[graph.op_kind[op]].mutated}
        for tensor in graph.op_outputs.row(op).tolist():
            made[int(storage[tensor])] = tensor
    outside = {s for s in made if graph.storage_alloc[s] < first or last_read[s] > last}
    return _Fused(
        reads=list(reads.values()),
        mutated=tuple(i for i, s in enumerate(reads) if s in written),
        writes=[tensor for s, tensor in made.items() if s in outside],
        made=frozenset(made),
        inner=frozenset(made) - outside,
    )


def _place_of_view(graph: OpGraph, view: int, last: int, fused: _Fused) -> float:
    """A view between a group's ops: gone with what stays in registers, behind the kernel if of its results, else
    where it was.
    """
    storages = frozenset(graph.tensor_storage[graph.op_inputs.row(view)].tolist())
    if storages & fused.inner:
        return -1
    return last + 0.5 if storages & fused.made else view


def _fused_kind(graph: OpGraph, group: list[int], fused: _Fused) -> OpKind:
    members = tuple(int(graph.op_kind[op]) for op in group)
    only_casts = all(graph.kinds[member].op_class == "quantize" for member in members)
    by_row = {graph.kinds[member].op_class for member in members} & _ROWS
    rows = by_row.pop() if by_row in ({"softmax"}, {"softmax_backward"}) else "norm"
    return OpKind(
        target="fused",
        op_class="quantize" if only_casts else rows if by_row or rows != "norm" else "pointwise",
        inputs=tuple(int(graph.tensor_spec[tensor]) for tensor in fused.reads),
        outputs=tuple(int(graph.tensor_spec[tensor]) for tensor in fused.writes),
        mutated=fused.mutated,
        attributes=(("members", members),),
    )


def _last_reads(graph: OpGraph) -> Ints:
    """Storage -> the last op that reads it, -1 for none."""
    last = np.full(len(graph.storage_spec), -1, dtype=np.int32)
    rows = np.repeat(np.arange(len(graph), dtype=np.int32), np.diff(graph.op_inputs.indptr))
    np.maximum.at(last, graph.tensor_storage[graph.op_inputs.indices], rows)
    return last


def _rows(csr: Csr, kept: np.ndarray[tuple[int], np.dtype[np.int64]], replaced: dict[int, list[int]]) -> Csr:
    return Csr.of([replaced[op] if op in replaced else csr.row(op).tolist() for op in kept.tolist()])
