"""One walk over the ops of a step: each tensor's layout on a rank, and what must be sent before an op can run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import repeat

from cosim.graph import OpGraph, OpKind, Phase, TensorSpec
from cosim.parallel.layout import (
    EXPERT,
    EXPERTS,
    PARTIAL,
    PENDING,
    SEQUENCE,
    SHAPING,
    SHARD,
    TENSOR_AXES,
    WHOLE,
    Layout,
    Sharding,
    has,
    rewritten,
)
from cosim.parallel.rewriting import NOWHERE, GraphWriter, Operand
from cosim.parallel.row_statistics import row_statistics

_CONTRACTING = frozenset(
    [
        "matmul",
        "reduction",
        "norm_backward",
        "gather",
        "scatter",
        "convolution",
        "loss",
        "attention_backward",
        "unknown",
    ]
)
_LINEAR = frozenset(f"aten.{name}" for name in ("add", "add_", "sub", "neg", "mul", "mul_", "div", "div_"))
_CASTS = ("aten._to_copy", "aten.clone", "prims.convert_element_type")


@dataclass(frozen=True, slots=True)
class _Plan:
    """What becomes of an op of one kind on operands of one layout, where nothing is sent."""

    kind: int
    shapes: tuple[Layout, ...]  # the flags of operands that decide their shapes
    results: tuple[Layout, ...]
    same_numbers: bool
    makes_terms: bool


@dataclass(frozen=True, slots=True)
class _Sum:
    """A sum of a whole and a partial tensor that waits for more terms; `op` makes it."""

    whole: int
    partial: int
    op: int


@dataclass(slots=True)
class Walk:
    """The state of the walk: each tensor's layout, and which tensors are views or casts of the same numbers."""

    graph: OpGraph
    sharding: Sharding
    writer: GraphWriter = field(init=False)
    layout: list[Layout] = field(init=False)
    floating: list[bool] = field(init=False)  # by spec, as the next three
    experts: list[bool] = field(init=False)
    _tensor_axis: list[bool] = field(init=False)
    _sequence: list[bool] = field(init=False)
    spec: list[int] = field(init=False)
    _root: list[int] = field(init=False)
    _members: dict[int, list[int]] = field(default_factory=dict)
    _gathered: dict[tuple[int, int], int] = field(default_factory=dict)  # (root, scope) -> the tensor that was
    _maker: dict[int, int] = field(default_factory=dict)  # partial tensor -> the op that made it
    _wire: dict[int, TensorSpec] = field(default_factory=dict)  # partial tensor -> the format of what it was cast from
    _sums: dict[int, _Sum] = field(default_factory=dict)
    _plans: dict[tuple[int, tuple[Layout, ...]], _Plan] = field(default_factory=dict)
    _phases: list[int] = field(init=False)
    _layers: list[int] = field(init=False)

    def __post_init__(self) -> None:
        graph, sharding = self.graph, self.sharding
        count = len(graph.tensor_spec)
        self.layout = [WHOLE] * count
        self._root = list(range(count))
        self.spec = graph.tensor_spec.tolist()
        self.experts = [has(spec, EXPERTS) for spec in graph.specs]
        divided = sharding.tensor > 1
        self._tensor_axis = [divided and has(spec, *TENSOR_AXES) for spec in graph.specs]
        for number, of_experts in enumerate(self.experts):
            if of_experts:
                self._tensor_axis[number] = sharding.expert_tensor > 1 and has(graph.specs[number], "ffn")
        self._sequence = [has(spec, SEQUENCE) for spec in graph.specs]
        self.writer = GraphWriter(graph, self._tensor_axis, self._root)
        self.floating = [spec.dtype[:2] in ("fp", "bf", "tf") for spec in graph.specs]
        self._phases, self._layers = graph.op_phase.tolist(), graph.op_layer.tolist()

    # what is known of a tensor

    def divided(self, tensor: int) -> bool:
        """Whether tensor parallelism divides it along one of its own axes."""
        if self.layout[tensor] & EXPERT and self.sharding.expert_tensor == 1:
            return False
        return self._tensor_axis[self.spec[tensor]]

    def has_sequence(self, tensor: int) -> bool:
        """Whether the sequence is one of its axes."""
        return self._sequence[self.spec[tensor]]

    def move(self, tensor: int, layout: Layout) -> None:
        """From here on, `tensor` and all views and casts of it have this layout."""
        root = self._root[tensor]
        for member in self._members.get(root, [root]):
            self.layout[member] = layout

    def joins(self, tensor: int, source: int) -> None:
        """`tensor` holds the numbers of `source`, in another shape or format."""
        root = self._root[source]
        self._root[tensor] = root
        self._members.setdefault(root, [root]).append(tensor)

    def scope(self, op: int) -> int:
        """The phase and block that an op is in: what is gathered is kept within, what is partial is reduced within."""
        return self._phases[op] + 4 * (self._layers[op] + 1)

    # ops

    def known(self, op: int, kind: int, inputs: list[int], outputs: list[int]) -> bool:
        """Write op `op` as others of its kind on operands of these layouts were, if there were any."""
        layout = self.layout
        layouts = tuple([layout[tensor] for tensor in inputs])
        plan = self._plans.get((kind, layouts))
        if plan is None:
            return False
        results = plan.results
        for tensor, flags in zip(outputs, results, strict=True):
            layout[tensor] = flags
        if plan.makes_terms:
            self._maker.update((tensor, op) for tensor in outputs)
        if plan.same_numbers:
            self.joins(outputs[0], inputs[0])
        operands = zip(inputs, plan.shapes, repeat(NOWHERE))
        made = zip(outputs, [flags & SHAPING for flags in results] if plan.makes_terms else results, repeat(NOWHERE))
        self.writer.alike(op, plan.kind, operands, made)
        return True

    def ordinary(self, op: int, kind: OpKind, inputs: list[int], outputs: list[int]) -> None:
        """Write an op that is neither the optimizer's nor of experts nor attention over a divided sequence."""
        scope = self.scope(op)
        gathers = self._gathers(kind, inputs, outputs)
        operands = [self._operand(op, tensor, scope, gathers) for tensor in inputs]
        cut = any(layout & SHARD for _, layout, _ in operands)
        if kind.op_class == "fill" and self.sharding.sequence:  # shaped like rows that come back to the slice
            cut |= any(layout & EXPERT for _, layout, _ in operands)
        if cut:
            operands = [self._slice(operand) for operand in operands]
        self._results(op, kind, inputs, operands, outputs, cut)

    def _gathers(self, kind: OpKind, inputs: list[int], outputs: list[int]) -> bool:
        """Whether the op needs the whole sequence of operands of which the rank has a slice."""
        sliced = {self.spec[tensor] for tensor in inputs if self.layout[tensor] & SHARD}
        if not sliced:
            return False
        members = [self.graph.kinds[member] for member in kind.attribute("members", ())]
        if members:  # a kernel may hold things that have nothing to do with each other
            mixed = [m for m in members if any(self._tensor_axis[spec] for spec in (*m.inputs, *m.outputs))]
            return any(not sliced.isdisjoint(member.inputs) for member in mixed)
        if any(self.divided(tensor) for tensor in (*inputs, *outputs)):
            return True
        loses = any(not self.has_sequence(tensor) for tensor in outputs)
        return loses and kind.op_class == "view" or kind.op_class in ("attention", "attention_backward", "convolution")

    def _operand(self, op: int, tensor: int, scope: int, gathers: bool) -> Operand:
        layout = self.layout[tensor]
        if not gathers or not layout & SHARD:
            return tensor, layout, NOWHERE
        root = self._root[tensor]
        whole = layout & ~SHARD
        scope = self._gathered_in(root, scope)
        if (root, scope) not in self._gathered:
            self._gathered[root, scope] = tensor
            sliced = self.writer.tensor(tensor, layout)
            made = self.writer.result(tensor, whole, scope)
            self.writer.communicate("all_gather", "tensor", op, [sliced], [made])
            if self.sharding.keeps_gathered and scope % 4 != Phase.BACKWARD:
                self.writer.goes_when_read(sliced)
        return self._gathered[root, scope], whole, scope

    def _gathered_in(self, root: int, scope: int) -> int:
        """The scope whose gathered tensor is read in `scope`: itself, or where it is kept that of the same block's
        forward or recomputation.
        """
        if self.sharding.keeps_gathered and scope % 4 == Phase.BACKWARD:
            for phase in (Phase.RECOMPUTE, Phase.FORWARD):
                if (root, scope - Phase.BACKWARD + phase) in self._gathered:
                    return scope - Phase.BACKWARD + phase
        return scope

    def _slice(self, operand: Operand) -> Operand:
        """What every rank holds whole is read where the rank's slice of the sequence is."""
        tensor, layout, scope = operand
        if layout & (SHARD | EXPERT) or scope >= 0 or not self.has_sequence(tensor) or self.divided(tensor):
            return operand
        self.writer.part(tensor, layout, layout | SHARD)
        return tensor, layout | SHARD, scope

    def _results(
        self, op: int, kind: OpKind, inputs: list[int], operands: list[Operand], outputs: list[int], cut: bool
    ) -> None:
        """Layouts of what the op makes, and the op itself; statistics of rows over a divided axis go around first."""
        number = int(self.graph.op_kind[op])
        divided = any(self.divided(tensor) for tensor in inputs)
        statistics = row_statistics(self.graph, kind) if divided else []
        passes_partial = any(layout & PARTIAL for _, layout, _ in operands) and kind.op_class != "fill"
        layouts: list[Layout] = []
        for tensor in outputs:
            layout = SHARD if cut and self.has_sequence(tensor) and not self.divided(tensor) else WHOLE
            if passes_partial or (not statistics and self._is_term(kind, tensor, divided, cut)):
                layout |= PARTIAL
                self._maker[tensor] = op
            layouts.append(layout)
        key = (number, tuple(self.layout[tensor] for tensor in inputs))
        for tensor, layout in zip(outputs, layouts, strict=True):
            self.layout[tensor] = layout
        same = self._same_numbers(kind, operands, outputs)
        if passes_partial:
            self._keep_wire(kind, inputs, outputs)
        for tensor in outputs if same else ():
            self.joins(tensor, inputs[0])
        self.writer.op(op, operands, list(zip(outputs, layouts, strict=True)))
        for tensor, layout, scope in operands:
            if scope >= 0:
                self.writer.ends(tensor, layout, scope)
        for rows, count in statistics:
            self.writer.statistics("all_reduce", "tensor", op, rewritten(rows, SHARD if cut else WHOLE), count)
        plain = all(
            operand == (tensor, self.layout[tensor], NOWHERE) for operand, tensor in zip(operands, inputs, strict=True)
        )
        if plain and not statistics and not passes_partial and kind.target != "fused":
            flags = tuple(layout & SHAPING for _, layout, _ in operands)
            made = tuple(layouts)
            terms = any(layout & PARTIAL for layout in made)
            self._plans[key] = _Plan(self.writer.kind(number, flags, made), flags, made, same, terms)

    def _is_term(self, kind: OpKind, output: int, divided: bool, cut: bool) -> bool:
        """Whether an output is a term of a sum, since the op contracts an axis of which the rank has a part."""
        if not self.floating[self.spec[output]]:
            return False
        if kind.op_class in _CONTRACTING:
            return divided and not self.divided(output) or cut and not self.has_sequence(output)
        made = self.spec[output]
        members = (self.graph.kinds[member] for member in kind.attribute("members", ()))
        makers = [m for m in members if m.op_class in _CONTRACTING and made in m.outputs]
        for maker in makers:
            lost = any(self._tensor_axis[spec] for spec in maker.inputs) and not self._tensor_axis[made]
            rows = any(self._sequence[spec] and not self._tensor_axis[spec] for spec in maker.inputs)
            if lost or (cut and rows and not self._sequence[made]):
                return True
        return False

    def _same_numbers(self, kind: OpKind, operands: list[Operand], outputs: list[int]) -> bool:
        """Whether what the op makes are all numbers of its operand: a view or a cast of what is not gathered."""
        if kind.op_class not in ("view", "copy") or len(operands) != 1 or len(outputs) != 1 or operands[0][2] >= 0:
            return False
        sizes = [math.prod(self.graph.shapes[self.spec[tensor]]) for tensor in (operands[0][0], outputs[0])]
        return sizes[0] == sizes[1] and (kind.op_class == "view" or kind.target in _CASTS)

    def _keep_wire(self, kind: OpKind, inputs: list[int], outputs: list[int]) -> None:
        """Messages keep the format of the products that are summed, where autocast has cast those up before.

        Megatron-LM reduces what its products make; no framework sends a sum in a wider format than its terms.
        """
        terms = [self._wire.get(t, self.graph.specs[self.spec[t]]) for t in inputs if self.layout[t] & PARTIAL]
        narrow = max(terms, key=lambda spec: spec.itemsize)
        for tensor in outputs:
            if narrow.itemsize < self.graph.specs[self.spec[tensor]].itemsize:
                self._wire[tensor] = narrow

    # sums

    @property
    def sums_wait(self) -> bool:
        """Whether a sum waits for more terms."""
        return bool(self._sums)

    def keeps_partial(self, kind: OpKind, inputs: list[int]) -> bool:
        """Whether the op is linear in operands that are all terms of sums: it may run before they are reduced."""
        partial = [bool(self.layout[tensor] & PARTIAL) for tensor in inputs]
        if not any(partial) or kind.op_class == "fill":
            return True
        if kind.op_class in ("view", "copy"):
            return all(partial)
        if kind.target not in _LINEAR:
            return False
        if kind.target[5:8] in ("add", "sub") and len(inputs) > 1:
            return all(partial) and len({self.scope(self._maker[tensor]) for tensor in inputs}) == 1
        return len(inputs) == 1

    def settle(self, op: int, kind: OpKind, inputs: list[int], outputs: list[int]) -> bool:
        """Reduce what the op cannot read as it is. True: the op is a sum that waits for more terms, and not written.

        Autograd adds a gradient's terms as they arrive. Those that are partial are added first and reduced once
        (Megatron-LM has one product for them; DTensor reduces a sum of partial gradients once).
        """
        if any(self.layout[tensor] & PENDING for tensor in inputs) and self._next_term(op, kind, inputs, outputs):
            return True
        here = self.scope(op)
        for tensor in inputs:
            if self.layout[tensor] & PENDING:
                self.close(op, tensor)
            elif self.layout[tensor] & PARTIAL and kind.target == "aten.add":
                if self.scope(self._maker[tensor]) != here:
                    self.reduce(op, tensor)
        if self._waits(op, kind, inputs, outputs):
            return True
        if not self.keeps_partial(kind, inputs):
            for tensor in inputs:
                if self.layout[tensor] & PARTIAL:
                    self.reduce(op, tensor)
        return False

    def _is_sum(self, op: int, kind: OpKind, inputs: list[int], outputs: list[int]) -> bool:
        alike = len(inputs) == 2 and len(outputs) == 1 and len({self.spec[t] for t in (*inputs, *outputs)}) == 1
        return alike and kind.target == "aten.add" and self._phases[op] == Phase.BACKWARD

    def _waits(self, op: int, kind: OpKind, inputs: list[int], outputs: list[int]) -> bool:
        """Put off the sum of a whole and a partial gradient."""
        partial = [tensor for tensor in inputs if self.layout[tensor] & PARTIAL]
        if len(partial) != 1 or not self._is_sum(op, kind, inputs, outputs):
            return False
        whole = inputs[0] if inputs[1] == partial[0] else inputs[1]
        if (self.layout[whole] | self.layout[partial[0]]) & EXPERT:
            return False
        self._sums[outputs[0]] = _Sum(whole, partial[0], op)
        self.layout[outputs[0]] = PENDING
        return True

    def _next_term(self, op: int, kind: OpKind, inputs: list[int], outputs: list[int]) -> bool:
        """Another partial term of a sum that waits: it is added to the partial one."""
        waiting = next(tensor for tensor in inputs if self.layout[tensor] & PENDING)
        if not self._is_sum(op, kind, inputs, outputs):
            return False
        term = inputs[0] if inputs[1] == waiting else inputs[1]
        if not self.layout[term] & PARTIAL:
            return False
        before = self._sums.pop(waiting)
        flags = (self.layout[before.partial], self.layout[term])
        self.writer.op(
            before.op, [(before.partial, flags[0], NOWHERE), (term, flags[1], NOWHERE)], [(waiting, PARTIAL)]
        )
        self.layout[waiting] = PARTIAL
        self._maker[waiting] = op
        self._keep_wire(kind, [before.partial, term], [waiting])
        if self._dies(term, op):
            self.writer.ends(term, flags[1])
        self._sums[outputs[0]] = _Sum(before.whole, waiting, op)
        self.layout[outputs[0]] = PENDING
        return True

    def close(self, op: int, tensor: int) -> None:
        """No more terms: the partial one is reduced and added to the whole one."""
        found = self._sums.pop(tensor)
        self.reduce(op, found.partial)
        operands = [(t, self.layout[t], NOWHERE) for t in (found.whole, found.partial)]
        layout = (operands[0][1] | operands[1][1]) & SHARD
        operands = [(t, flags | layout, scope) for t, flags, scope in operands]
        self.layout[tensor] = layout
        self.writer.op(found.op, operands, [(tensor, layout)])
        for term in (found.whole, found.partial):
            if self._dies(term, op):
                self.writer.ends(term, self.layout[term])

    def close_others(self, op: int) -> None:
        """Sums of other blocks and phases do not wait any longer."""
        here = self.scope(op)
        for tensor, found in list(self._sums.items()):
            if self.scope(found.op) != here:
                self.close(op, tensor)

    def _dies(self, tensor: int, op: int) -> bool:
        """Whether nothing from op `op` on reads the tensor on one device."""
        return int(self.graph.storage_free[self.graph.tensor_storage[tensor]]) <= op

    def summed(self, op: int, inputs: list[int]) -> list[int]:
        """A fused kernel's operands: partial ones that are shaped alike are added before they are reduced."""
        first: dict[tuple[int, Layout], int] = {}
        found: list[int] = []
        for tensor in inputs:
            layout = self.layout[tensor]
            into = first.setdefault((self.spec[tensor], layout), tensor) if layout & PARTIAL else tensor
            if into != tensor:
                self.writer.accumulate(op, self.writer.tensor(into, layout), self.writer.tensor(tensor, layout))
                if self._dies(tensor, op):
                    self.writer.ends(tensor, layout)
            found.append(into)
        return found

    def reduce(self, op: int, tensor: int) -> None:
        """A partial result is summed over the ranks, and each keeps its slice of the sequence where that is divided."""
        layout, maker = self.layout[tensor], self._maker[tensor]
        before = self.writer.tensor(tensor, layout)
        whole, wire = layout & ~PARTIAL, self._wire.get(tensor)
        op = op if self._phases[op] == self._phases[maker] else maker
        if self.sharding.sequence and self.has_sequence(tensor) and not layout & (SHARD | EXPERT):
            self.move(tensor, whole | SHARD)
            after = self.writer.result(tensor, self.layout[tensor])
            self.writer.communicate("reduce_scatter", "tensor", op, [before], [after], wire=wire)
            self.writer.ends(tensor, layout)
        else:
            self.move(tensor, whole)
            self.writer.communicate("all_reduce", "tensor", op, [before], [before], wire=wire)
