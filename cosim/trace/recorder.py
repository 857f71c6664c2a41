"""Records every operator that PyTorch dispatches, with its tensors, storages, module and autograd node.

A `TorchDispatchMode` above FakeTensorMode. Tensors and storages carry their row number as an attribute, which lives
as long as they do; a weak reference to each storage tells when PyTorch gives its memory back. Rows are appended to
plain lists of integers: the recorder adds about 10 us to the 100 to 200 us that a fake operator takes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from cosim.graph import Phase
from cosim.trace.values import Told, reads_values
from cosim.trace.vocabulary import ATTRIBUTE_NAMES, KEPT_ARGUMENTS, lookup

Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
"""Shape, strides, format."""
RecordedKind = tuple[str, str, tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[tuple[str, Any], ...]]
"""Target, class, input layouts, output layouts, mutated inputs, attributes."""


@dataclass(slots=True)
class Recording:
    """What was seen, as rows of integers; `layouts` are distinct (shape, strides, format)."""

    layouts: list[Layout] = field(default_factory=list)
    kinds: list[RecordedKind] = field(default_factory=list)
    modules: list[str] = field(default_factory=lambda: [""])
    op_kind: list[int] = field(default_factory=list)
    op_phase: list[int] = field(default_factory=list)
    op_module: list[int] = field(default_factory=list)  # -1: unknown (a backward op without a forward module)
    op_inputs: list[tuple[int, ...]] = field(default_factory=list)
    op_outputs: list[tuple[int, ...]] = field(default_factory=list)
    tensor_layout: list[int] = field(default_factory=list)
    tensor_storage: list[int] = field(default_factory=list)
    storage_bytes: list[int] = field(default_factory=list)
    storage_layout: list[int] = field(default_factory=list)  # of the first tensor that was seen on it
    storage_alloc: list[int] = field(default_factory=list)
    storage_free: list[int] = field(default_factory=list)  # -1: not within the step


@dataclass(frozen=True, slots=True)
class _Operator:
    """What is looked up once per operator: name, class, which arguments are written, which scalars are kept."""

    target: str
    op_class: str
    written: frozenset[str]
    names: tuple[str, ...]
    kept: tuple[str, ...]
    new_metadata: bool  # squeeze_, t_: the same tensor with another shape


@dataclass(frozen=True, slots=True)
class _Written:
    """Rows (op, tensor, storage) from `start` up to `stop`, and the tensors from before `start` that they are about."""

    start: tuple[int, int, int]
    stop: tuple[int, int, int]
    operands: tuple[int, ...]


class HostNumbers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Numbers that the host reads from fake tensors (step counts, norms in an optimizer) are 1."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return 1.0 if func is torch.ops.aten._local_scalar_dense.default else func(*args, **(kwargs or {}))


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fills `recording` while it is active; `progress(ops)` is called every 500 operators.

    Forward and backward are `told` the numbers that the module's code reads of its tensors.
    """

    def __init__(self, progress: Callable[[int], None] | None = None, told: Told | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recording = Recording()
        self.in_optimizer = False
        self.place: tuple[int, int] | None = None  # phase and module row, where what runs is a captured graph
        self._progress = progress
        self._told = told
        self._operators: dict[Any, _Operator] = {}
        self._layouts: dict[Layout, int] = {}
        self._kinds: dict[tuple[Any, ...], int] = {}
        self._module_rows: dict[str, int] = {"": 0}
        self._module_stack: list[int] = [0]
        self._module_of_node: dict[int, int] = {}  # autograd sequence number -> module row
        self._references: dict[int, Any] = {}
        self._written: dict[tuple[int, ...], _Written] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device if type(args[0]) is FakeTensor else args[0].device
        if kwargs is None:
            kwargs = {}
        if func is torch.ops.aten._local_scalar_dense.default and self.in_optimizer:
            if self._made_in_step(args[0]):
                self._record(func, args, kwargs, None)
            return 1.0  # else a step count: a number that the host already has
        if self._told is not None and not self.in_optimizer and reads_values(func):
            result = self._told.answer(func, args, kwargs)
        else:
            result = func(*args, **kwargs)
        if func.namespace != "profiler":
            self._record(func, args, kwargs, result)
        return result

    def _made_in_step(self, tensor: Tensor) -> bool:
        """Whether an operator of the step made the tensor's storage, so that the host waits where it reads it."""
        row = getattr(tensor, "_cosim_row", None)
        return row is not None and self.recording.storage_alloc[self.recording.tensor_storage[row]] >= 0

    def _record(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        rows = self.recording
        operator = self._operators.get(func) or self._look_up(func)
        op = len(rows.op_kind)
        inputs: list[int] = []
        mutated: list[int] = []
        written = operator.written
        for name, value in zip(operator.names, args, strict=False):
            self._collect(value, inputs, mutated if name in written else None)
        for name, value in kwargs.items():
            self._collect(value, inputs, mutated if name in written else None)
        outputs: list[int] = []
        self._collect_outputs(result, outputs, op, operator.new_metadata)
        if written:
            changed = {inputs[i] for i in mutated}
            outputs = [tensor for tensor in outputs if tensor not in changed]
        kept = self._attributes(operator, args, kwargs) if operator.kept else ()
        layout = rows.tensor_layout
        key = (func, tuple([layout[t] for t in inputs]), tuple([layout[t] for t in outputs]), kept)
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds[key] = len(rows.kinds)
            rows.kinds.append((operator.target, operator.op_class, key[1], key[2], tuple(mutated), kept))
        phase, module = self._where()
        rows.op_kind.append(kind)
        rows.op_phase.append(phase)
        rows.op_module.append(module)
        rows.op_inputs.append(tuple(inputs))
        rows.op_outputs.append(tuple(outputs))
        if self._progress is not None and op % 500 == 0:
            self._progress(op)

    def _where(self) -> tuple[int, int]:
        """Phase and module row of the operator that is running."""
        if self.place is not None:
            return self.place
        module = self._module_stack[-1]
        if self.in_optimizer:
            return Phase.OPTIMIZER, module
        if torch._C._current_graph_task_id() == -1:
            # The autograd node of this operator, if it has one, was numbered just before it ran.
            self._module_of_node.setdefault(torch._C._autograd._get_sequence_nr() - 1, module)
            return Phase.FORWARD, module
        if torch.is_grad_enabled() or len(self._module_stack) > 1:  # forward again, from within backward
            self._module_of_node.setdefault(torch._C._autograd._get_sequence_nr() - 1, module)
            return Phase.RECOMPUTE, module
        node = torch._C._current_autograd_node()
        return Phase.BACKWARD, self._module_of_node.get(node._sequence_nr(), -1) if node is not None else -1

    def _collect(self, value: Any, into: list[int], mutated: list[int] | None) -> None:
        kind = type(value)
        if kind is FakeTensor or isinstance(value, Tensor):
            if mutated is not None:
                mutated.append(len(into))
            row = getattr(value, "_cosim_row", None)
            into.append(self.register(value) if row is None else row)
        elif kind is list or kind is tuple:
            for item in value:
                if isinstance(item, Tensor):
                    self._collect(item, into, mutated)

    def _collect_outputs(self, value: Any, into: list[int], op: int, new_metadata: bool) -> None:
        if isinstance(value, Tensor):
            row = getattr(value, "_cosim_row", None)
            into.append(self.register(value, op) if row is None or new_metadata else row)
        elif isinstance(value, tuple | list):
            for item in value:
                self._collect_outputs(item, into, op, new_metadata)

    def register(self, tensor: Tensor, op: int = -1) -> int:
        """The row of a tensor not seen before; its storage, if new, comes to life with `op` (-1: before the step)."""
        rows = self.recording
        layout: Layout = (tuple(tensor.shape), tensor.stride(), tensor.dtype)
        number = self._layouts.get(layout)
        if number is None:
            number = self._layouts[layout] = len(rows.layouts)
            rows.layouts.append(layout)
        row = len(rows.tensor_layout)
        rows.tensor_layout.append(number)
        rows.tensor_storage.append(self._storage(tensor, number, op))
        tensor._cosim_row = row  # type: ignore[attr-defined]
        return row

    def _storage(self, tensor: Tensor, layout: int, op: int) -> int:
        rows = self.recording
        storage = tensor.untyped_storage()
        row = getattr(storage, "_cosim_row", None)
        if row is not None:
            return int(row)
        row = len(rows.storage_bytes)
        rows.storage_bytes.append(storage.nbytes())
        rows.storage_layout.append(layout)
        rows.storage_alloc.append(op)
        rows.storage_free.append(-1)
        storage._cosim_row = row  # type: ignore[attr-defined]

        def freed(_: object, row: int = row) -> None:
            rows.storage_free[row] = len(rows.op_kind) - 1
            self._references.pop(row, None)

        self._references[row] = weakref.ref(storage, freed)
        return row

    def storage_of(self, tensor: Tensor) -> int:
        """The storage row of a tensor, registering it if need be."""
        return self.recording.tensor_storage[self._row(tensor)]

    def alike(self, operands: list[Tensor], run: Callable[[], object]) -> None:
        """`run`, which reads and writes no tensors but `operands` and its own; what it does to operands of layouts that
        were seen before is not run but written down again.
        """
        rows = self.recording
        tensors = [rows.tensor_layout[self._row(tensor)] for tensor in operands]
        written = self._written.get(tuple(tensors))
        if written is not None:
            self._write_again(written, [self._row(tensor) for tensor in operands])
            return
        start = (len(rows.op_kind), len(rows.tensor_layout), len(rows.storage_bytes))
        run()
        stop = (len(rows.op_kind), len(rows.tensor_layout), len(rows.storage_bytes))
        if -1 not in rows.storage_free[start[2] : stop[2]]:  # else something of it lives on
            self._written[tuple(tensors)] = _Written(start, stop, tuple(self._row(tensor) for tensor in operands))

    def _write_again(self, written: _Written, operands: list[int]) -> None:
        """The rows of `written` once more, with `operands` in the place of its own."""
        rows = self.recording
        (op, tensor, storage), stop = written.start, written.stop
        ops, tensors, storages = (
            len(rows.op_kind) - op,
            len(rows.tensor_layout) - tensor,
            len(rows.storage_bytes) - storage,
        )
        other = dict(zip(written.operands, operands, strict=True))
        held = {rows.tensor_storage[a]: rows.tensor_storage[b] for a, b in other.items()}

        def again(row: tuple[int, ...]) -> tuple[int, ...]:
            return tuple([t + tensors if t >= tensor else other.get(t, t) for t in row])

        module = self._module_stack[-1]
        rows.tensor_layout += rows.tensor_layout[tensor : stop[1]]
        rows.tensor_storage += [
            s + storages if s >= storage else held.get(s, s) for s in rows.tensor_storage[tensor : stop[1]]
        ]
        rows.storage_bytes += rows.storage_bytes[storage : stop[2]]
        rows.storage_layout += rows.storage_layout[storage : stop[2]]
        rows.storage_alloc += [at + ops for at in rows.storage_alloc[storage : stop[2]]]
        rows.storage_free += [at + ops for at in rows.storage_free[storage : stop[2]]]
        rows.op_kind += rows.op_kind[op : stop[0]]
        rows.op_phase += rows.op_phase[op : stop[0]]
        rows.op_module += [module] * (stop[0] - op)
        rows.op_inputs += [again(row) for row in rows.op_inputs[op : stop[0]]]
        rows.op_outputs += [again(row) for row in rows.op_outputs[op : stop[0]]]

    def _row(self, tensor: Tensor) -> int:
        row = getattr(tensor, "_cosim_row", None)
        return self.register(tensor) if row is None else row

    def finish(self) -> Recording:
        """The recording; what dies from now on is outside the step."""
        self._references.clear()
        return self.recording

    def _look_up(self, func: Any) -> _Operator:
        schema = func._schema
        target = f"{func.namespace}.{schema.name.split('::')[1]}"
        op_class = lookup(target).op_class
        written = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        if target.startswith("aten._fused_"):
            written -= {"grads", "state_steps"}  # gradients are written only when they are unscaled in the same kernel
        operator = _Operator(
            target,
            op_class,
            frozenset(written),
            tuple(argument.name for argument in schema.arguments),
            KEPT_ARGUMENTS.get(op_class, ()),
            torch.Tag.inplace_view in func.tags,
        )
        self._operators[func] = operator
        return operator

    @staticmethod
    def _attributes(operator: _Operator, args: Any, kwargs: Any) -> tuple[tuple[str, Any], ...]:
        """Kept scalars; whether attention has a bias per score."""
        found: list[tuple[str, Any]] = []
        given = {**dict(zip(operator.names, args, strict=False)), **kwargs}
        for name in operator.kept:
            if name in given and not isinstance(given[name], Tensor):
                value = given[name]
                found.append((ATTRIBUTE_NAMES.get(name, name), tuple(value) if isinstance(value, list) else value))
        if given.get("alibi_slopes") is not None or given.get("attn_mask") is not None:
            found.append(("alibi" if given.get("alibi_slopes") is not None else "mask", True))
        return tuple(found)

    @contextmanager
    def modules_of(self, model: torch.nn.Module) -> Iterator[None]:
        """While open, operators are attributed to the innermost module of `model` whose forward is running."""
        paths = {module: self.module_row(name) for name, module in model.named_modules()}
        stack = self._module_stack

        def enter(module: torch.nn.Module, _args: Any) -> None:
            stack.append(paths.get(module, stack[-1]))

        def leave(_module: torch.nn.Module, _args: Any, _result: Any) -> None:
            stack.pop()

        hooks = torch.nn.modules.module
        handles = [
            hooks.register_module_forward_pre_hook(enter),
            hooks.register_module_forward_hook(leave, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def part(self, path: str) -> Iterator[None]:
        """While open, operators of the optimizer are attributed to the parameter `path`."""
        self._module_stack.append(self.module_row(path))
        try:
            yield
        finally:
            self._module_stack.pop()

    def module_row(self, path: str) -> int:
        """The row of a module path."""
        row = self._module_rows.get(path)
        if row is None:
            row = self._module_rows[path] = len(self.recording.modules)
            self.recording.modules.append(path)
        return row
