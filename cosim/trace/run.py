"""One training step on fake tensors: forward, loss, backward, clipping, optimizer, under the recorder."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from cosim.graph import OpGraph
from cosim.trace.assemble import Roles, assemble
from cosim.trace.options import TraceOptions
from cosim.trace.recorder import HostNumbers, Recorder
from cosim.trace.replacements import cuda_autocast, cuda_operators
from cosim.trace.sizes import SizeDecoder
from cosim.trace.step import DataDependentError, Progress, Source, is_own_decoder, provenance_of
from hwmodels.units import InputError
from workloads.build import build_module
from workloads.model import ModelConfig
from workloads.training import loss_of_output

DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)
_LONGEST = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "block_size")


def probing_limits(model: Source, options: TraceOptions) -> tuple[set[int], int | None]:
    """(every dimension of the parameters, the longest sequence or None if unknown): what probing sizes must respect."""
    if is_own_decoder(model):
        fields = [getattr(model, name) for name in ModelConfig.__dataclass_fields__]
        dimensions = {size for size in fields if type(size) is int}
        dimensions |= {model.heads * model.head_dim, (model.heads + 2 * model.kv_heads) * model.head_dim}
        return dimensions, model.max_positions if model.pos_emb == "learned" else None
    with _fake(options):
        module = _build(model, options, options.sequence)
        tensors = [*module.parameters(), *module.buffers()]
        config = getattr(module, "config", None)
        longest = [getattr(config, name, None) for name in _LONGEST]
        if isinstance(model, ModelConfig) and model.pos_emb == "learned":
            longest.append(model.max_positions)
    found = [size for size in longest if isinstance(size, int) and size > 0]
    return {size for tensor in tensors for size in tensor.shape}, min(found, default=None)


def record(model: Source, options: TraceOptions, decoder: SizeDecoder, progress: Progress | None) -> OpGraph:
    """The graph of a step at the decoder's sizes (the options' sizes where it has None).

    Raises InputError if the module fails, DataDependentError if it needs values that fake tensors do not have.
    """
    batch, sequence = decoder.batch or options.batch, decoder.sequence or options.sequence
    recorder = Recorder(_counter(progress))
    with _fake(options), cuda_operators(), _without_garbage_collection():
        module = _build(model, options, sequence)
        inputs, labels = _inputs(module, batch, sequence)
        optimizer = Optimizer(module, options)
        roles = _register(recorder, module, optimizer, inputs, labels)
        with _explained(), recorder, recorder.modules_of(module):
            with cuda_autocast(DTYPES.get(str(options.autocast_format)), options.autocast_norms_in_fp32):
                loss = loss_of_output(
                    _call(module, inputs),
                    labels,
                    fused=options.loss_fused,
                    in_fp32=options.loss_in_fp32,
                    logged=options.logged_losses,
                )
            loss.backward()  # type: ignore[no-untyped-call]
            del loss
            recorder.in_optimizer = True
            optimizer.step(recorder, roles)
        recording = recorder.finish()
    provenance = {**provenance_of(model, options, decoder), "torch": torch.__version__}
    longest = getattr(module, "longest_sequence", None)
    if isinstance(longest, int):
        provenance["longest_sequence"] = longest
    return assemble(recording, roles, decoder, provenance)


def _counter(progress: Progress | None) -> Callable[[int], None] | None:
    if progress is None:
        return None
    return lambda ops: progress(f"tracing: {ops} operators", None)


@contextmanager
def _fake(options: TraceOptions) -> Iterator[None]:
    """Fake tensors, and the options' parameter format as the default format."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[options.parameter_format])
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """No collector pauses: a trace makes many objects and few cycles."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _explained() -> Iterator[None]:
    """Whatever the module raises becomes one sentence."""
    try:
        yield
    except InputError:
        raise
    except _DATA_DEPENDENT as error:
        raise DataDependentError(
            f"model: its control flow or shapes depend on the values of its tensors ({_one_line(error)}), "
            "which a trace does not have; use an operator whose shapes are fixed"
        ) from error
    except (Exception, SystemExit) as error:
        raise InputError(f"model: the training step raised {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _build(model: Source, options: TraceOptions, sequence: int) -> nn.Module:
    if callable(model):
        with _explained():
            module = model()
    else:
        attention: Any = options.attention
        module = build_module(model, attention=attention, dropout=options.dropout, seq_len=sequence)
    return module.train()


def _inputs(module: nn.Module, batch: int, sequence: int) -> tuple[Any, Tensor]:
    """The module's inputs (tensor, tuple or mapping of tensors) and labels: its own, or (batch, sequence)."""
    labels = torch.empty((batch, sequence), dtype=torch.int64)
    example = getattr(module, "example_inputs", None)
    own_labels = getattr(module, "example_labels", None)
    if callable(own_labels):
        with _explained():
            labels = own_labels(batch, sequence)
    if callable(example):
        with _explained():
            return example(batch, sequence), labels
    return torch.empty((batch, sequence), dtype=torch.int64), labels


def _call(module: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return module(**inputs)
    return module(*inputs) if isinstance(inputs, tuple | list) else module(inputs)


def _tensors(inputs: Any) -> list[Tensor]:
    if isinstance(inputs, Mapping):
        inputs = list(inputs.values())
    values = inputs if isinstance(inputs, tuple | list) else [inputs]
    return [value for value in values if isinstance(value, Tensor)]


class Optimizer:
    """An optimizer in its steady state: its state exists before the step, and masters where their format differs."""

    def __init__(self, module: nn.Module, options: TraceOptions) -> None:
        self.options = options
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        if not self.parameters:
            raise InputError("model: it has no trainable parameters, so there is no training step")
        self.masters: list[Tensor] = []
        if options.separate_masters:
            master_dtype = DTYPES[str(options.master_format)]
            self.masters = [torch.empty_like(p, dtype=master_dtype).requires_grad_() for p in self.parameters]
        self.updated = self.masters or self.parameters
        implementation = options.implementation
        switches = {"fused": implementation == "fused", "foreach": implementation == "foreach"}
        if implementation == "single" and options.optimizer == "adafactor":
            switches = {"foreach": False}
        elif implementation != "fused":
            switches.pop("fused")
        self.torch = _OPTIMIZERS[options.optimizer](self.updated, **switches)
        for parameter in self.updated:
            parameter.grad = torch.empty_like(parameter)
        with HostNumbers():  # type: ignore[no-untyped-call]
            self.torch.step()
        self.torch.zero_grad(set_to_none=True)

    def state(self) -> list[Tensor]:
        """Moments, step counts and masters."""
        moments = [v for state in self.torch.state.values() for v in state.values() if isinstance(v, Tensor)]
        return moments + self.masters

    def step(self, recorder: Recorder, roles: Roles) -> None:
        """Cast gradients, clip, update, copy masters back, drop gradients; fills the roles of gradients."""
        roles.gradients |= {recorder.storage_of(p.grad) for p in self.parameters if p.grad is not None}
        self._cast_gradients()
        roles.gradients |= {recorder.storage_of(p.grad) for p in self.updated if p.grad is not None}
        if self.options.gradient_clipping:
            torch.nn.utils.clip_grad_norm_(self.updated, 1.0, foreach=self.options.implementation != "single")
        self.torch.step()
        if self.masters:
            with torch.no_grad():
                torch._foreach_copy_(list[Tensor](self.parameters), self.masters)
        self.torch.zero_grad(set_to_none=True)
        for parameter in self.parameters:
            parameter.grad = None

    def _cast_gradients(self) -> None:
        """Gradients in the format in which they reach the optimizer, then in that of what it updates."""
        wanted = DTYPES[self.options.gradient_format] if self.options.gradient_format else None
        for parameter, updated in zip(self.parameters, self.updated, strict=True):
            gradient = parameter.grad
            if gradient is None:
                continue
            gradient = gradient.to(wanted) if wanted is not None else gradient
            gradient = gradient.to(updated.dtype)
            parameter.grad = None
            updated.grad = gradient


_OPTIMIZERS: Mapping[str, Any] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": lambda parameters, **switches: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, **switches),
    "adagrad": torch.optim.Adagrad,
    "adafactor": torch.optim.Adafactor,
    "rmsprop": torch.optim.RMSprop,
    "adamax": torch.optim.Adamax,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
}


def _register(recorder: Recorder, module: nn.Module, optimizer: Optimizer, inputs: Any, labels: Tensor) -> Roles:
    """Makes rows of what exists before the step; a parameter with two names (tied embeddings) is one row."""
    roles = Roles()
    for name, parameter in module.named_parameters():
        storage = recorder.storage_of(parameter)
        roles.parameters.append((name, parameter._cosim_row, parameter.requires_grad))  # type: ignore[attr-defined]
        roles.weights.add(storage)
    roles.weights |= {recorder.storage_of(buffer) for buffer in module.buffers()}
    roles.optimizer = {recorder.storage_of(tensor) for tensor in optimizer.state()}
    roles.inputs = {recorder.storage_of(tensor) for tensor in (*_tensors(inputs), labels)}
    return roles
