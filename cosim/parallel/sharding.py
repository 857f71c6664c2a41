"""From the one-device graph to one rank's: tensor, sequence, context and expert parallelism of a whole traced step.

Which axes are divided says how every tensor is cut (`cosim.parallel.layout`); what is left to find are the tensors of
which a rank has only a term of a sum, or only some of the tokens, and the places where an operator needs more. One walk
over the ops in the order in which they ran finds them:

- An operator that contracts a divided axis (a row-parallel product, the gradient of a column-parallel one, the lookup
  in a divided table) makes a *partial* result. Partial results are added and cast as they are, and reduced where
  something else reads them: an all-reduce, or with sequence parallelism a reduce-scatter along the sequence.
- An operator on divided axes gathers operands of which the rank has a slice of the sequence: once per phase, since
  what is saved for backward is the slice (Megatron-LM, arXiv 2205.05198).
- Gradients of parameters that every rank holds, made from a slice of the sequence, are summed before the update.
- Rows of softmax and loss over a divided vocabulary exchange their statistics (Megatron-LM's parallel cross entropy).
- Products of experts send their rows to the ranks that hold the experts, and back where something else reads them.
- Attention with context parallelism gathers keys and values (at once, or around a ring under its own compute), or
  exchanges the sequence for heads.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cosim.graph import OpGraph, OpKind, Phase
from cosim.parallel.layout import EXPERTS, SEQUENCE, TENSOR_AXES, Layout, Sharding, has, local_axes
from cosim.parallel.rewriting import GraphWriter

_GROUPED = ("cosim.grouped_mm", "cosim.grouped_mm_weight", "aten._grouped_mm")
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
_SHAPE_ONLY = frozenset(["fill"])
_ROW_STATISTICS = {  # numbers per row that ranks exchange: maximum, sum of exponentials; the target's logit
    "aten._softmax": 2,
    "aten._safe_softmax": 2,
    "aten._log_softmax": 2,
    "aten.nll_loss_forward": 1,
    "cosim.cross_entropy": 3,
}


def shard(graph: OpGraph, sharding: Sharding) -> OpGraph:
    """The step of one rank of a replica that is cut as `sharding` says; every rank of the replica has one of this
    shape. Its collectives are ops of class "collective" (`cosim.parallel.communication`).

    Raises InputError: a degree that does not divide its axis.
    """
    if sharding.trivial:
        return graph
    axes = local_axes(graph.axes, sharding)
    walk = _Walk(graph, sharding)
    for op in range(len(graph)):
        walk.visit(op)
    return walk.writer.finish(axes)


def replicated(graph: OpGraph, sharding: Sharding) -> tuple[str, ...]:
    """Names of blocks' matrices that every tensor-parallel rank holds whole, because no axis of theirs is divided."""
    if sharding.tensor == 1:
        return ()
    matrices = [p for p in graph.parameters if len(graph.specs[p.spec].dims) > 1 and p.layer >= 0]
    return tuple(p.name for p in matrices if not has(graph.specs[p.spec], *TENSOR_AXES, EXPERTS))


@dataclass(slots=True)
class _Walk:
    """The state of the walk: each tensor's layout, and which tensors are views or casts of the same numbers."""

    graph: OpGraph
    sharding: Sharding
    writer: GraphWriter = field(init=False)
    layout: list[Layout] = field(init=False)
    _root: list[int] = field(init=False)
    _members: dict[int, list[int]] = field(default_factory=dict)
    _gathered: dict[tuple[int, int], int] = field(default_factory=dict)  # (root, phase) -> the tensor that was
    _tensor_axis: list[bool] = field(init=False)  # by spec
    _sequence: list[bool] = field(init=False)
    _experts: list[bool] = field(init=False)
    _floating: list[bool] = field(init=False)
    _spec: list[int] = field(init=False)
    _optimizer_began: bool = False

    def __post_init__(self) -> None:
        graph = self.graph
        self.writer = GraphWriter(graph)
        count = len(graph.tensor_spec)
        self.layout = [Layout.WHOLE] * count
        self._root = list(range(count))
        self._spec = graph.tensor_spec.tolist()
        self._experts = [has(spec, EXPERTS) for spec in graph.specs]
        divided = self.sharding.tensor > 1
        self._tensor_axis = [divided and has(spec, *TENSOR_AXES) for spec in graph.specs]
        for number, of_experts in enumerate(self._experts):
            if of_experts and self.sharding.expert_tensor == 1:
                self._tensor_axis[number] = False
        self._sequence = [has(spec, SEQUENCE) for spec in graph.specs]
        self._floating = [spec.dtype[:2] in ("fp", "bf", "tf") for spec in graph.specs]

    # what is known of a tensor

    def _divided(self, tensor: int) -> bool:
        """Whether tensor parallelism divides it along one of its own axes."""
        if Layout.EXPERT in self.layout[tensor] and self.sharding.expert_tensor == 1:
            return False
        return self._tensor_axis[self._spec[tensor]]

    def _has_sequence(self, tensor: int) -> bool:
        return self._sequence[self._spec[tensor]]

    def _move(self, tensor: int, layout: Layout) -> None:
        """From here on, `tensor` and all views and casts of it have this layout."""
        root = self._root[tensor]
        for member in self._members.get(root, [root]):
            self.layout[member] = layout

    def _joins(self, tensor: int, source: int) -> None:
        """`tensor` holds the numbers of `source`, in another shape or format."""
        root = self._root[source]
        self._root[tensor] = root
        self._members.setdefault(root, [root]).append(tensor)

    # the walk

    def visit(self, op: int) -> None:
        """Write op `op` of the one-device graph, with what must be sent before it."""
        kind = self.graph.kinds[self.graph.op_kind[op]]
        inputs, outputs = self.graph.op_inputs.row(op).tolist(), self.graph.op_outputs.row(op).tolist()
        phase = int(self.graph.op_phase[op])
        if phase == Phase.OPTIMIZER:
            self._update(op, inputs, outputs)
            return
        if kind.op_class in ("attention", "attention_backward") and self.sharding.context > 1:
            self._attention(op, kind, inputs, outputs, phase)
            return
        if not self._keeps_partial(kind, inputs):
            for tensor in inputs:
                if Layout.PARTIAL in self.layout[tensor] and kind.op_class not in _SHAPE_ONLY:
                    self._reduce(op, tensor)
        if self._of_experts(kind, inputs):
            self._on_experts(op, kind, inputs, outputs)
            return
        for tensor in inputs:
            moved = Layout.EXPERT in self.layout[tensor] and not self._experts[self._spec[tensor]]
            if moved and kind.op_class not in _SHAPE_ONLY:
                self._return_rows(op, tensor)
        gathers = self._gathers(kind, inputs, outputs)
        operands = [self._operand(op, tensor, phase, gathers) for tensor in inputs]
        cut = any(Layout.SHARD in layout for _, layout, _ in operands)
        if cut:  # what every rank holds whole is read where the slice is
            operands = [(t, lay | Layout.SHARD if self._has_sequence(t) else lay, p) for t, lay, p in operands]
        self._results(op, kind, inputs, operands, outputs, cut)

    def _keeps_partial(self, kind: OpKind, inputs: list[int]) -> bool:
        """Whether the op is linear in operands that are all terms of sums: it may run before they are reduced."""
        partial = [Layout.PARTIAL in self.layout[tensor] for tensor in inputs]
        if not any(partial):
            return True
        if kind.op_class in ("view", "copy"):
            return all(partial)
        return kind.target in _LINEAR and (all(partial) if kind.target[5:8] in ("add", "sub") else len(inputs) == 1)

    def _gathers(self, kind: OpKind, inputs: list[int], outputs: list[int]) -> bool:
        """Whether the op needs the whole sequence of operands of which the rank has a slice."""
        if not any(Layout.SHARD in self.layout[tensor] for tensor in inputs):
            return False
        if any(self._divided(tensor) for tensor in (*inputs, *outputs)):
            return True
        loses = any(not self._has_sequence(tensor) for tensor in outputs)
        return loses and kind.op_class == "view" or kind.op_class in ("attention", "attention_backward", "convolution")

    def _operand(self, op: int, tensor: int, phase: int, gathers: bool) -> tuple[int, Layout, int]:
        layout = self.layout[tensor]
        if not gathers or Layout.SHARD not in layout:
            return tensor, layout, -1
        root = self._root[tensor]
        whole = layout & ~Layout.SHARD
        if (root, phase) not in self._gathered:
            self._gathered[root, phase] = tensor
            sliced = self.writer.tensor(tensor, layout)
            made = self.writer.tensor(tensor, whole, phase)
            self.writer.communicate("all_gather", "tensor", op, [sliced], [made])
        return self._gathered[root, phase], whole, phase

    def _results(
        self,
        op: int,
        kind: OpKind,
        inputs: list[int],
        operands: list[tuple[int, Layout, int]],
        outputs: list[int],
        cut: bool,
    ) -> None:
        """Layouts of what the op makes, and the op itself; statistics of rows over a divided axis go around first."""
        divided = [self._divided(tensor) for tensor in inputs]
        reduced_rows = kind.target in _ROW_STATISTICS and any(divided)
        passes_partial = any(Layout.PARTIAL in layout for _, layout, _ in operands) and kind.op_class not in _SHAPE_ONLY
        layouts: list[Layout] = []
        for tensor in outputs:
            floating = self._floating[self._spec[tensor]]
            layout = Layout.SHARD if cut and self._has_sequence(tensor) else Layout.WHOLE
            lost = any(divided) and not self._divided(tensor) or cut and not self._has_sequence(tensor)
            if floating and lost and kind.op_class in _CONTRACTING and not reduced_rows:
                layout |= Layout.PARTIAL
            if passes_partial:
                layout |= Layout.PARTIAL
            layouts.append(layout)
            self.layout[tensor] = layout
        if kind.op_class in ("view", "copy") and inputs and outputs:
            self._same_numbers(kind, inputs, operands, outputs)
        self.writer.op(op, operands, list(zip(outputs, layouts, strict=True)))
        for tensor, layout, phase in operands:
            if phase >= 0:
                self.writer.ends(tensor, layout, phase)
        if reduced_rows:
            like = self.writer.tensor(inputs[0], self.layout[inputs[0]])
            self.writer.statistics("all_reduce", "tensor", op, like, 1, _ROW_STATISTICS[kind.target])

    def _same_numbers(
        self, kind: OpKind, inputs: list[int], operands: list[tuple[int, Layout, int]], outputs: list[int]
    ) -> None:
        """Views and casts of one tensor hold its numbers; those of a gathered one are gathered too."""
        if kind.op_class == "copy" and kind.target not in ("aten._to_copy", "aten.clone", "prims.convert_element_type"):
            return
        if operands[0][2] < 0 and len(inputs) == 1:
            for tensor in outputs:
                self._joins(tensor, inputs[0])

    # changes of layout

    def _reduce(self, op: int, tensor: int) -> None:
        """A partial result is summed over the ranks, and each keeps its slice of the sequence where that is divided."""
        layout = self.layout[tensor]
        before = self.writer.tensor(tensor, layout)
        whole = layout & ~Layout.PARTIAL
        if self.sharding.sequence and self._has_sequence(tensor) and Layout.SHARD not in layout:
            self._move(tensor, whole | Layout.SHARD)
            after = self.writer.tensor(tensor, self.layout[tensor])
            self.writer.communicate("reduce_scatter", "tensor", op, [before], [after])
            self.writer.ends(tensor, layout)
        else:
            self._move(tensor, whole)
            self.writer.communicate("all_reduce", "tensor", op, [before], [before])

    def _update(self, op: int, inputs: list[int], outputs: list[int]) -> None:
        """The optimizer works on what a rank holds; before it, sums of replicated parameters' gradients are closed."""
        if not self._optimizer_began:
            self._optimizer_began = True
            read = self.graph.op_inputs.indices[self.graph.op_inputs.indptr[op] :]
            rest = [t for t in dict.fromkeys(read.tolist()) if Layout.PARTIAL in self.layout[t]]
            if rest:
                tensors = [self.writer.tensor(tensor, self.layout[tensor]) for tensor in rest]
                self.writer.communicate("all_reduce", "tensor", op, tensors, tensors)
                for tensor in rest:
                    self._move(tensor, self.layout[tensor] & ~Layout.PARTIAL)
        self.writer.op(op, [(t, self.layout[t], -1) for t in inputs], [(t, Layout.WHOLE) for t in outputs])

    # experts

    def _of_experts(self, kind: OpKind, inputs: list[int]) -> bool:
        """Whether the op works on rows that are with the experts: their products, and what stays among such rows."""
        experts = [self._experts[self._spec[tensor]] for tensor in inputs]
        if kind.op_class == "matmul" and any(experts):
            return True
        rows = [Layout.EXPERT in self.layout[tensor] for tensor in inputs]
        if kind.target in _GROUPED:
            return True
        return any(rows) and all(rows) and kind.op_class in ("pointwise", "copy", "view", "random")

    def _on_experts(self, op: int, kind: OpKind, inputs: list[int], outputs: list[int]) -> None:
        for tensor in inputs:
            if self._floating[self._spec[tensor]] and self._has_sequence(tensor):
                self._send_rows(op, tensor)
        operands = [(tensor, self.layout[tensor], -1) for tensor in inputs]
        cut = self.sharding.expert_tensor > 1 and kind.op_class == "matmul"
        inner = cut and any(self._divided(tensor) for tensor in inputs)
        for tensor in outputs:
            layout = Layout.EXPERT if self._has_sequence(tensor) else Layout.WHOLE
            if inner and not self._divided(tensor) and layout:
                layout |= Layout.PARTIAL
            if kind.op_class != "matmul":
                layout |= next((self.layout[t] & Layout.PARTIAL for t in inputs), Layout.WHOLE)
            self.layout[tensor] = layout
        if kind.op_class in ("view", "copy") and len(inputs) == 1:
            self._same_numbers(kind, inputs, operands, outputs)
        self.writer.op(op, operands, [(tensor, self.layout[tensor]) for tensor in outputs])

    def _send_rows(self, op: int, tensor: int) -> None:
        """Rows go to the ranks that hold their experts (dispatch)."""
        layout = self.layout[tensor]
        if Layout.EXPERT in layout:
            return
        before = self.writer.tensor(tensor, layout)
        self._move(tensor, Layout.EXPERT)
        after = self.writer.tensor(tensor, Layout.EXPERT)
        if self.sharding.expert * self.sharding.expert_tensor > 1:
            self.writer.communicate("all_to_all", "expert", op, [before], [after])
            self.writer.ends(tensor, layout)

    def _return_rows(self, op: int, tensor: int) -> None:
        """Rows go back to the ranks that they came from (combine), summed where experts' products were divided."""
        layout = self.layout[tensor]
        before = self.writer.tensor(tensor, layout)
        home = Layout.SHARD if self.sharding.sequence and self.sharding.tensor > 1 else Layout.WHOLE
        self._move(tensor, home)
        after = self.writer.tensor(tensor, home)
        if self.sharding.expert * self.sharding.expert_tensor > 1:
            self.writer.communicate("all_to_all", "expert", op, [before], [after])
            self.writer.ends(tensor, layout)

    # attention over the whole sequence

    def _attention(self, op: int, kind: OpKind, inputs: list[int], outputs: list[int], phase: int) -> None:
        if self.sharding.context_by == "all_to_all":
            self._attention_by_heads(op, kind, inputs, outputs)
            return
        backward = kind.op_class == "attention_backward"
        keys = inputs[1 + backward : 3 + backward]
        operands: list[tuple[int, Layout, int]] = []
        for tensor in inputs:
            if tensor not in keys:
                operands.append((tensor, self.layout[tensor], -1))
                continue
            made = self.writer.tensor(tensor, Layout.CONTEXT, phase)
            sliced = self.writer.tensor(tensor, self.layout[tensor])
            self.writer.communicate("all_gather", "context", op, [sliced], [made], self.sharding.context_by == "ring")
            operands.append((tensor, Layout.CONTEXT, phase))
        made_for_all = outputs[1:3] if backward else []
        for tensor in outputs:
            self.layout[tensor] = Layout.WHOLE
        layouts = [(t, Layout.CONTEXT if t in made_for_all else Layout.WHOLE) for t in outputs]
        self.writer.op(op, operands, layouts)
        for tensor, layout, gathered in operands:
            if gathered >= 0:
                self.writer.ends(tensor, layout, gathered)
        for tensor in made_for_all:
            whole, own = self.writer.tensor(tensor, Layout.CONTEXT), self.writer.tensor(tensor, Layout.WHOLE)
            self.writer.communicate("reduce_scatter", "context", op, [whole], [own], self.sharding.context_by == "ring")
            self.writer.ends(tensor, Layout.CONTEXT)

    def _attention_by_heads(self, op: int, kind: OpKind, inputs: list[int], outputs: list[int]) -> None:
        """Sequence is exchanged for heads before attention and back after it; what backward needs is kept exchanged."""
        backward = kind.op_class == "attention_backward"
        exchanged = [inputs[0], *inputs[1:4]] if backward else inputs[:3]
        for tensor in exchanged:
            if Layout.HEADS in self.layout[tensor]:
                continue
            before = self.writer.tensor(tensor, self.layout[tensor])
            self._move(tensor, Layout.HEADS)
            after = self.writer.tensor(tensor, Layout.HEADS)
            self.writer.communicate("all_to_all", "context", op, [before], [after])
            self.writer.ends(tensor, Layout.WHOLE)
        heads = [(tensor, Layout.HEADS if self._has_sequence(tensor) else Layout.WHOLE) for tensor in outputs]
        self.writer.op(op, [(tensor, Layout.HEADS, -1) for tensor in inputs], heads)
        for number, (tensor, layout) in enumerate(heads):
            self.layout[tensor] = layout
            if layout and (backward or number == 0):
                self.layout[tensor] = Layout.WHOLE
                sent, own = self.writer.tensor(tensor, Layout.HEADS), self.writer.tensor(tensor, Layout.WHOLE)
                self.writer.communicate("all_to_all", "context", op, [sent], [own])
                self.writer.ends(tensor, Layout.HEADS)
