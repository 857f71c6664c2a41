"""Narrow formats on the traced graph: products of linear layers get quantized operands, and the passes that make them.

A rewrite of the step by a `Recipe`. A *linear layer* is a product in a repeated block of which one operand is a
parameter (or a cast of one). Its three products read, with x the input, w the weight, g the gradient of the output:

    forward  y  = x w^T    rows of x        rows of w
    dgrad    dx = g w      rows of g        columns of w
    wgrad    dw = g^T x    columns of g     columns of x

Each of x, w and g is cast once, just before the first product that needs it, into as many narrow copies as the recipe
has for rows and columns; casts of x are shared by the layers that read it. What was kept for wgrad in 16 bits and is
read by nobody else is then freed in forward, and the narrow copy is kept instead. Weights are cast once per step, after
the update, and both copies stay (Transformer Engine's cache over micro-batches), except under ZeRO 3, where a gathered
weight is cast in forward for its rows and again in backward for its columns.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from cosim.graph import Category, OpGraph, OpKind, Phase, TensorSpec
from cosim.techniques.edit import GraphEdit, is_cast
from cosim.techniques.recipes import Recipe
from cosim.trace.vocabulary import matmul_operands
from hwmodels.accelerator import Accelerator
from hwmodels.number_formats import COMPUTES_AS, FORMATS, bytes_of

_LINEAR = ("aten.mm", "aten.addmm", "cosim.grouped_mm", "cosim.grouped_mm_weight", "aten._grouped_mm")
Role = Literal["activation", "weight", "gradient"]
Direction = Literal["rows", "columns"]


@dataclass(slots=True)
class _Source:
    """A tensor that is cast: which products read its rows and its columns, as (op, position among its inputs)."""

    role: Role
    tensor: int  # in its wide format
    rows: list[tuple[int, int]] = field(default_factory=list)
    columns: list[tuple[int, int]] = field(default_factory=list)


def quantize(graph: OpGraph, recipe: Recipe | None, gathered: bool) -> OpGraph:
    """The step with quantized linear layers; as it is without a recipe. `gathered`: weights come and go (ZeRO 3)."""
    if recipe is None:
        return graph
    sources = _Uses(graph, recipe).sources
    edit = GraphEdit(graph)
    for source in sources.values():
        if source.role == "weight" and not gathered:
            _cast_after_update(edit, recipe, source)
        elif source.role == "weight":
            _cast_before(edit, recipe, dataclasses.replace(source, columns=[]))
            _cast_before(edit, recipe, dataclasses.replace(source, rows=[]))
        else:
            _cast_before(edit, recipe, source)
    return edit.apply()


def uncalibrated(graph: OpGraph, accelerator: Accelerator) -> tuple[str, ...]:
    """What the result says of formats in which no product was fitted on this chip."""
    fitted = {
        entry.path.rpartition(".")[2]
        for entry in accelerator.provenance
        if entry.path.startswith("calibration.gemm.formats.") and entry.kind == "fitted_on"
    }
    formats = {graph.specs[kind.inputs[matmul_operands(kind)[0]]].dtype for kind in graph.kinds if _is_product(kind)}
    narrow = formats & _NARROW_FORMATS
    rates = {name if FORMATS[name].scaled_by_unit else COMPUTES_AS.get(name, name) for name in narrow}
    return tuple(
        f"{accelerator.name}: no product in {name} was calibrated; its share of peak is derived, or that of 16 bits"
        for name in sorted(rates)
        if not fitted & {name, COMPUTES_AS.get(name, name)}
    )


_NARROW_FORMATS = frozenset(name for name, f in FORMATS.items() if f.bits <= 8 and name != "bool")


def _is_product(kind: OpKind) -> bool:
    return kind.op_class == "matmul"


class _Uses:
    """Finds the linear layers of a graph, and what their products read."""

    def __init__(self, graph: OpGraph, recipe: Recipe) -> None:
        self.graph, self.recipe = graph, recipe
        self.sources: dict[int, _Source] = {}
        self._origin: dict[int, tuple[int, int]] = {}
        self._weights = {p.storage: p.name for p in graph.parameters}
        self._modules: set[int] = set()  # of the linear layers
        products = [op for op in self._products() if not self._stays_wide(op)]
        forward = graph.op_phase == Phase.FORWARD
        for op in products:
            if forward[op]:
                self._forward(op)
        for op in products:
            if not forward[op] and int(graph.op_module[op]) in self._modules:
                self._backward(op)

    def _products(self) -> Iterator[int]:
        linear = np.array([_is_product(k) and k.target in _LINEAR for k in self.graph.kinds], dtype=np.bool_)
        in_step = self.graph.op_phase != Phase.OPTIMIZER
        yield from np.flatnonzero(linear[self.graph.op_kind] & in_step & (self.graph.op_layer >= 0)).tolist()

    def _stays_wide(self, op: int) -> bool:
        """Whether the op's block is one of the last that the recipe leaves in 16 bits."""
        layer = int(self.graph.op_layer[op])
        for block in self.graph.blocks:
            if layer in block.layers:
                wide = math.ceil(self.recipe.wide_blocks * len(block.layers))
                return block.layers.index(layer) >= len(block.layers) - wide
        return False

    def _operands(self, op: int) -> list[tuple[int, int, int]]:
        """(position, storage, tensor) of both operands, at the place before they were cast from another format."""
        kind = self.graph.kinds[self.graph.op_kind[op]]
        tensors = self.graph.op_inputs.row(op).tolist()
        return [(place, *self._before_cast(tensors[place])) for place in matmul_operands(kind)]

    def _before_cast(self, tensor: int) -> tuple[int, int]:
        graph = self.graph
        storage = int(graph.tensor_storage[tensor])
        if storage not in self._origin:
            made_by = int(graph.storage_alloc[storage])
            found = (storage, tensor)
            if made_by >= 0 and is_cast(graph.kinds[graph.op_kind[made_by]]):
                found = self._before_cast(int(graph.op_inputs.row(made_by)[0]))
            self._origin[storage] = found
        return self._origin[storage]

    def _forward(self, op: int) -> None:
        operands = self._operands(op)
        weights = [operand for operand in operands if operand[1] in self._weights]
        if len(weights) != 1 or self._is_router(weights[0][1]) or not self._fits(weights[0][2]):
            return
        self._modules.add(int(self.graph.op_module[op]))
        for place, storage, tensor in operands:
            role: Role = "weight" if storage in self._weights else "activation"
            self.sources.setdefault(storage, _Source(role, tensor)).rows.append((op, place))

    def _backward(self, op: int) -> None:
        """dgrad reads a weight that forward read; wgrad reads an input that forward read."""
        first, second = self._operands(op)
        for (place, storage, _), (other_place, other, tensor) in ((first, second), (second, first)):
            known = self.sources.get(storage)
            if known is None or known.role == "gradient" or other in self._weights:
                continue
            if known.role == "activation" and not self.recipe.wgrad:
                continue
            known.columns.append((op, place))
            gradient = self.sources.setdefault(other, _Source("gradient", tensor))
            (gradient.rows if known.role == "weight" else gradient.columns).append((op, other_place))
            return

    def _is_router(self, storage: int) -> bool:
        """A router's scores decide which experts run: `router`, or a `gate` beside `experts`."""
        parent, _, last = self._weights[storage].removesuffix(".weight").rpartition(".")
        if last != "gate" or not parent:
            return last == "router"
        return any(name.startswith(f"{parent}.experts.") for name in self._weights.values())

    def _fits(self, tensor: int) -> bool:
        shape = self.graph.shapes[self.graph.tensor_spec[tensor]]
        return all(size % self.recipe.multiple == 0 for size in shape[-2:])


def _format(recipe: Recipe, role: Role) -> str:
    return {"activation": recipe.activation, "weight": recipe.weight, "gradient": recipe.gradient}[role]


def _narrow(spec: TensorSpec, format: str) -> TensorSpec:
    return TensorSpec(spec.dims, format, bytes_of(format))


def _copies(recipe: Recipe, source: _Source) -> list[tuple[list[tuple[int, int]], ...]]:
    """The narrow copies of a source, each with the products that read it."""
    if not recipe.column_copy:
        return [(source.rows, source.columns)]
    return [(uses,) for uses in (source.rows, source.columns) if uses]


def _cast_before(edit: GraphEdit, recipe: Recipe, source: _Source) -> None:
    """A cast just before the first product that reads what it makes, and the products that read it."""
    uses = [*source.rows, *source.columns]
    if not uses:
        return
    graph, format = edit.graph, _format(recipe, source.role)
    first = min(op for op, _ in uses)
    phase = Phase(int(graph.op_phase[first]))
    where = (phase, int(graph.op_module[first]), int(graph.op_layer[first]))
    reads = [source.tensor, *_amax(edit, recipe, source, edit.place_before(first), where)]
    place = edit.place_before(first)
    spec = edit.spec(_narrow(_wide_spec(edit, source), format))
    copies, made = _copies(recipe, source), []
    for copy in copies:
        readers = [op for group in copy for op, _ in group]
        kept = phase == Phase.FORWARD and any(graph.op_phase[op] != Phase.FORWARD for op in readers)
        category = Category.ACTIVATIONS if kept else Category.TEMPORARY
        made.append(edit.tensor(spec, edit.storage(spec, category, place, max(readers))))
    edit.add(place, _cast(recipe, source, len(made)), where, reads, made)
    for copy, tensor in zip(copies, made, strict=True):
        _read(edit, recipe, copy, format, tensor)


def _cast_after_update(edit: GraphEdit, recipe: Recipe, source: _Source) -> None:
    """Copies of a weight that are there before the step and written anew at its end."""
    graph, format = edit.graph, _format(recipe, source.role)
    module = int(graph.op_module[(source.rows or source.columns)[0][0]])
    where = (Phase.OPTIMIZER, module, -1)
    reads = [source.tensor, *_amax(edit, recipe, source, edit.place_before(len(graph)), where)]
    spec = edit.spec(_narrow(_wide_spec(edit, source), format))
    copies = _copies(recipe, source)
    made = [edit.tensor(spec, edit.storage(spec, Category.WEIGHTS, -1, len(graph))) for _ in copies]
    place = edit.place_before(len(graph))
    edit.add(place, _cast(recipe, source, len(made)), where, reads, made)
    for copy, tensor in zip(copies, made, strict=True):
        _read(edit, recipe, copy, format, tensor)


def _wide_spec(edit: GraphEdit, source: _Source) -> TensorSpec:
    return edit.graph.specs[edit.tensor_spec[source.tensor]]


def _read(edit: GraphEdit, recipe: Recipe, copy: tuple[list[tuple[int, int]], ...], format: str, made: int) -> None:
    """Products read a narrow copy in the shape that they had, as a view of it where that is another."""
    graph = edit.graph
    for op, position in (use for group in copy for use in group):
        spec = edit.spec(_narrow(graph.specs[edit.tensor_spec[edit.inputs[op][position]]], format))
        tensor = made
        if spec != edit.tensor_spec[made]:
            tensor = edit.tensor(spec, edit.tensor_storage[made])
            where = (Phase(int(graph.op_phase[op])), int(graph.op_module[op]), int(graph.op_layer[op]))
            edit.add(edit.place_before(op), ("aten.view", "view", ()), where, [made], [tensor])
        edit.replace_inputs(op, {position: tensor}, {"layout": "TN"} if recipe.transposed else {})


def _amax(edit: GraphEdit, recipe: Recipe, source: _Source, place: float, where: tuple[Phase, int, int]) -> list[int]:
    """The pass that reads a tensor for its largest value, where the recipe needs it: the number that comes out."""
    if not recipe.tensor_amax:
        return []
    spec = edit.spec(TensorSpec((), "fp32", 4))
    made = edit.tensor(spec, edit.storage(spec, Category.TEMPORARY, place, place))
    edit.add(place, ("cosim.amax", "quantize", ()), where, [source.tensor], [made])
    return [made]


def _cast(recipe: Recipe, source: _Source, copies: int) -> tuple[str, str, tuple[tuple[str, object], ...]]:
    ops = recipe.cast_ops(source.role == "gradient", source.role == "weight", copies)
    access = "transpose" if recipe.transposed and copies > 1 else "stream"
    return "cosim.quantize", "quantize", (("access", access), ("vector_ops", ops))
