"""Edits of a traced graph, collected and applied at once: ops put in and taken out, operands replaced, lifetimes moved.

Places and lifetimes are given in the old graph's op numbers; an op put in before op n has a place between n - 1 and n.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cosim.graph import Category, Csr, Ints, OpGraph, OpKind, Phase, TensorSpec

_STEP = 1e-6  # between places of ops put in before the same op: fewer than half a million


@dataclass(slots=True)
class _NewOp:
    place: float
    kind: OpKind
    phase: Phase
    module: int
    layer: int
    inputs: Sequence[int]
    outputs: Sequence[int]


@dataclass(slots=True)
class GraphEdit:
    """A graph and what is to change in it; `apply` makes the new one."""

    graph: OpGraph
    specs: dict[TensorSpec, int] = field(init=False)
    inputs: list[list[int]] = field(init=False)  # of the old ops, as they are now
    readers: list[int] = field(init=False)  # tensor -> how many ops of the old graph read it now
    tensor_spec: list[int] = field(init=False)
    tensor_storage: list[int] = field(init=False)
    storage_spec: list[int] = field(init=False)
    category: list[int] = field(init=False)
    alloc: list[float] = field(init=False)
    free: list[float] = field(init=False)
    _ops: list[_NewOp] = field(init=False, default_factory=list)
    _gone: set[int] = field(init=False, default_factory=set)
    _outputs: dict[int, list[int]] = field(init=False, default_factory=dict)  # of old ops that make something else now
    _changed: dict[int, OpKind] = field(init=False, default_factory=dict)
    _lost: set[int] = field(init=False, default_factory=set)  # storages that fewer ops read now
    _producer: dict[int, int] = field(init=False)

    def __post_init__(self) -> None:
        graph = self.graph
        self.specs = {spec: row for row, spec in enumerate(graph.specs)}
        indptr, flat = graph.op_inputs.indptr.tolist(), graph.op_inputs.indices.tolist()
        self.inputs = [flat[indptr[op] : indptr[op + 1]] for op in range(len(graph))]
        self.readers = np.bincount(graph.op_inputs.indices, minlength=len(graph.tensor_spec)).tolist()
        self.tensor_spec, self.tensor_storage = graph.tensor_spec.tolist(), graph.tensor_storage.tolist()
        self.storage_spec, self.category = graph.storage_spec.tolist(), graph.storage_category.tolist()
        self.alloc, self.free = graph.storage_alloc.tolist(), graph.storage_free.tolist()
        rows = np.repeat(np.arange(len(graph)), np.diff(graph.op_outputs.indptr)).tolist()
        self._producer = dict(zip(graph.op_outputs.indices.tolist(), rows, strict=True))

    def spec(self, spec: TensorSpec) -> int:
        """The row of a spec."""
        return self.specs.setdefault(spec, len(self.specs))

    def storage(self, spec: int, category: Category, alloc: float, free: float) -> int:
        """A new storage, alive from place `alloc` (-1: before the step) to `free`."""
        self.storage_spec.append(spec)
        self.category.append(int(category))
        self.alloc.append(alloc)
        self.free.append(free)
        return len(self.storage_spec) - 1

    def tensor(self, spec: int, storage: int) -> int:
        """A new tensor on a storage."""
        self.tensor_spec.append(spec)
        self.tensor_storage.append(storage)
        self.readers.append(0)
        return len(self.tensor_spec) - 1

    def place_before(self, op: int) -> float:
        """The place of the next op that is put in before op `op`; the number of ops means at the end."""
        return op - 0.5 + _STEP * len(self._ops)

    def add(
        self,
        place: float,
        kind: tuple[str, str, tuple[tuple[str, object], ...]],
        where: tuple[Phase, int, int],
        inputs: Sequence[int],
        outputs: Sequence[int],
        mutated: tuple[int, ...] = (),
    ) -> None:
        """Put in an op at a place: (target, class, attributes), (phase, module, layer), its operands as tensors."""
        target, op_class, attributes = kind
        reads, makes = (tuple(self.tensor_spec[t] for t in tensors) for tensors in (inputs, outputs))
        row = OpKind(target, op_class, reads, makes, mutated, attributes)
        self._ops.append(_NewOp(place, row, *where, inputs, outputs))
        for tensor in inputs:
            self.readers[tensor] += 1
            storage = self.tensor_storage[tensor]
            self.free[storage] = max(self.free[storage], place) if self.alloc[storage] >= 0 else self.free[storage]

    def replace_inputs(self, op: int, tensors: dict[int, int], attributes: dict[str, object]) -> None:
        """Give an op other operands, by position, and other attributes; what nobody reads any more is taken out."""
        kind = self.graph.kinds[self.graph.op_kind[op]]
        for position, tensor in tensors.items():
            old = self.inputs[op][position]
            self.inputs[op][position] = tensor
            self.readers[tensor] += 1
            self._unread(old)
        specs = tuple(self.tensor_spec[tensor] for tensor in self.inputs[op])
        kept = tuple((key, attributes.get(key, value)) for key, value in kind.attributes)
        self._changed[op] = dataclasses.replace(kind, inputs=specs, attributes=kept)

    def replace_output(self, op: int, tensor: int, attributes: tuple[tuple[str, object], ...]) -> None:
        """Let an op make another tensor, on a storage that is there already, and give it more attributes."""
        kind = self._changed.get(op, self.graph.kinds[self.graph.op_kind[op]])
        self._outputs[op] = [tensor]
        more = (*kind.attributes, *attributes)
        self._changed[op] = dataclasses.replace(kind, outputs=(self.tensor_spec[tensor],), attributes=more)

    def drop(self, op: int) -> None:
        """Take an op out, and views and casts that only it read."""
        self._gone.add(op)
        for tensor in self.inputs[op]:
            self._unread(tensor)

    def _unread(self, tensor: int) -> None:
        """One reader less; a view or a cast that has none goes, and so do those that only it read."""
        self.readers[tensor] -= 1
        self._lost.add(self.tensor_storage[tensor])
        op = self._producer.get(tensor)
        if self.readers[tensor] or op is None or op in self._gone:
            return
        kind = self.graph.kinds[self.graph.op_kind[op]]
        outputs = self.graph.op_outputs.row(op).tolist()
        if (kind.op_class == "view" or is_cast(kind)) and not any(self.readers[made] for made in outputs):
            self._gone.add(op)
            for read in self.inputs[op]:
                self._unread(read)

    def apply(self) -> OpGraph:
        """The edited graph."""
        graph = self.graph
        self._settle_lifetimes()
        kept = [op for op in range(len(graph)) if op not in self._gone]
        places = np.array([*map(float, kept), *(op.place for op in self._ops)])
        order = np.argsort(places, kind="stable")
        kinds = {kind: row for row, kind in enumerate(graph.kinds)}

        def joined(old: NDArray[np.signedinteger[Any]], new: Sequence[int]) -> list[int]:
            return [*old[kept].tolist(), *new]

        changed = {op: kinds.setdefault(kind, len(kinds)) for op, kind in self._changed.items()}
        old_kind = graph.op_kind.tolist()
        op_kind = [changed.get(op, old_kind[op]) for op in kept]
        op_kind += [kinds.setdefault(op.kind, len(kinds)) for op in self._ops]
        inputs = [self.inputs[op] for op in kept] + [list(op.inputs) for op in self._ops]
        outputs = [self._outputs.get(op, graph.op_outputs.row(op).tolist()) for op in kept]
        outputs += [list(op.outputs) for op in self._ops]
        alloc, free = self._numbered(places[order])
        return dataclasses.replace(
            graph,
            specs=tuple(self.specs),
            kinds=tuple(kinds),
            op_kind=np.array(op_kind, dtype=np.int32)[order],
            op_phase=np.array(joined(graph.op_phase, [op.phase for op in self._ops]), dtype=np.int8)[order],
            op_module=np.array(joined(graph.op_module, [op.module for op in self._ops]), dtype=np.int32)[order],
            op_layer=np.array(joined(graph.op_layer, [op.layer for op in self._ops]), dtype=np.int32)[order],
            op_inputs=Csr.of([inputs[row] for row in order.tolist()]),
            op_outputs=Csr.of([outputs[row] for row in order.tolist()]),
            tensor_spec=np.array(self.tensor_spec, dtype=np.int32),
            tensor_storage=np.array(self.tensor_storage, dtype=np.int32),
            storage_spec=np.array(self.storage_spec, dtype=np.int32),
            storage_category=np.array(self.category, dtype=np.int8),
            storage_alloc=alloc,
            storage_free=free,
        )

    def _numbered(self, places: NDArray[np.float64]) -> tuple[Ints, Ints]:
        """Lifetimes in the new graph's op numbers."""
        alloc, free = np.array(self.alloc, dtype=np.float64), np.array(self.free, dtype=np.float64)
        made = np.searchsorted(places, alloc, side="left")
        gone = np.searchsorted(places, free, side="right") - 1
        gone = np.where(free >= len(self.graph), len(places), gone)
        return np.where(alloc < 0, -1, made).astype(np.int32), np.where(free < 0, -1, gone).astype(np.int32)

    def _settle_lifetimes(self) -> None:
        """Storages that lost readers go after the last op that still has them; those of ops taken out never live."""
        last = self._last_uses()
        first_backward = int(np.argmax(self.graph.op_phase != Phase.FORWARD))
        for storage in self._lost:
            if self.alloc[storage] < 0 or self.free[storage] >= len(self.graph):
                continue
            if int(self.alloc[storage]) in self._gone:
                self.alloc[storage] = self.free[storage] = -1
                continue
            self.free[storage] = last.get(storage, self.alloc[storage])
            if self.category[storage] == Category.ACTIVATIONS and self.free[storage] < first_backward:
                self.category[storage] = int(Category.TEMPORARY)

    def _last_uses(self) -> dict[int, float]:
        last: dict[int, float] = {}
        wanted = self._lost
        for op, reads in enumerate(self.inputs):
            if op in self._gone:
                continue
            for tensor in (*reads, *self.graph.op_outputs.row(op).tolist()):
                storage = self.tensor_storage[tensor]
                if storage in wanted:
                    last[storage] = float(op)
        for new in self._ops:
            for tensor in new.inputs:
                storage = self.tensor_storage[tensor]
                last[storage] = max(last.get(storage, -1.0), new.place)
        return last


def is_cast(kind: OpKind) -> bool:
    """Whether an op copies one tensor into another format and does nothing else."""
    return kind.target in ("aten._to_copy", "prims.convert_element_type") and len(kind.inputs) == 1
