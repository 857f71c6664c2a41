"""A recording at probing sizes becomes an `OpGraph`: sizes are decoded into axes, storages sorted into categories,
blocks found.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from cosim.graph import Axis, Block, Category, Csr, Dim, Ints, OpGraph, OpKind, Parameter, Phase, TensorSpec
from cosim.trace.axes import Named, Operation, TensorAxes, name_axes, representatives
from cosim.trace.blocks import find_blocks, layer_of_path
from cosim.trace.recorder import Layout, Recording
from cosim.trace.sizes import SizeDecoder, anonymous
from cosim.trace.vocabulary import matmul_operands

FORMAT_NAMES: Mapping[torch.dtype, str] = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8_e4m3",
    torch.float8_e5m2: "fp8_e5m2",
}


@dataclass(slots=True)
class Roles:
    """Which tensors and storages of a recording are what, as rows."""

    parameters: list[tuple[str, int, bool]] = field(default_factory=list)  # name, tensor, trainable
    unused: set[str] = field(default_factory=set)  # names of trainable parameters of which there is no gradient
    weights: set[int] = field(default_factory=set)  # storages
    gradients: set[int] = field(default_factory=set)
    optimizer: set[int] = field(default_factory=set)
    inputs: set[int] = field(default_factory=set)


def assemble(recording: Recording, roles: Roles, decoder: SizeDecoder, provenance: Mapping[str, Any]) -> OpGraph:
    """The graph of a recording, bound to the sizes at which it was recorded."""
    kind_row, kinds = _kinds(recording)
    op_phase = np.array(recording.op_phase, dtype=np.int8)
    op_kind = np.array([kind_row[kind] for kind in recording.op_kind], dtype=np.int32)
    op_module = _with_neighbours(recording.op_module)
    blocks, op_layer, layers = find_blocks(recording.modules, op_module, op_kind, op_phase)
    specs = _Specs(recording, decoder, _named(recording, roles, decoder, kinds, op_kind, op_layer, blocks))
    op_kind, kinds = _spec_kinds(recording, kinds, op_kind, specs.of_tensor)
    count = len(op_kind)
    alloc = np.array(recording.storage_alloc, dtype=np.int32)
    free = np.array([count if op < 0 else op for op in recording.storage_free], dtype=np.int32)
    notes = {"shifted_sequence": True} if decoder.shifted else {}
    return OpGraph(
        axes=specs.axes,
        specs=tuple(specs.rows),
        kinds=kinds,
        modules=tuple(recording.modules),
        op_kind=op_kind,
        op_phase=op_phase,
        op_module=op_module,
        op_layer=op_layer,
        op_inputs=Csr.of(recording.op_inputs),
        op_outputs=Csr.of(recording.op_outputs),
        tensor_spec=np.array(specs.of_tensor, dtype=np.int32),
        tensor_storage=np.array(recording.tensor_storage, dtype=np.int32),
        storage_spec=np.array(specs.of_storages(), dtype=np.int32),
        storage_category=_categories(alloc, free, op_phase, roles),
        storage_alloc=alloc,
        storage_free=free,
        parameters=tuple(
            Parameter(
                name,
                specs.of_tensor[tensor],
                recording.tensor_storage[tensor],
                layer_of_path(name, layers),
                trainable,
                name not in roles.unused,
            )
            for name, tensor, trainable in roles.parameters
        ),
        blocks=blocks,
        unknown_ops=_unknown(kinds, op_kind),
        provenance={**provenance, **notes},
    )


@dataclass(slots=True)
class _Naming:
    """Names of axes, and the tensor that stands for each tensor."""

    named: Named
    stands_for: list[int]


def _named(
    recording: Recording,
    roles: Roles,
    decoder: SizeDecoder,
    kinds: tuple[OpKind, ...],
    op_kind: Ints,
    op_layer: Ints,
    blocks: tuple[Block, ...],
) -> _Naming:
    """Names for the axes of every tensor; repeated blocks are looked at once."""
    rows = [(*reads, *makes) for reads, makes in zip(recording.op_inputs, recording.op_outputs, strict=True)]
    phases = np.array(recording.op_phase, dtype=np.int8)
    layers = [block.layers for block in blocks]
    ops, stands_for = representatives(op_layer, phases, layers, rows, len(recording.tensor_layout))
    shapes = [recording.layouts[layout][:2] for layout in recording.tensor_layout]
    operations = [
        Operation(
            kinds[op_kind[op]],
            recording.op_phase[op],
            [stands_for[tensor] for tensor in recording.op_inputs[op]],
            [stands_for[tensor] for tensor in recording.op_outputs[op]],
        )
        for op in ops
    ]
    inputs = {stands_for[tensor] for tensor, storage in enumerate(recording.tensor_storage) if storage in roles.inputs}
    return _Naming(name_axes(TensorAxes(shapes, decoder), operations, inputs), stands_for)


class _Specs:
    """Interned TensorSpecs: `of_tensor` is the row of each tensor, `axes` the size of every axis used."""

    def __init__(self, recording: Recording, decoder: SizeDecoder, naming: _Naming) -> None:
        self.rows: list[TensorSpec] = []
        self._recording, self._decoder, self._naming = recording, decoder, naming
        self._known: dict[TensorSpec, int] = {}
        self._seen: dict[tuple[int, int], int] = {}
        self.of_tensor = [self._of_tensor(t, layout) for t, layout in enumerate(recording.tensor_layout)]
        self._flat: dict[Axis, int] = {}

    @property
    def axes(self) -> dict[Axis, int]:
        """Every axis that a spec uses, at the size at which it was recorded; batch and sequence where they can be
        bound.
        """
        probes = {"batch": self._decoder.batch, "sequence": self._decoder.sequence}
        bindable = {axis: size for axis, size in probes.items() if size is not None}
        sizes = {**self._naming.named.sizes, **self._flat}
        used = {axis: None for spec in self.rows for dim in spec.dims for axis in dim}
        return {**bindable, **{axis: sizes[axis] for axis in used if axis not in bindable}}

    def _of_tensor(self, tensor: int, layout: int) -> int:
        place = (self._naming.stands_for[tensor], layout)
        row = self._seen.get(place)
        if row is None:
            shape, strides, dtype = self._recording.layouts[layout]
            expanded = tuple(i for i, stride in enumerate(strides) if stride == 0 and shape[i] > 1)
            row = self._seen[place] = self._intern(self._naming.named.dims(place[0]), dtype, expanded)
        return row

    def of_storages(self) -> list[int]:
        """The spec of each storage: that of the first tensor seen on it if it fills it, else one dimension."""
        recording = self._recording
        first: dict[int, int] = {}
        for tensor, storage in enumerate(recording.tensor_storage):
            first.setdefault(storage, tensor)
        return [self._of_storage(first[storage], size) for storage, size in enumerate(recording.storage_bytes)]

    def _of_storage(self, tensor: int, size: int) -> int:
        shape, strides, dtype = self._recording.layouts[self._recording.tensor_layout[tensor]]
        own = math.prod(n for n, stride in zip(shape, strides, strict=True) if stride or n == 1)
        if own * dtype.itemsize == size:
            return self.of_tensor[tensor]
        elements = size // dtype.itemsize
        rest = self._decoder.factors(elements)[2]
        self._flat[anonymous(rest)] = rest
        return self._intern((self._decoder.dim(elements),), dtype, ())

    def _intern(self, dims: tuple[Dim, ...], dtype: torch.dtype, expanded: tuple[int, ...]) -> int:
        name = FORMAT_NAMES.get(dtype, str(dtype).removeprefix("torch."))
        spec = TensorSpec(dims, name, dtype.itemsize, expanded)
        row = self._known.get(spec)
        if row is None:
            row = self._known[spec] = len(self.rows)
            self.rows.append(spec)
        return row


def _kinds(recording: Recording) -> tuple[list[int], tuple[OpKind, ...]]:
    """The row of each recorded kind among those that are distinct once strides are forgotten, with plain layouts as
    specs.

    A matmul keeps its strides as its layout.
    """
    plain: dict[tuple[object, ...], int] = {}
    of_layout = [
        plain.setdefault((shape, dtype, tuple(stride == 0 for stride in strides)), len(plain))
        for shape, strides, dtype in recording.layouts
    ]
    rows: list[int] = []
    known: dict[OpKind, int] = {}
    for target, op_class, inputs, outputs, mutated, attributes in recording.kinds:
        reads, makes = (tuple(of_layout[i] for i in layouts) for layouts in (inputs, outputs))
        kind = OpKind(target, op_class, reads, makes, mutated, attributes)
        if op_class == "matmul":
            operands = [recording.layouts[inputs[place]] for place in matmul_operands(kind)]
            kind = dataclasses.replace(kind, attributes=(*attributes, ("layout", _blas_layout(operands))))
        rows.append(known.setdefault(kind, len(known)))
    return rows, tuple(known)


def _spec_kinds(
    recording: Recording, kinds: tuple[OpKind, ...], op_kind: Ints, spec_of: list[int]
) -> tuple[Ints, tuple[OpKind, ...]]:
    """The kind of each op, and the kinds, in terms of specs with named axes."""
    rows: list[int] = []
    known: dict[tuple[int, tuple[int, ...], tuple[int, ...]], int] = {}
    named: list[OpKind] = []
    for kind, reads, makes in zip(op_kind.tolist(), recording.op_inputs, recording.op_outputs, strict=True):
        key = (kind, tuple([spec_of[t] for t in reads]), tuple([spec_of[t] for t in makes]))
        row = known.get(key)
        if row is None:
            row = known[key] = len(named)
            named.append(dataclasses.replace(kinds[kind], inputs=key[1], outputs=key[2]))
        rows.append(row)
    return np.array(rows, dtype=np.int32), tuple(named)


def _blas_layout(operands: list[Layout]) -> str:
    """Column-major BLAS sees C' = B' A': the second operand's letter comes first (TN forward, NN dgrad, NT wgrad)."""
    letters = ["T" if len(strides) > 1 and strides[-2] == 1 and strides[-1] > 1 else "N" for _, strides, _ in operands]
    layout = letters[1] + letters[0]
    return "TN" if layout == "TT" else layout


def _with_neighbours(modules: list[int]) -> Ints:
    """Ops without a module (gradient accumulation) take that of the op before them."""
    filled: list[int] = []
    for module in modules:
        filled.append(module if module >= 0 else (filled[-1] if filled else 0))
    return np.array(filled, dtype=np.int32)


def _categories(
    alloc: Ints,
    free: Ints,
    op_phase: np.ndarray[tuple[int], np.dtype[np.int8]],
    roles: Roles,
) -> np.ndarray[tuple[int], np.dtype[np.int8]]:
    """What each storage holds; activations are made in forward and die in backward or later."""
    later = np.flatnonzero(op_phase != Phase.FORWARD)
    first_backward = int(later[0]) if len(later) else len(op_phase)
    category = np.full(len(alloc), int(Category.TEMPORARY), dtype=np.int8)
    category[(alloc >= 0) & (alloc < first_backward) & (free >= first_backward)] = Category.ACTIVATIONS
    category[alloc < 0] = Category.INPUTS
    for rows, name in (
        (roles.inputs, Category.INPUTS),
        (roles.gradients, Category.GRADIENTS),
        (roles.optimizer, Category.OPTIMIZER),
        (roles.weights, Category.WEIGHTS),
    ):
        category[list(rows)] = name
    return category


def _unknown(kinds: tuple[OpKind, ...], op_kind: Ints) -> dict[str, int]:
    counts = np.bincount(op_kind, minlength=len(kinds))
    found: dict[str, int] = {}
    for kind, count in zip(kinds, counts.tolist(), strict=True):
        if kind.op_class == "unknown" and count:
            found[kind.target] = found.get(kind.target, 0) + count
    return found
