"""A recording at probing sizes becomes an `OpGraph`: sizes are decoded into axes, storages sorted into categories,
blocks found.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from cosim.graph import Axis, Block, Category, Csr, Dim, OpGraph, OpKind, Parameter, Phase, TensorSpec
from cosim.trace.blocks import find_blocks, layer_of_path
from cosim.trace.recorder import Layout, Recording
from cosim.trace.sizes import SizeDecoder

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
    weights: set[int] = field(default_factory=set)  # storages
    gradients: set[int] = field(default_factory=set)
    optimizer: set[int] = field(default_factory=set)
    inputs: set[int] = field(default_factory=set)


def assemble(recording: Recording, roles: Roles, decoder: SizeDecoder, provenance: Mapping[str, Any]) -> OpGraph:
    """The graph of a recording, bound to the sizes at which it was recorded."""
    specs = _Specs(recording.layouts, decoder)
    kinds, kind_row = _kinds(recording, specs)
    storage_spec = [
        specs.of_storage(layout, size)
        for layout, size in zip(recording.storage_layout, recording.storage_bytes, strict=True)
    ]
    op_phase = np.array(recording.op_phase, dtype=np.int8)
    op_kind = np.array(kind_row, dtype=np.int32)[recording.op_kind] if recording.op_kind else np.zeros(0, np.int32)
    op_module = _with_neighbours(recording.op_module)
    blocks, op_layer, layers = find_blocks(recording.modules, op_module, op_kind, op_phase)
    count = len(op_kind)
    alloc = np.array(recording.storage_alloc, dtype=np.int32)
    free = np.array([count if op < 0 else op for op in recording.storage_free], dtype=np.int32)
    notes = {"shifted_sequence": True} if decoder.shifted else {}
    return OpGraph(
        axes=specs.axes,
        specs=tuple(specs.rows),
        kinds=kinds,
        modules=tuple(recording.modules),
        op_kind=op_kind.astype(np.int32),
        op_phase=op_phase,
        op_module=op_module,
        op_layer=op_layer,
        op_inputs=Csr.of(recording.op_inputs),
        op_outputs=Csr.of(recording.op_outputs),
        tensor_spec=np.array([specs.of_layout[i] for i in recording.tensor_layout], dtype=np.int32),
        tensor_storage=np.array(recording.tensor_storage, dtype=np.int32),
        storage_spec=np.array(storage_spec, dtype=np.int32),
        storage_category=_categories(alloc, free, op_phase, roles),
        storage_alloc=alloc,
        storage_free=free,
        parameters=tuple(
            Parameter(
                name,
                specs.of_layout[recording.tensor_layout[tensor]],
                recording.tensor_storage[tensor],
                layer_of_path(name, layers),
                trainable,
            )
            for name, tensor, trainable in roles.parameters
        ),
        blocks=blocks,
        unknown_ops=_unknown(kinds, op_kind),
        provenance={**provenance, **notes},
    )


class _Specs:
    """Interned TensorSpecs: `of_layout` is the row of each layout, `axes` the size of every axis used."""

    def __init__(self, layouts: Sequence[Layout], decoder: SizeDecoder) -> None:
        self.rows: list[TensorSpec] = []
        self.axes: dict[Axis, int] = {}
        if decoder.batch is not None:
            self.axes["batch"] = decoder.batch
        if decoder.sequence is not None:
            self.axes["sequence"] = decoder.sequence
        self.layouts = layouts
        self._decoder = decoder
        self._known: dict[TensorSpec, int] = {}
        self.of_layout = [self._of_layout(layout) for layout in layouts]

    def _of_layout(self, layout: Layout) -> int:
        shape, strides, dtype = layout
        expanded = tuple(i for i, stride in enumerate(strides) if stride == 0 and shape[i] > 1)
        return self._intern(shape, dtype, expanded)

    def of_storage(self, layout: int, size: int) -> int:
        """The spec of a storage of `size` bytes on which a tensor of `layout` was seen first: that tensor's, if it
        fills it.
        """
        shape, strides, dtype = self.layouts[layout]
        own = math.prod(n for n, stride in zip(shape, strides, strict=True) if stride or n == 1)
        if own * dtype.itemsize == size:
            return self.of_layout[layout]
        return self._intern((size // dtype.itemsize,), dtype, ())

    def _intern(self, shape: tuple[int, ...], dtype: torch.dtype, expanded: tuple[int, ...]) -> int:
        dims: tuple[Dim, ...] = tuple(self._decoder.dim(size) for size in shape)
        for dim, size in zip(dims, shape, strict=True):
            for axis in dim:
                if axis not in self.axes:
                    self.axes[axis] = self._decoder.factors(size)[2]
        name = FORMAT_NAMES.get(dtype, str(dtype).removeprefix("torch."))
        spec = TensorSpec(dims, name, dtype.itemsize, expanded)
        row = self._known.get(spec)
        if row is None:
            row = self._known[spec] = len(self.rows)
            self.rows.append(spec)
        return row


def _kinds(recording: Recording, specs: _Specs) -> tuple[tuple[OpKind, ...], list[int]]:
    """Distinct kinds once strides are forgotten (a matmul keeps them as its layout), and the row of each recorded
    kind.
    """
    rows: list[int] = []
    known: dict[OpKind, int] = {}
    for target, op_class, inputs, outputs, mutated, attributes in recording.kinds:
        if op_class == "matmul":
            attributes = (*attributes, ("layout", _blas_layout([recording.layouts[i] for i in inputs[-2:]])))
        kind = OpKind(
            target,
            op_class,
            tuple(specs.of_layout[i] for i in inputs),
            tuple(specs.of_layout[i] for i in outputs),
            mutated,
            attributes,
        )
        rows.append(known.setdefault(kind, len(known)))
    return tuple(known), rows


def _blas_layout(operands: list[Layout]) -> str:
    """Column-major BLAS sees C' = B' A': the second operand's letter comes first (TN forward, NN dgrad, NT wgrad)."""
    letters = ["T" if len(strides) > 1 and strides[-2] == 1 and strides[-1] > 1 else "N" for _, strides, _ in operands]
    layout = letters[1] + letters[0]
    return "TN" if layout == "TT" else layout


def _with_neighbours(modules: list[int]) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """Ops without a module (gradient accumulation) take that of the op before them."""
    filled: list[int] = []
    for module in modules:
        filled.append(module if module >= 0 else (filled[-1] if filled else 0))
    return np.array(filled, dtype=np.int32)


def _categories(
    alloc: np.ndarray[tuple[int], np.dtype[np.int32]],
    free: np.ndarray[tuple[int], np.dtype[np.int32]],
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


def _unknown(kinds: tuple[OpKind, ...], op_kind: np.ndarray[tuple[int], np.dtype[np.int32]]) -> dict[str, int]:
    counts = np.bincount(op_kind, minlength=len(kinds))
    found: dict[str, int] = {}
    for kind, count in zip(kinds, counts.tolist(), strict=True):
        if kind.op_class == "unknown" and count:
            found[kind.target] = found.get(kind.target, 0) + count
    return found


__all__ = ["Block", "Roles", "assemble"]
