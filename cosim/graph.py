"""The graph that every stage speaks: one device's whole training step, in the order in which it ran.

An `OpGraph` is a set of columns: ops, tensors and storages are rows of integer arrays, and what many of them have in
common (`TensorSpec`, `OpKind`) is stored once, so that Llama-3-70B's 25 thousand ops are a megabyte on disk and a few
hundred kinds to price. Shapes are products of named axes: `bind` gives the same graph at another batch or sequence
length. `to_networkx` is the same thing for people and for graph algorithms.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import networkx

Ints = NDArray[np.int32]
Axis = str
Dim = tuple[Axis, ...]
"""One tensor dimension: the product of named axes; the empty product is 1."""


class Phase(IntEnum):
    """The part of the step that an op belongs to; the loss is forward."""

    FORWARD = 0
    BACKWARD = 1
    RECOMPUTE = 2
    OPTIMIZER = 3


class Category(IntEnum):
    """What a storage holds, as memory is reported."""

    WEIGHTS = 0
    GRADIENTS = 1
    OPTIMIZER = 2
    ACTIVATIONS = 3  # alive from forward into backward
    TEMPORARY = 4
    INPUTS = 5
    FRAMEWORK = 6


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and format of a tensor; `expanded` are the dimensions with stride 0, which hold no memory of their own."""

    dims: tuple[Dim, ...]
    dtype: str  # a name of hwmodels.number_formats (fp32, bf16, ...) or int64, int32, bool, ...
    itemsize: float  # bytes per element, its share of a block's scales included
    expanded: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class OpKind:
    """What ops that differ only in their data share: target, class of the vocabulary, operands and attributes.

    `inputs` and `outputs` are indices into `OpGraph.specs`, lists flattened; `mutated` are positions in `inputs` that
    are also written. `attributes` holds what costing needs (causal, dropout, layout TN/NN/NT, dim, ...).
    """

    target: str  # "aten.mm", "cosim.attention"
    op_class: str  # a key of cosim.trace.vocabulary
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    mutated: tuple[int, ...] = ()
    attributes: tuple[tuple[str, Any], ...] = ()

    def attribute(self, name: str, default: Any = None) -> Any:
        return next((value for key, value in self.attributes if key == name), default)


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of the module: qualified name, shape and format, and the block that it lives in (-1: none).

    PyTorch makes no gradient of a trainable parameter that is not `used` on the way to the loss, and so its optimizers
    no state.
    """

    name: str
    spec: int
    storage: int
    layer: int
    trainable: bool = True
    used: bool = True

    @property
    def trained(self) -> bool:
        """Whether it has a gradient."""
        return self.trainable and self.used


@dataclass(frozen=True, slots=True)
class Block:
    """A run of identical blocks, found in the traced ops; `path` has `*` for their number."""

    path: str
    layers: tuple[int, ...]  # values of `op_layer`, in forward order
    forward_ops: int  # ops per instance
    backward_ops: int

    def counted(self, op_layer: Ints, op_phase: NDArray[np.int8]) -> Block:
        """The same block with the ops that a rewritten graph has of it."""
        inside = op_phase[op_layer == self.layers[0]]
        forward, backward = (int((inside == phase).sum()) for phase in (Phase.FORWARD, Phase.BACKWARD))
        return dataclasses.replace(self, forward_ops=forward, backward_ops=backward)


@dataclass(frozen=True, slots=True)
class Csr:
    """Rows of different lengths: row i is `indices[indptr[i]:indptr[i + 1]]`."""

    indptr: Ints
    indices: Ints

    def row(self, i: int) -> Ints:
        return self.indices[self.indptr[i] : self.indptr[i + 1]]

    def __len__(self) -> int:
        return len(self.indptr) - 1

    @staticmethod
    def of(rows: list[list[int]] | list[tuple[int, ...]]) -> Csr:
        lengths = np.fromiter((len(row) for row in rows), dtype=np.int64, count=len(rows))
        indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        flat = [index for row in rows for index in row]
        return Csr(indptr, np.array(flat, dtype=np.int32))


@dataclass(frozen=True)
class OpGraph:
    """A traced training step. Row i of the `op_*` columns is the i-th op that ran; views are ops that cost nothing.

    `storage_alloc` and `storage_free` are op indices: the storage comes to life with op `alloc` (-1: before the step)
    and its memory is given back right after op `free` (number of ops: never within the step). They are PyTorch's own
    lifetimes, seen while tracing.
    """

    axes: Mapping[Axis, int]
    specs: tuple[TensorSpec, ...]
    kinds: tuple[OpKind, ...]
    modules: tuple[str, ...]
    op_kind: Ints
    op_phase: NDArray[np.int8]
    op_module: Ints
    op_layer: Ints  # which repeated block; -1 outside
    op_inputs: Csr  # tensors
    op_outputs: Csr  # tensors
    tensor_spec: Ints
    tensor_storage: Ints
    storage_spec: Ints
    storage_category: NDArray[np.int8]
    storage_alloc: Ints
    storage_free: Ints
    parameters: tuple[Parameter, ...]
    blocks: tuple[Block, ...]
    unknown_ops: Mapping[str, int]  # target -> how many; their cost is bytes moved
    provenance: Mapping[str, Any]  # what was traced, with which versions, in how many seconds

    def __len__(self) -> int:
        return len(self.op_kind)

    def bind(self, **sizes: int) -> OpGraph:
        """The same graph with other axis sizes, for example `bind(batch=2, sequence=8192)`; raises KeyError for an
        unknown axis.
        """
        for axis in sizes:
            if axis not in self.axes:
                raise KeyError(axis)
        return dataclasses.replace(self, axes={**self.axes, **sizes})

    def dim(self, dim: Dim) -> int:
        return math.prod(self.axes[axis] for axis in dim)

    @cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shape of every spec at the bound axis sizes."""
        return tuple(tuple(self.dim(dim) for dim in spec.dims) for spec in self.specs)

    @cached_property
    def spec_bytes(self) -> NDArray[np.int64]:
        """Bytes that a tensor of each spec occupies, stride-0 dimensions counted once."""
        sizes = [
            math.ceil(math.prod(size for i, size in enumerate(shape) if i not in spec.expanded) * spec.itemsize)
            for spec, shape in zip(self.specs, self.shapes, strict=True)
        ]
        return np.array(sizes, dtype=np.int64)

    @cached_property
    def storage_bytes(self) -> NDArray[np.int64]:
        """Bytes of every storage, without the allocator's rounding."""
        return self.spec_bytes[self.storage_spec]

    def parameter_count(self, trainable_only: bool = False) -> int:
        """Elements of all parameters; a tied one counts once."""
        seen = {p.storage: math.prod(self.shapes[p.spec]) for p in self.parameters if p.trainable or not trainable_only}
        return sum(seen.values())

    def to_networkx(self) -> networkx.DiGraph[int]:
        """Ops as nodes with their attributes; an edge from an op to each reader of what it made.

        Its attributes: how many tensors go from one to the other (`tensors`), the first of them (`tensor`), bytes of
        all, and whether they are saved from forward for backward.
        """
        import networkx

        graph: networkx.DiGraph[int] = networkx.DiGraph(axes=dict(self.axes))
        producer: dict[int, int] = {}
        for op in range(len(self)):
            kind = self.kinds[self.op_kind[op]]
            graph.add_node(
                op,
                target=kind.target,
                op_class=kind.op_class,
                phase=Phase(int(self.op_phase[op])).name.lower(),
                module=self.modules[self.op_module[op]],
                layer=int(self.op_layer[op]),
            )
            for tensor in dict.fromkeys(self.op_inputs.row(op).tolist()):
                source = producer.get(tensor)
                if source is None:
                    continue
                size = int(self.spec_bytes[self.tensor_spec[tensor]])
                if graph.has_edge(source, op):
                    graph.edges[source, op]["tensors"] += 1
                    graph.edges[source, op]["bytes"] += size
                    continue
                saved = self.op_phase[source] == Phase.FORWARD and self.op_phase[op] == Phase.BACKWARD
                graph.add_edge(source, op, tensor=tensor, tensors=1, bytes=size, saved=bool(saved))
            for tensor in self.op_outputs.row(op).tolist():
                producer[tensor] = op
        return graph
