"""Names the axes of every tensor dimension: sizes that operators force to be the same are the same axis.

Each dimension's coefficient (what is left of its size without batch and sequence) starts as one atom. Operators unite
atoms: a product unites its inner dimensions, pointwise arithmetic the dimensions that it aligns, a view splits an
atom into the atoms of the other shape (4096 = 32 heads x 128). Names start where their meaning is known, at
attention, embeddings and norms, and what no operator names stays `size_N`. A wrong or missing union costs a name,
never a size: only equal sizes are united.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cosim.graph import Axis, Dim, OpKind, Phase
from cosim.trace.sizes import SizeDecoder, anonymous
from cosim.trace.vocabulary import matmul_operands

Atoms = list[int]
Shape = tuple[int, ...]
_OF_EXPERTS = ("cosim.grouped_mm",)
_PERMUTING = frozenset(f"aten.{name}" for name in ("t", "transpose", "permute", "movedim", "t_", "transpose_"))


class Unifier:
    """Atoms with sizes; `unite` makes two products of atoms the same, splitting atoms where sizes ask for it."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self._parent: list[int] = []
        self._parts: dict[int, tuple[int, int]] = {}

    def new(self, size: int) -> int:
        """A fresh atom."""
        self.sizes.append(size)
        self._parent.append(len(self._parent))
        return len(self._parent) - 1

    def find(self, atom: int) -> int:
        """The atom that stands for all that `atom` was united with."""
        while self._parent[atom] != atom:
            self._parent[atom] = self._parent[self._parent[atom]]
            atom = self._parent[atom]
        return atom

    def leaves(self, atoms: Atoms) -> Atoms:
        """The product of atoms in its finest known factors."""
        found: Atoms = []
        for atom in atoms:
            root = self.find(atom)
            found += self.leaves(list(self._parts[root])) if root in self._parts else [root]
        return found

    def unite(self, left: Atoms, right: Atoms) -> None:
        """Make two products of atoms of equal total size the same, factor by factor; stop where they do not align."""
        a, b = deque(self.leaves(left)), deque(self.leaves(right))
        while a and b:
            x, y = self._next(a), self._next(b)
            if x == y:
                continue
            sx, sy = self.sizes[x], self.sizes[y]
            if sx == sy:
                self._parent[y] = x
            elif sx % sy == 0:
                a.appendleft(self._split(x, y))
            elif sy % sx == 0:
                b.appendleft(self._split(y, x))
            else:
                return

    def _next(self, atoms: deque[int]) -> int:
        """Take the first atom, split first if it was split meanwhile."""
        first = self.leaves([atoms.popleft()])
        atoms.extendleft(reversed(first[1:]))
        return first[0]

    def _split(self, large: int, small: int) -> int:
        """`large` becomes `small` times a new atom, which is returned."""
        rest = self.new(self.sizes[large] // self.sizes[small])
        self._parts[large] = (small, rest)
        return rest


@dataclass(slots=True)
class TensorAxes:
    """Atoms of each dimension of each representative tensor, made when first asked for."""

    shapes: Sequence[tuple[Shape, Shape]]  # (shape, strides) of each tensor
    decoder: SizeDecoder
    unifier: Unifier = field(default_factory=Unifier)
    _known: dict[int, list[Atoms]] = field(default_factory=dict)

    def of(self, tensor: int) -> list[Atoms]:
        """Per dimension, its coefficient as a product of atoms; the empty product is 1."""
        known = self._known.get(tensor)
        if known is None:
            coefficients = [self.decoder.factors(size)[2] for size in self.shapes[tensor][0]]
            known = self._known[tensor] = [[self.unifier.new(c)] if c > 1 else [] for c in coefficients]
        return known

    def same(self, left: Atoms, right: Atoms) -> None:
        """Unite two dimensions if their coefficients have the same size."""
        sizes = self.unifier.sizes
        if left and right and math.prod(sizes[a] for a in left) == math.prod(sizes[a] for a in right):
            self.unifier.unite(left, right)

    def aligned(self, left: int, right: int, at_right: bool = True) -> None:
        """Unite the dimensions of two tensors position by position, counted from the last (or the first)."""
        a, b = self.of(left), self.of(right)
        pairs = zip(reversed(a), reversed(b), strict=False) if at_right else zip(a, b, strict=False)
        for one, two in pairs:
            self.same(one, two)


def unite_through(axes: TensorAxes, kind: OpKind, inputs: list[int], outputs: list[int]) -> None:
    """Unite what an operator of this kind forces to be the same."""
    op_class, target = kind.op_class, kind.target
    if op_class == "matmul" and len(inputs) >= 2:
        _unite_matmul(axes, kind, inputs, outputs)
    elif op_class in ("attention", "attention_backward"):
        _unite_attention(axes, inputs, outputs, op_class == "attention_backward")
    elif target == "aten.embedding" or target == "aten.embedding_dense_backward":
        axes.same(axes.of(inputs[0])[-1], axes.of(outputs[0])[-1])
    elif op_class == "optimizer" or "_foreach_" in target:
        _unite_lists(axes, kind, inputs, outputs)
    elif op_class == "reduction":
        for output in outputs:
            ranks = len(axes.of(inputs[0])) - len(axes.of(output)) if inputs else 1
            if ranks == 0:
                axes.aligned(inputs[0], output)
    elif op_class == "view" and inputs and outputs:
        _unite_view(axes, target, inputs[0], outputs)
    else:
        anchor = (outputs or inputs)[:1]
        for tensor in (*inputs, *outputs):
            for first in anchor:
                axes.aligned(first, tensor)


def _unite_matmul(axes: TensorAxes, kind: OpKind, inputs: list[int], outputs: list[int]) -> None:
    left, right = matmul_operands(kind)
    a, b = axes.of(inputs[left]), axes.of(inputs[right])
    if len(a) < 2 or len(b) < 2:
        return
    axes.same(a[-1], b[-2])
    for output in outputs[:1]:
        c = axes.of(output)
        axes.same(a[-2], c[-2])
        axes.same(b[-1], c[-1])
        if len(a) == len(b) == len(c):
            for one, two, made in zip(a[:-2], b[:-2], c[:-2], strict=True):
                axes.same(one, made)
                axes.same(two, made)
        for bias in inputs[:left] if kind.target.startswith("aten.") else []:
            axes.aligned(bias, output)


def _unite_attention(axes: TensorAxes, inputs: list[int], outputs: list[int], backward: bool) -> None:
    q, k, v = inputs[backward : backward + 3]
    like_q = [outputs[0]] if not backward else [inputs[0], inputs[4], outputs[0]]
    like_q += [outputs[1]] if not backward else []  # row statistics (batch, heads, sequence)
    for tensor in like_q:
        axes.aligned(q, tensor, at_right=False)
    if backward and len(outputs) >= 3:
        axes.aligned(k, outputs[1])
        axes.aligned(v, outputs[2])
    axes.aligned(k, v)
    axes.aligned(q, k)  # head_dim; heads too where there are as many


def _unite_lists(axes: TensorAxes, kind: OpKind, inputs: list[int], outputs: list[int]) -> None:
    """Lists of tensors one after the other (parameters, gradients, moments): the i-th of each are shaped alike."""
    run = next((i for i, place in enumerate(kind.mutated) if place != i), len(kind.mutated))
    count = len(outputs) or run
    for i, tensor in enumerate(inputs if count else []):
        first = outputs[i % count] if outputs else inputs[i % count]
        if axes.shapes[first][0] == axes.shapes[tensor][0]:
            axes.aligned(first, tensor)


def _unite_view(axes: TensorAxes, target: str, source: int, outputs: list[int]) -> None:
    before, strides = axes.shapes[source]
    for output in outputs:
        after, new_strides = axes.shapes[output]
        if target in _PERMUTING:
            places = {(size, stride): i for i, (size, stride) in enumerate(zip(before, strides, strict=True))}
            for i, place in enumerate(zip(after, new_strides, strict=True)):
                if place in places:
                    axes.same(axes.of(source)[places[place]], axes.of(output)[i])
        elif math.prod(before) == math.prod(after):
            flat = [[atom for dim in axes.of(tensor) for atom in dim] for tensor in (source, output)]
            axes.unifier.unite(*flat)
        else:
            axes.aligned(source, output, at_right=False)
    pieces = axes.shapes[outputs[0]][0]
    packed = len(before) in (2, 3) and len(outputs) > 1 and before[:-1] == pieces[:-1]
    if packed and before[-1] == len(outputs) * pieces[-1]:  # q, k and v, or gate and up, from one projection
        axes.unifier.unite([axes.unifier.new(len(outputs)), *axes.of(outputs[0])[-1]], axes.of(source)[-1])
        for output in outputs[1:]:
            axes.aligned(outputs[0], output)


@dataclass(slots=True)
class Named:
    """Names of united atoms."""

    axes: TensorAxes
    sizes: dict[Axis, int]
    _names: dict[int, Axis] = field(default_factory=dict)

    def give(self, atoms: Atoms, name: Axis) -> None:
        """Name a dimension that is one atom, unless it has a name; another size of the same name gets a number."""
        leaves = self.axes.unifier.leaves(atoms)
        if len(leaves) != 1 or leaves[0] in self._names:
            return
        size, number, unique = self.axes.unifier.sizes[leaves[0]], 1, name
        while self.sizes.setdefault(unique, size) != size:
            number += 1
            unique = f"{name}_{number}"
        self._names[leaves[0]] = unique

    def named(self, atoms: Atoms) -> bool:
        """Whether every factor of a dimension has a name."""
        return all(leaf in self._names for leaf in self.axes.unifier.leaves(atoms))

    def dims(self, tensor: int) -> tuple[Dim, ...]:
        """The dimensions of a tensor as products of axes, batch and sequence first."""
        found: list[Dim] = []
        for atoms, size in zip(self.axes.of(tensor), self.axes.shapes[tensor][0], strict=True):
            batches, sequences, rest = self.axes.decoder.factors(size)
            names = [self._name(leaf) for leaf in self.axes.unifier.leaves(atoms)] if rest != 1 else []
            if rest == 0:
                self.sizes[anonymous(0)] = 0
                names = [anonymous(0)]
            found.append(("batch",) * batches + ("sequence",) * sequences + tuple(names))
        return tuple(found)

    def _name(self, leaf: int) -> Axis:
        name = self._names.get(leaf)
        if name is None:
            size = self.axes.unifier.sizes[leaf]
            name = self._names[leaf] = anonymous(size)
            self.sizes[name] = size
        return name


@dataclass(frozen=True, slots=True)
class Operation:
    """An op of the recording in terms of the tensors that stand for its own."""

    kind: OpKind
    phase: int
    inputs: list[int]
    outputs: list[int]


def name_axes(axes: TensorAxes, operations: Sequence[Operation], step_inputs: set[int]) -> Named:
    """Unite atoms through the operations and name them; `step_inputs` are the tensors of tokens and labels."""
    for op in operations:
        unite_through(axes, op.kind, op.inputs, op.outputs)
    named = Named(axes, {})
    forward = [op for op in operations if op.phase == Phase.FORWARD]
    _unite_tables_of_experts(axes, forward)
    for op in forward:  # before norms of heads and tables of biases per head, which look like those of hidden
        _name_attention(named, op)
    for op in forward:
        if op.kind.target == "aten.embedding":
            table = axes.of(op.inputs[0])
            named.give(table[-1], "hidden")
            named.give(table[0], "vocabulary" if op.inputs[1] in step_inputs else "positions")
        elif op.kind.target in ("aten._log_softmax", "cosim.cross_entropy"):
            named.give(axes.of(op.inputs[0])[-1], "vocabulary")
        elif op.kind.op_class == "norm":
            named.give(axes.of(op.inputs[0])[-1], "hidden")
        elif op.kind.target in _OF_EXPERTS:
            named.give(axes.of(op.inputs[1])[0], "experts")
    products = [axes.of(op.inputs[-1]) for op in forward if op.kind.target in ("aten.mm", "aten.addmm")]
    products += [axes.of(op.inputs[1])[-2:] for op in forward if op.kind.target in _OF_EXPERTS]
    contracted = {leaf for inner, _ in products for leaf in axes.unifier.leaves(inner)}
    for inner, outer in products:
        for leaf in axes.unifier.leaves(outer):
            if leaf in contracted and named.named(inner):
                named.give([leaf], "ffn")
    return named


def _unite_tables_of_experts(axes: TensorAxes, forward: Sequence[Operation]) -> None:
    """Experts' biases are rows of tables, one per expert: picked by index and added to what experts make."""
    tables: dict[int, int] = {}
    made: set[int] = set()
    for op in forward:
        if op.kind.target in _OF_EXPERTS:
            made.update(op.outputs)
            experts = axes.of(op.inputs[1])[0]
        elif op.kind.target == "aten.index_select":
            tables[op.outputs[0]] = op.inputs[0]
        elif op.kind.target == "aten._to_copy" and op.inputs[0] in tables:
            tables[op.outputs[0]] = tables[op.inputs[0]]
        elif op.kind.target == "aten.add" and not made.isdisjoint(op.inputs):
            for table in (tables[tensor] for tensor in op.inputs if tensor in tables):
                axes.same(axes.of(table)[0], experts)


def _name_attention(named: Named, op: Operation) -> None:
    """Heads and head_dim of attention as one op, or of its products and softmax."""
    axes = named.axes
    if op.kind.op_class == "attention":
        q, k = (axes.of(tensor) for tensor in op.inputs[:2])
        _name_heads(named, q[1])
        named.give(k[1], "kv_heads")
        named.give(q[3], "head_dim")
    elif op.kind.op_class == "softmax" and _is_scores(axes, op.outputs[0]):
        if len(axes.of(op.outputs[0])) == 4:
            _name_heads(named, axes.of(op.outputs[0])[1])
    elif op.kind.target == "aten.bmm" and _is_scores(axes, op.outputs[0]):
        named.give(axes.of(op.inputs[-1])[-2], "head_dim")
    elif op.kind.target == "aten.bmm" and _is_scores(axes, op.inputs[0]):
        named.give(axes.of(op.inputs[-1])[-1], "head_dim")


def _name_heads(named: Named, atoms: Atoms) -> None:
    """The axis of heads: one, or with grouped queries the product of key-value heads and queries per group."""
    leaves = named.axes.unifier.leaves(atoms)
    for leaf, name in zip(leaves, ("heads",) if len(leaves) == 1 else ("kv_heads", "groups"), strict=False):
        named.give([leaf], name)


def _is_scores(axes: TensorAxes, tensor: int) -> bool:
    """Whether the last two dimensions are sequence by sequence."""
    return [axes.decoder.factors(size) for size in axes.shapes[tensor][0][-2:]] == [(0, 1, 1), (0, 1, 1)]


def representatives(
    op_layer: NDArray[np.int32],
    op_phase: NDArray[np.int8],
    blocks: Sequence[Sequence[int]],
    rows: Sequence[tuple[int, ...]],
    tensors: int,
) -> tuple[list[int], list[int]]:
    """(ops to look at, the tensor that stands for each tensor): repeated blocks are looked at once.

    `blocks` are the layers of each block, `rows` every op's inputs and outputs. Tensors at the same place of two
    instances of a block stand for each other.
    """
    parent = list(range(tensors))

    def find(tensor: int) -> int:
        while parent[tensor] != tensor:
            parent[tensor] = parent[parent[tensor]]
            tensor = parent[tensor]
        return tensor

    skipped: set[int] = set()
    of_layer: dict[int, list[int]] = {}
    inside = np.flatnonzero((op_layer >= 0) & (op_phase != Phase.OPTIMIZER))
    for op, layer in zip(inside.tolist(), op_layer[inside].tolist(), strict=True):
        of_layer.setdefault(layer, []).append(op)
    for layers in blocks:
        ops = {layer: of_layer.get(layer, []) for layer in layers}
        first = ops[layers[0]]
        for layer in layers[1:]:
            skipped.update(ops[layer])
            for model, copy in zip(first, ops[layer], strict=True):
                for one, two in zip(rows[model], rows[copy], strict=True):
                    a, b = find(one), find(two)
                    if a != b:
                        parent[max(a, b)] = min(a, b)
    return [op for op in range(len(rows)) if op not in skipped], [find(tensor) for tensor in range(tensors)]
