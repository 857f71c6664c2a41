"""Writes one rank's graph: the ops of the one-device graph with local shapes, and collectives between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cosim.graph import Axis, Block, Csr, Ints, OpGraph, OpKind, Parameter, Phase, TensorSpec
from cosim.parallel.communication import COLLECTIVE
from cosim.parallel.layout import Layout, rewritten, shape_flags

Version = tuple[int, int]  # flags that decide the shape; the phase for which it was gathered, or -1


@dataclass(slots=True)
class GraphWriter:
    """Columns of the new graph while it grows; tensors and storages of the old one are known by (number, version)."""

    graph: OpGraph
    specs: dict[TensorSpec, int] = field(init=False)
    kinds: dict[OpKind, int] = field(default_factory=dict)
    _op_kind: list[int] = field(default_factory=list)
    _op_source: list[int] = field(default_factory=list)  # the op of the old graph whose phase, module and layer it has
    _inputs: list[list[int]] = field(default_factory=list)
    _outputs: list[list[int]] = field(default_factory=list)
    _tensor_number: dict[tuple[int, Version], int] = field(default_factory=dict)
    _tensor_spec: list[int] = field(default_factory=list)
    _tensor_storage: list[int] = field(default_factory=list)
    _storage_number: dict[tuple[int, Version], int] = field(default_factory=dict)
    _storage_spec: list[int] = field(default_factory=list)
    _storage_category: list[int] = field(default_factory=list)
    _alloc: list[int | None] = field(default_factory=list)  # new op; None: as the old graph says
    _free: list[int | None] = field(default_factory=list)
    _spec_rewrites: dict[tuple[int, int], int] = field(default_factory=dict)
    _kind_rewrites: dict[tuple[int, tuple[int, ...], tuple[int, ...]], int] = field(default_factory=dict)
    _new_index: list[int] = field(default_factory=list)  # old op -> new op
    _tensors: list[int] = field(init=False)
    _old_specs: list[int] = field(init=False)
    _storage_specs: list[int] = field(init=False)

    def __post_init__(self) -> None:
        graph = self.graph
        self.specs = {spec: number for number, spec in enumerate(graph.specs)}
        self._tensors = graph.tensor_storage.tolist()
        self._old_specs = graph.tensor_spec.tolist()
        self._storage_specs = graph.storage_spec.tolist()

    def spec(self, old: int, layout: Layout) -> int:
        """The number of spec `old` as a tensor with `layout` has it."""
        key = (old, int(shape_flags(layout)))
        found = self._spec_rewrites.get(key)
        if found is None:
            spec = rewritten(self.graph.specs[old], layout)
            found = self._spec_rewrites[key] = self.specs.setdefault(spec, len(self.specs))
        return found

    def tensor(self, old: int, layout: Layout, phase: int = -1) -> int:
        """The number of tensor `old` with this layout; a `phase`: the version that was gathered for it."""
        version = (int(shape_flags(layout)), phase)
        found = self._tensor_number.get((old, version))
        if found is None:
            found = self._tensor_number[old, version] = len(self._tensor_spec)
            self._tensor_spec.append(self.spec(self._old_specs[old], layout))
            self._tensor_storage.append(self._storage(self._tensors[old], version))
        return found

    def op(self, old: int, inputs: list[tuple[int, Layout, int]], outputs: list[tuple[int, Layout]]) -> None:
        """Op `old` on tensors with these layouts; the phase with an input is as in `tensor`."""
        kind_key = (
            int(self.graph.op_kind[old]),
            tuple(int(shape_flags(layout)) for _, layout, _ in inputs),
            tuple(int(shape_flags(layout)) for _, layout in outputs),
        )
        number = self._kind_rewrites.get(kind_key)
        if number is None:
            kind = self.graph.kinds[kind_key[0]]
            kind = dataclasses.replace(
                kind,
                inputs=tuple(self.spec(spec, Layout(f)) for spec, f in zip(kind.inputs, kind_key[1], strict=True)),
                outputs=tuple(self.spec(spec, Layout(f)) for spec, f in zip(kind.outputs, kind_key[2], strict=True)),
            )
            number = self._kind_rewrites[kind_key] = self.kinds.setdefault(kind, len(self.kinds))
        self._new_index.append(len(self._op_kind))
        self._add(
            number,
            old,
            [self.tensor(*tensor) for tensor in inputs],
            [self.tensor(tensor, layout) for tensor, layout in outputs],
        )

    def communicate(
        self, kind: str, group: str, source: int, operands: list[int], results: list[int], streamed: bool = False
    ) -> None:
        """A collective that reads new tensors `operands` and makes `results` (the same: in place), beside op `source`
        of the old graph.
        """
        specs = [tuple(self._tensor_spec[tensor] for tensor in tensors) for tensors in (operands, results)]
        in_place = tuple(range(len(operands))) if operands == results else ()
        made = OpKind(
            f"cosim.{kind}",
            COLLECTIVE,
            specs[0],
            () if in_place else specs[1],
            in_place,
            (("group", group), ("streamed", streamed)),
        )
        op = len(self._op_kind)
        self._add(self.kinds.setdefault(made, len(self.kinds)), source, operands, [] if in_place else results)
        if not in_place:
            for old, new in zip(operands, results, strict=True):
                here, there = self._tensor_storage[old], self._tensor_storage[new]
                self._alloc[there] = op
                self._storage_category[there] = self._storage_category[here]

    def statistics(self, kind: str, group: str, source: int, like: int, dims_dropped: int, count: int) -> None:
        """`count` collectives of one fp32 number per row of new tensor `like`, whose last dimensions are the row's."""
        spec = list(self.specs)[self._tensor_spec[like]]
        rows = TensorSpec(spec.dims[: len(spec.dims) - dims_dropped], "fp32", 4)
        number = self.specs.setdefault(rows, len(self.specs))
        tensor, storage = len(self._tensor_spec), len(self._storage_spec)
        self._tensor_spec.append(number)
        self._tensor_storage.append(storage)
        self._storage_spec.append(number)
        self._storage_category.append(4)
        self._alloc.append(len(self._op_kind))
        self._free.append(len(self._op_kind) + count - 1)
        for _ in range(count):
            self.communicate(kind, group, source, [tensor], [tensor])

    def ends(self, old_tensor: int, layout: Layout, phase: int = -1) -> None:
        """The storage of this version is not read after the op that was added last."""
        self._free[self._tensor_storage[self.tensor(old_tensor, layout, phase)]] = len(self._op_kind) - 1

    def _storage(self, old: int, version: Version) -> int:
        found = self._storage_number.get((old, version))
        if found is None:
            found = self._storage_number[old, version] = len(self._storage_spec)
            self._storage_spec.append(self.spec(self._storage_specs[old], Layout(version[0])))
            self._storage_category.append(int(self.graph.storage_category[old]))
            self._alloc.append(None)
            self._free.append(None)
        return found

    def _add(self, kind: int, source: int, inputs: list[int], outputs: list[int]) -> None:
        self._op_kind.append(kind)
        self._op_source.append(source)
        self._inputs.append(inputs)
        self._outputs.append(outputs)

    def finish(self, axes: Mapping[Axis, int]) -> OpGraph:
        """The rank's graph at its local axis sizes."""
        graph, count = self.graph, len(self._op_kind)
        new_index = [*self._new_index, count]
        parameters = tuple(self._parameter(parameter) for parameter in graph.parameters)
        old_alloc, old_free = graph.storage_alloc.tolist(), graph.storage_free.tolist()
        alloc, free = list(self._alloc), list(self._free)
        for (old, _), number in self._storage_number.items():
            if alloc[number] is None:
                alloc[number] = new_index[old_alloc[old]] if old_alloc[old] >= 0 else -1
            if free[number] is None:
                free[number] = new_index[old_free[old]] if old_free[old] >= 0 else -1
        source = np.array(self._op_source, dtype=np.int64)
        op_layer, op_phase = graph.op_layer[source], graph.op_phase[source]
        return dataclasses.replace(
            graph,
            axes=dict(axes),
            specs=tuple(self.specs),
            kinds=tuple(self.kinds),
            op_kind=np.array(self._op_kind, dtype=np.int32),
            op_phase=op_phase,
            op_module=graph.op_module[source],
            op_layer=op_layer,
            op_inputs=Csr.of(self._inputs),
            op_outputs=Csr.of(self._outputs),
            tensor_spec=np.array(self._tensor_spec, dtype=np.int32),
            tensor_storage=np.array(self._tensor_storage, dtype=np.int32),
            storage_spec=np.array(self._storage_spec, dtype=np.int32),
            storage_category=np.array(self._storage_category, dtype=np.int8),
            storage_alloc=np.array(alloc, dtype=np.int32),
            storage_free=np.array(free, dtype=np.int32),
            parameters=parameters,
            blocks=tuple(_counted(block, op_layer, op_phase) for block in graph.blocks),
        )

    def _parameter(self, parameter: Parameter) -> Parameter:
        return dataclasses.replace(
            parameter,
            spec=self.spec(parameter.spec, Layout.WHOLE),
            storage=self._storage(parameter.storage, (0, -1)),
        )


def _counted(block: Block, op_layer: Ints, op_phase: NDArray[np.int8]) -> Block:
    inside = op_phase[op_layer == block.layers[0]]
    forward, backward = (int((inside == phase).sum()) for phase in (Phase.FORWARD, Phase.BACKWARD))
    return dataclasses.replace(block, forward_ops=forward, backward_ops=backward)
