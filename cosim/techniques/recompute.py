"""Recomputation (activation checkpointing): drop what a region saved for backward, and run it again when needed.

A rewrite of the traced graph. A *region* is a set of forward ops. Tensors that it made and that only backward still
reads are freed in forward; before the first backward op that reads one of them, the region's ops up to the last one
needed run again (PyTorch's non-reentrant checkpoint stops early in the same way). Tensors that enter the region stay
alive until then.

Policies: `full` makes every repeated block a region (Chen et al. 2016, arXiv 1604.06174); a number n every n-th block;
`selective_op` every block, keeping what attention and every other matrix product made; `selective` the attention core
from QK^T to the product with V (Korthikanti et al. 2022, arXiv 2205.05198), which a fused attention kernel does by
itself: nothing is left to do then.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cosim.graph import Category, Csr, Ints, OpGraph, Phase

Region = Sequence[int]  # forward ops in execution order


def recompute(graph: OpGraph, policy: str | int) -> OpGraph:
    """The graph with recomputation: `policy` is "none", "selective", "selective_op", "full", or n."""
    if policy == "none":
        return graph
    if policy == "selective":
        return rematerialize(graph, attention_cores(graph))
    if policy == "selective_op":
        regions = block_regions(graph)
        return rematerialize(graph, regions, [saved_ops(graph, region) for region in regions])
    return rematerialize(graph, block_regions(graph, every=1 if policy == "full" else int(policy)))


def block_regions(graph: OpGraph, every: int = 1) -> list[Region]:
    """The forward ops of each repeated block whose number is divisible by `every`."""
    regions: list[Region] = []
    for block in graph.blocks:
        for position, layer in enumerate(block.layers):
            if position % every == 0:
                inside = (graph.op_layer == layer) & (graph.op_phase == Phase.FORWARD)
                regions.append(np.flatnonzero(inside).tolist())
    return regions


def saved_ops(graph: OpGraph, region: Region) -> frozenset[int]:
    """The ops of a block whose results selective_op keeps: attention, and every other matrix product from the first.

    torchtitan's policy: torchtitan/parallelisms/parallelize_llama.py, _custom_policy (`mm_count % 2 == 0` recomputes).
    """
    classes = [graph.kinds[graph.op_kind[op]].op_class for op in region]
    products = [op for op, op_class in zip(region, classes, strict=True) if op_class == "matmul"]
    attention = [op for op, op_class in zip(region, classes, strict=True) if op_class == "attention"]
    return frozenset(products[::2] + attention)


def attention_cores(graph: OpGraph) -> list[Region]:
    """For each softmax in forward: the matrix product before it, and what follows from it up to the next product."""
    classes = [kind.op_class for kind in graph.kinds]
    regions: list[Region] = []
    forward = np.flatnonzero(graph.op_phase == Phase.FORWARD).tolist()
    for op in forward:
        if classes[graph.op_kind[op]] != "softmax" or graph.op_layer[op] < 0:
            continue
        layer = graph.op_layer[op]
        first = _neighbour(graph, classes, op, layer, step=-1)
        last = _neighbour(graph, classes, op, layer, step=+1)
        if first is not None and last is not None:
            regions.append(_following(graph, first, last))
    return regions


def _following(graph: OpGraph, first: int, last: int) -> list[int]:
    """`first` and the ops up to `last` that read what it leads to: copies of V between them are not among these."""
    made: set[int] = set()
    region: list[int] = []
    for op in range(first, last + 1):
        if op == first or made.intersection(graph.tensor_storage[graph.op_inputs.row(op)].tolist()):
            region.append(op)
            made.update(graph.tensor_storage[graph.op_outputs.row(op)].tolist())
    return region


def _neighbour(graph: OpGraph, classes: list[str], op: int, layer: int, step: int) -> int | None:
    """The nearest matrix product before or after `op` in the same block."""
    op += step
    while 0 <= op < len(graph) and graph.op_layer[op] == layer and graph.op_phase[op] == Phase.FORWARD:
        if classes[graph.op_kind[op]] == "matmul":
            return op
        op += step
    return None


@dataclass(slots=True)
class _Rerun:
    """One region's second execution: which ops, before which backward op, and new tensors and storages for what they
    make.
    """

    before: int
    ops: list[int]
    storages: dict[int, int] = field(default_factory=dict)
    tensors: dict[int, int] = field(default_factory=dict)


def rematerialize(graph: OpGraph, regions: Sequence[Region], saved: Sequence[frozenset[int]] | None = None) -> OpGraph:
    """The graph in which each region runs again before backward first needs what it saved; regions must not overlap.

    `saved`, one set per region: ops whose results are kept, so that they do not run again.
    """
    access = _StorageAccess(graph)
    storage_free = graph.storage_free.copy()
    reruns: list[_Rerun] = []
    extended: dict[int, int] = {}  # storage -> rerun that it must outlive
    for number, region in enumerate(regions):
        keep = saved[number] if saved else frozenset()
        dropped = access.dropped_by(region, keep)
        if not dropped:
            continue
        before = min(access.first_backward_read[storage] for storage in dropped)
        makers = [op for op in region if any(s in dropped for s in access.written(op))]
        ops = [op for op in region if op <= makers[-1] and op not in keep]
        rerun = _Rerun(before, ops)
        for storage in dropped:
            storage_free[storage] = access.last_forward_read.get(storage, graph.storage_alloc[storage])
        reruns.append(rerun)
        again = set(ops)
        for op in ops:
            for storage in access.read(op):
                if graph.storage_alloc[storage] not in again and graph.storage_alloc[storage] >= 0:
                    users = [len(reruns) - 1, *([extended[storage]] if storage in extended else [])]
                    extended[storage] = max(users, key=lambda i: reruns[i].before)
    return _assemble(graph, reruns, extended, storage_free) if reruns else graph


class _StorageAccess:
    """Which storages each op reads and writes, and when forward and backward last and first read them."""

    def __init__(self, graph: OpGraph) -> None:
        self._graph = graph
        self._storage = graph.tensor_storage
        self.last_forward_read: dict[int, int] = {}
        self.first_backward_read: dict[int, int] = {}
        inputs = graph.tensor_storage[graph.op_inputs.indices].tolist()
        indptr = graph.op_inputs.indptr.tolist()
        phase = graph.op_phase.tolist()
        for op in range(len(graph)):
            for storage in inputs[indptr[op] : indptr[op + 1]]:
                if phase[op] == Phase.FORWARD:
                    self.last_forward_read[storage] = op
                elif phase[op] == Phase.BACKWARD:
                    self.first_backward_read.setdefault(storage, op)
        self._made_by: dict[int, list[int]] = {}
        for storage, op in enumerate(graph.storage_alloc.tolist()):
            self._made_by.setdefault(op, []).append(storage)

    def read(self, op: int) -> list[int]:
        storages: list[int] = self._storage[self._graph.op_inputs.row(op)].tolist()
        return storages

    def written(self, op: int) -> list[int]:
        storages: list[int] = self._storage[self._graph.op_outputs.row(op)].tolist()
        return storages

    def dropped_by(self, region: Region, keep: frozenset[int]) -> set[int]:
        """Storages that the region's ops, except `keep`, make, that backward reads, and no forward op outside it."""
        graph, last = self._graph, region[-1]
        made = (storage for op in region if op not in keep for storage in self._made_by.get(op, []))
        return {
            storage
            for storage in made
            if storage in self.first_backward_read
            and self.last_forward_read.get(storage, -1) <= last
            and graph.storage_free[storage] > last
        }


def _assemble(
    graph: OpGraph,
    reruns: list[_Rerun],
    extended: dict[int, int],
    storage_free: Ints,
) -> OpGraph:
    """New columns with every rerun's ops inserted before its backward op, and lifetimes in the new numbering."""
    count = len(graph)
    order = sorted(range(len(reruns)), key=lambda i: reruns[i].before)
    shift = np.zeros(count + 1, dtype=np.int64)
    for rerun in reruns:
        shift[rerun.before :] += len(rerun.ops)
    new_index = np.arange(count + 1) + shift  # of the old op
    source: list[int] = []  # old op of each new op
    is_rerun: list[bool] = []
    rerun_at: dict[int, int] = {}  # rerun -> new index of its first op
    cursor = 0
    for i in order:
        source += range(cursor, reruns[i].before)
        is_rerun += [False] * (reruns[i].before - cursor)
        cursor = reruns[i].before
        rerun_at[i] = len(source)
        source += reruns[i].ops
        is_rerun += [True] * len(reruns[i].ops)
    source += range(cursor, count)
    is_rerun += [False] * (count - cursor)

    columns = _Columns(graph, new_index, storage_free)
    for i in order:
        columns.add_copies(reruns[i], rerun_at[i])
    inputs, outputs = columns.operands(source, is_rerun, reruns, rerun_at)
    for storage, i in extended.items():
        end = rerun_at[i] + len(reruns[i].ops) - 1
        columns.keep_until(storage, end)
    columns.settle_last_reads(inputs)
    picked = np.array(source, dtype=np.int64)
    rerun_mask = np.array(is_rerun)
    return dataclasses.replace(
        graph,
        op_kind=graph.op_kind[picked],
        op_phase=np.where(rerun_mask, Phase.RECOMPUTE, graph.op_phase[picked]).astype(np.int8),
        op_module=graph.op_module[picked],
        op_layer=graph.op_layer[picked],
        op_inputs=Csr.of(inputs),
        op_outputs=Csr.of(outputs),
        tensor_spec=np.array(columns.tensor_spec, dtype=np.int32),
        tensor_storage=np.array(columns.tensor_storage, dtype=np.int32),
        storage_spec=np.array(columns.spec, dtype=np.int32),
        storage_category=np.array(columns.category, dtype=np.int8),
        storage_alloc=np.array(columns.alloc, dtype=np.int32),
        storage_free=np.array(columns.free, dtype=np.int32),
    )


class _Columns:
    """Tensor and storage columns of the rewritten graph while they grow."""

    def __init__(self, graph: OpGraph, new_index: NDArray[np.int64], storage_free: Ints) -> None:
        self._graph = graph
        self._new_index = new_index
        self.tensor_spec = graph.tensor_spec.tolist()
        self.tensor_storage = graph.tensor_storage.tolist()
        self.spec = graph.storage_spec.tolist()
        self.category = graph.storage_category.tolist()
        alloc, free = graph.storage_alloc, storage_free
        self.alloc = np.where(alloc < 0, alloc, new_index[alloc]).tolist()
        self.free = np.where(free < 0, free, new_index[np.minimum(free, len(graph))]).tolist()
        self.original_free = graph.storage_free
        self._settle: set[int] = set()
        dropped = np.flatnonzero(storage_free != graph.storage_free)
        for storage in dropped.tolist():
            self.category[storage] = Category.TEMPORARY

    def add_copies(self, rerun: _Rerun, at: int) -> None:
        """Second copies of the storages and tensors that the rerun's ops make; they live as long as backward needs
        them.
        """
        graph, again = self._graph, set(rerun.ops)
        for offset, op in enumerate(rerun.ops):
            for tensor in graph.op_outputs.row(op).tolist():
                storage = int(graph.tensor_storage[tensor])
                if storage not in rerun.storages and int(graph.storage_alloc[storage]) in again:
                    rerun.storages[storage] = len(self.spec)
                    self.spec.append(self.spec[storage])
                    old_free = int(self.original_free[storage])
                    outlives = old_free >= rerun.before
                    self.category.append(int(Category.ACTIVATIONS if outlives else Category.TEMPORARY))
                    self.alloc.append(at + offset)
                    self.free.append(int(self._new_index[min(old_free, len(graph))]) if outlives else at + offset)
                    if not outlives:
                        self._settle.add(len(self.spec) - 1)
                rerun.tensors[tensor] = len(self.tensor_spec)
                self.tensor_spec.append(self.tensor_spec[tensor])
                self.tensor_storage.append(rerun.storages.get(storage, storage))

    def operands(
        self, source: list[int], is_rerun: list[bool], reruns: list[_Rerun], rerun_at: dict[int, int]
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Inputs and outputs of every new op: reruns use their own copies, and so does backward for what was
        dropped.
        """
        graph = self._graph
        in_ptr, in_idx = graph.op_inputs.indptr.tolist(), graph.op_inputs.indices.tolist()
        out_ptr, out_idx = graph.op_outputs.indptr.tolist(), graph.op_outputs.indices.tolist()
        owner: dict[int, _Rerun] = {}
        for i, at in rerun_at.items():
            for position in range(at, at + len(reruns[i].ops)):
                owner[position] = reruns[i]
        replaced: dict[int, int] = {}
        storages: dict[int, int] = {}
        inputs: list[list[int]] = []
        outputs: list[list[int]] = []
        for position, op in enumerate(source):
            reads, makes = in_idx[in_ptr[op] : in_ptr[op + 1]], out_idx[out_ptr[op] : out_ptr[op + 1]]
            if is_rerun[position]:
                copies = owner[position].tensors
                inputs.append([copies.get(tensor, tensor) for tensor in reads])
                outputs.append([copies[tensor] for tensor in makes])
                replaced.update(copies)
                storages.update(owner[position].storages)
            elif graph.op_phase[op] == Phase.FORWARD:
                inputs.append(reads)
                outputs.append(makes)
            else:
                inputs.append([replaced.get(tensor, tensor) for tensor in reads])
                outputs.append(makes)
                for tensor in makes:  # views of what was dropped
                    self.tensor_storage[tensor] = storages.get(self.tensor_storage[tensor], self.tensor_storage[tensor])
        return inputs, outputs

    def keep_until(self, storage: int, op: int) -> None:
        """What a rerun reads from outside its region is kept for backward: an activation."""
        self.free[storage] = max(self.free[storage], op)
        if self.category[storage] == Category.TEMPORARY:
            self.category[storage] = int(Category.ACTIVATIONS)

    def settle_last_reads(self, inputs: list[list[int]]) -> None:
        """Copies that backward does not need are freed after the last op of the rerun that reads them."""
        for position, reads in enumerate(inputs):
            for tensor in reads:
                storage = self.tensor_storage[tensor]
                if storage in self._settle:
                    self.free[storage] = max(self.free[storage], position)
