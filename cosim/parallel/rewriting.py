"""Writes one rank's graph: the ops of the one-device graph with local shapes, and collectives between them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from cosim.graph import Axis, Category, Csr, OpGraph, OpKind, Parameter, TensorSpec
from cosim.parallel.communication import COLLECTIVE
from cosim.parallel.layout import SHAPING, SHARD, WHOLE, Layout, rewritten

NOWHERE = -1
Operand = tuple[int, Layout, int]
"""A tensor of the old graph, its layout, and the scope for which it was gathered (NOWHERE: it was not)."""


@dataclass(slots=True)
class GraphWriter:
    """Columns of the new graph while it grows; tensors and storages of the old one are known by (number, version).

    A version is the flags that decide the shape, and the scope for which a whole tensor was gathered.
    """

    graph: OpGraph
    divided: list[bool]  # which specs of the old graph tensor parallelism divides
    roots: list[int]  # of each tensor the first of those that hold the same numbers
    specs: dict[TensorSpec, int] = field(init=False)
    kinds: dict[OpKind, int] = field(default_factory=dict)
    _op_kind: list[int] = field(default_factory=list)
    _op_source: list[int] = field(default_factory=list)  # the op of the old graph whose phase, module and layer it has
    _inputs: list[Sequence[int]] = field(default_factory=list)
    _outputs: list[Sequence[int]] = field(default_factory=list)
    _tensor_number: dict[Operand, int] = field(default_factory=dict)
    _tensor_spec: list[int] = field(default_factory=list)
    _tensor_storage: list[int] = field(default_factory=list)
    _storage_number: dict[tuple[int, Layout, int, int], int] = field(default_factory=dict)
    _own: set[Operand] = field(default_factory=set)  # roots that a collective has given memory of their own
    _storage_spec: list[int] = field(default_factory=list)
    _storage_category: list[int] = field(default_factory=list)
    _alloc: list[int | None] = field(default_factory=list)  # new op; None: as the old graph says
    _free: list[int | None] = field(default_factory=list)
    _until_read: set[int] = field(default_factory=set)  # storages that go after their last reader
    _spec_rewrites: dict[tuple[int, Layout], int] = field(default_factory=dict)
    _kind_rewrites: dict[tuple[int, tuple[Layout, ...], tuple[Layout, ...], tuple[int, ...]], int] = field(
        default_factory=dict
    )
    _new_index: list[int] = field(init=False)  # old op -> new op; that added last, where one is added twice
    _tensors: list[int] = field(init=False)
    _old_specs: list[int] = field(init=False)
    _storage_specs: list[int] = field(init=False)

    def __post_init__(self) -> None:
        graph = self.graph
        self.specs = {spec: number for number, spec in enumerate(graph.specs)}
        self._new_index = [0] * len(graph)
        self._tensors = graph.tensor_storage.tolist()
        self._old_specs = graph.tensor_spec.tolist()
        self._storage_specs = graph.storage_spec.tolist()

    def spec(self, old: int, layout: Layout) -> int:
        """The number of spec `old` as a tensor with `layout` has it."""
        key = (old, layout & SHAPING)
        found = self._spec_rewrites.get(key)
        if found is None:
            spec = rewritten(self.graph.specs[old], layout)
            found = self._spec_rewrites[key] = self.specs.setdefault(spec, len(self.specs))
        return found

    def tensor(self, old: int, layout: Layout, scope: int = NOWHERE) -> int:
        """The number of tensor `old` with this layout; a `scope`: the version that was gathered for it."""
        version = (old, layout & SHAPING, scope)
        found = self._tensor_number.get(version)
        if found is None:
            found = self._tensor_number[version] = len(self._tensor_spec)
            spec = self._spec_rewrites.get((self._old_specs[old], version[1]))
            self._tensor_spec.append(self.spec(self._old_specs[old], layout) if spec is None else spec)
            self._tensor_storage.append(self._storage(old, layout & SHAPING, scope))
        return found

    def result(self, old: int, layout: Layout, scope: int = NOWHERE) -> int:
        """The number of tensor `old` as a collective makes it: out of its old storage, where it was a part of one."""
        spec, whole = self.graph.shapes[self._old_specs[old]], self._storage_specs[self._tensors[old]]
        if math.prod(spec) < math.prod(self.graph.shapes[whole]):
            self._own.add((self.roots[old], layout & SHAPING, scope))
        return self.tensor(old, layout, scope)

    def part(self, old: int, whole: Layout, part: Layout) -> int:
        """The number of the rank's part, as layout `part` has it, of tensor `old` where it lies as `whole`: a view."""
        version = (old, part & SHAPING, NOWHERE)
        found = self._tensor_number.get(version)
        if found is None:
            storage = self._tensor_storage[self.tensor(old, whole)]
            found = self._tensor_number[version] = len(self._tensor_spec)
            self._tensor_spec.append(self.spec(self._old_specs[old], part))
            self._tensor_storage.append(storage)
        return found

    def renames(self, old: int, before: Layout, after: Layout) -> int:
        """The same memory under another layout of tensor `old`, of the same size; answers the new tensor."""
        number = self._storage(old, before & SHAPING, NOWHERE)
        self._storage_number[self._tensors[old], after & SHAPING, NOWHERE, -1] = number
        self._tensor_number.pop((old, after & SHAPING, NOWHERE), None)
        return self.tensor(old, after)

    def op(self, old: int, inputs: Sequence[Operand], outputs: Sequence[tuple[int, Layout]]) -> None:
        """Op `old` on tensors with these layouts; a tensor that comes twice in a row of `inputs` is read once."""
        kept = _kept(inputs) if len(inputs) > 1 and self.graph.kinds[self.graph.op_kind[old]].target == "fused" else ()
        kind = self.kind(
            int(self.graph.op_kind[old]), tuple(i[1] for i in inputs), tuple(layout for _, layout in outputs), kept
        )
        operands = [inputs[place] for place in kept] if kept else inputs
        self.plain(old, kind, operands, outputs)

    def plain(self, old: int, kind: int, inputs: Sequence[Operand], outputs: Sequence[tuple[int, Layout]]) -> None:
        """Op `old` as new kind `kind`."""
        self._new_index[old] = len(self._op_kind)
        self._op_kind.append(kind)
        self._op_source.append(old)
        self._inputs.append([self.tensor(*operand) for operand in inputs])
        self._outputs.append([self.tensor(*result) for result in outputs])

    def alike(self, old: int, kind: int, inputs: Iterable[Operand], outputs: Iterable[Operand]) -> None:
        """Op `old` as new kind `kind`, on versions of tensors; as `plain`, for the many that are like one before."""
        numbers, tensor = self._tensor_number, self.tensor
        self._new_index[old] = len(self._op_kind)
        self._op_kind.append(kind)
        self._op_source.append(old)
        self._inputs.append([numbers[v] if v in numbers else tensor(*v) for v in inputs])
        self._outputs.append([numbers[v] if v in numbers else tensor(*v) for v in outputs])

    def kind(
        self, old: int, inputs: tuple[Layout, ...], outputs: tuple[Layout, ...], kept: tuple[int, ...] = ()
    ) -> int:
        """The number of kind `old` with these layouts; `kept` are the inputs that it still has, if not all."""
        key = (old, tuple(f & SHAPING for f in inputs), tuple(f & SHAPING for f in outputs), kept)
        number = self._kind_rewrites.get(key)
        if number is None:
            kind = self.graph.kinds[old]
            made = dataclasses.replace(
                kind,
                inputs=tuple(self.spec(spec, f) for spec, f in zip(kind.inputs, inputs, strict=True)),
                outputs=tuple(self.spec(spec, f) for spec, f in zip(kind.outputs, outputs, strict=True)),
            )
            if len(kept) not in (0, len(inputs)):
                place = {old_place: new for new, old_place in enumerate(kept)}
                reads, mutated = (
                    tuple(made.inputs[i] for i in kept),
                    tuple(place[i] for i in kind.mutated if i in place),
                )
                made = dataclasses.replace(made, inputs=reads, mutated=mutated)
            if kind.attribute("members"):
                made = dataclasses.replace(made, attributes=self._members(kind, (*inputs, *outputs)))
            number = self._kind_rewrites[key] = self.kinds.setdefault(made, len(self.kinds))
        return number

    def _members(self, kind: OpKind, layouts: tuple[Layout, ...]) -> tuple[tuple[str, object], ...]:
        """Attributes of a fused kernel whose members have the shapes that its operands have on a rank."""
        flags = max((layout & SHAPING for layout in layouts), default=WHOLE)
        members = []
        for member in kind.attribute("members"):
            old = self.graph.kinds[member]
            reads, writes = (
                tuple(flags & ~SHARD if self.divided[spec] else flags for spec in specs)
                for specs in (old.inputs, old.outputs)
            )
            members.append(self.kind(member, reads, writes))
        return tuple((key, tuple(members) if key == "members" else value) for key, value in kind.attributes)

    def communicate(
        self,
        kind: str,
        group: str,
        source: int,
        operands: list[int],
        results: list[int],
        streamed: bool = False,
        wire: TensorSpec | None = None,
    ) -> None:
        """A collective that reads new tensors `operands` and makes `results` (the same: in place), beside op `source`
        of the old graph; the message has the format of `wire` where it is given.
        """
        in_place = tuple(range(len(operands))) if operands == results else ()
        made = OpKind(
            f"cosim.{kind}",
            COLLECTIVE,
            self._sent(operands, wire),
            () if in_place else self._sent(results, wire),
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

    def _sent(self, tensors: list[int], wire: TensorSpec | None) -> tuple[int, ...]:
        numbers = [self._tensor_spec[tensor] for tensor in tensors]
        if wire is None:
            return tuple(numbers)
        all_specs = list(self.specs)
        sent = [dataclasses.replace(all_specs[n], dtype=wire.dtype, itemsize=wire.itemsize) for n in numbers]
        return tuple(self.specs.setdefault(spec, len(self.specs)) for spec in sent)

    def statistics(self, kind: str, group: str, source: int, rows: TensorSpec, count: int) -> None:
        """`count` collectives of a tensor like `rows`, which nobody else reads."""
        number = self.specs.setdefault(rows, len(self.specs))
        tensor, storage = len(self._tensor_spec), len(self._storage_spec)
        self._tensor_spec.append(number)
        self._tensor_storage.append(storage)
        self._storage_spec.append(number)
        self._storage_category.append(Category.TEMPORARY)
        self._alloc.append(len(self._op_kind))
        self._free.append(len(self._op_kind) + count - 1)
        for _ in range(count):
            self.communicate(kind, group, source, [tensor], [tensor])

    def accumulate(self, source: int, into: int, term: int) -> None:
        """New tensor `into` becomes itself and `term`, beside op `source` of the old graph."""
        spec = self._tensor_spec[into]
        kind = OpKind("aten.add_", "pointwise", (spec, self._tensor_spec[term]), (), (0,))
        self._add(self.kinds.setdefault(kind, len(self.kinds)), source, [into, term], [])

    def holds(self, tensor: int, layout: Layout, scope: int, held: Layout) -> None:
        """The memory of this version is as large as `held` has it: it passes through in parts."""
        storage = self._tensor_storage[self.tensor(tensor, layout, scope)]
        self._storage_spec[storage] = self.spec(self._old_specs[tensor], held)

    def ends(self, tensor: int, layout: Layout, scope: int = NOWHERE) -> None:
        """The storage of this version is not read after the op that was added last."""
        self._free[self._tensor_storage[self.tensor(tensor, layout, scope)]] = len(self._op_kind) - 1

    def _storage(self, tensor: int, layout: Layout, scope: int) -> int:
        """The storage of a version of an old tensor."""
        old, spec, root = self._tensors[tensor], self._storage_specs[self._tensors[tensor]], -1
        if self._own and (self.roots[tensor], layout, scope) in self._own:
            root, spec = self.roots[tensor], self._old_specs[tensor]
        return self._stored(old, spec, (layout, scope, root))

    def goes_when_read(self, tensor: int) -> None:
        """The storage of new tensor `tensor` goes after its last reader, whoever read it on one device."""
        self._until_read.add(self._tensor_storage[tensor])

    def _last_reads(self) -> None:
        for op, tensors in enumerate(self._inputs):
            for storage in self._until_read.intersection([self._tensor_storage[tensor] for tensor in tensors]):
                self._free[storage] = op

    def _stored(self, old: int, spec: int, version: tuple[Layout, int, int]) -> int:
        found = self._storage_number.get((old, *version))
        if found is None:
            found = self._storage_number[old, *version] = len(self._storage_spec)
            self._storage_spec.append(self.spec(spec, version[0]))
            self._storage_category.append(int(self.graph.storage_category[old]))
            self._alloc.append(None)
            self._free.append(None)
        return found

    def _add(self, kind: int, source: int, inputs: Sequence[int], outputs: Sequence[int]) -> None:
        self._op_kind.append(kind)
        self._op_source.append(source)
        self._inputs.append(inputs)
        self._outputs.append(outputs)

    def finish(self, axes: Mapping[Axis, int]) -> OpGraph:
        """The rank's graph at its local axis sizes."""
        graph, count = self.graph, len(self._op_kind)
        parameters = tuple(self._parameter(parameter) for parameter in graph.parameters)
        if self._until_read:
            self._last_reads()
        new_index = [*self._new_index, count]
        old_alloc, old_free = graph.storage_alloc.tolist(), graph.storage_free.tolist()
        alloc, free = list(self._alloc), list(self._free)
        for (old, *_), number in self._storage_number.items():
            if alloc[number] is None:
                alloc[number] = new_index[old_alloc[old]] if old_alloc[old] >= 0 else -1
            if free[number] is None:
                free[number] = new_index[old_free[old]] if old_free[old] >= 0 else -1
        source = np.array(self._op_source, dtype=np.int64)
        op_layer, op_phase = graph.op_layer[source], graph.op_phase[source]
        category = self._storage_category
        for number, end in enumerate(self._free):
            begin = alloc[number]
            kept = category[number] == Category.ACTIVATIONS and end is not None and begin is not None and begin >= 0
            if kept and op_phase[begin] == op_phase[end]:  # only its slice is alive into backward
                category[number] = Category.TEMPORARY
        return dataclasses.replace(
            graph,
            axes=dict(axes),
            specs=tuple(self.specs),
            kinds=tuple(self.kinds),
            op_kind=np.array(self._op_kind, dtype=np.int32),
            op_phase=op_phase,
            op_module=graph.op_module[source],
            op_layer=op_layer,
            op_inputs=Csr.of(self._inputs),  # type: ignore[arg-type]
            op_outputs=Csr.of(self._outputs),  # type: ignore[arg-type]
            tensor_spec=np.array(self._tensor_spec, dtype=np.int32),
            tensor_storage=np.array(self._tensor_storage, dtype=np.int32),
            storage_spec=np.array(self._storage_spec, dtype=np.int32),
            storage_category=np.array(self._storage_category, dtype=np.int8),
            storage_alloc=np.array(alloc, dtype=np.int32),
            storage_free=np.array(free, dtype=np.int32),
            parameters=parameters,
            blocks=tuple(block.counted(op_layer, op_phase) for block in graph.blocks),
        )

    def _parameter(self, parameter: Parameter) -> Parameter:
        return dataclasses.replace(
            parameter,
            spec=self.spec(parameter.spec, WHOLE),
            storage=self._stored(parameter.storage, self._storage_specs[parameter.storage], (WHOLE, NOWHERE, -1)),
        )


def _kept(inputs: Sequence[Operand]) -> tuple[int, ...]:
    """Places of the distinct ones among a fused kernel's operands."""
    first: dict[Operand, int] = {}
    for place, operand in enumerate(inputs):
        first.setdefault(operand, place)
    return tuple(first.values())
