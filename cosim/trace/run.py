"""One training step on fake tensors: forward, loss, backward, clipping, optimizer, under the recorder."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from cosim.graph import OpGraph
from cosim.trace.assemble import Roles, assemble
from cosim.trace.optimizer import DTYPES, OptimizerStep
from cosim.trace.options import TraceOptions
from cosim.trace.recorder import Recorder
from cosim.trace.replacements import cuda_operators
from cosim.trace.sizes import SizeDecoder
from cosim.trace.step import DataDependentError, Progress, Source, UnknownValueError, is_own_decoder, provenance_of
from cosim.trace.values import Telling, Told, raised_at
from hwmodels.units import InputError
from workloads.build import build_module
from workloads.model import ModelConfig
from workloads.training import loss_of_output

_DYNAMIC_SHAPE = (DynamicOutputShapeException, GuardOnDataDependentSymNode)
_LONGEST = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "block_size")


def probing_limits(model: Source, options: TraceOptions, told: Told | None = None) -> tuple[set[int], int | None]:
    """(every dimension of the parameters, the longest sequence or None if unknown): what probing sizes must respect."""
    if is_own_decoder(model):
        fields = [getattr(model, name) for name in ModelConfig.__dataclass_fields__]
        dimensions = {size for size in fields if type(size) is int}
        dimensions |= {model.heads * model.head_dim, (model.heads + 2 * model.kv_heads) * model.head_dim}
        return dimensions, model.max_positions if model.pos_emb == "learned" else None
    with _fake(options), operators_of(options):
        module = build(model, options, options.sequence, told)
        tensors = [*module.parameters(), *module.buffers()]
        config = getattr(module, "config", None)
        longest = [getattr(config, name, None) for name in _LONGEST]
        if isinstance(model, ModelConfig) and model.pos_emb == "learned":
            longest.append(model.max_positions)
    found = [size for size in longest if isinstance(size, int) and size > 0]
    return {size for tensor in tensors for size in tensor.shape}, min(found, default=None)


def record(
    model: Source, options: TraceOptions, decoder: SizeDecoder, progress: Progress | None, told: Told | None = None
) -> OpGraph:
    """The graph of a step at the decoder's sizes (the options' sizes where it has None).

    `told` has the numbers that the module's code reads of its tensors. Raises InputError if the module fails,
    UnknownValueError if it reads a number that is not told, DataDependentError if shapes depend on values.
    """
    batch, sequence = decoder.batch or options.batch, decoder.sequence or options.sequence
    recorder = Recorder(_counter(progress), told)
    with _fake(options), operators_of(options), _without_garbage_collection():
        module = build(model, options, sequence, told)
        _check_formats(module, options)
        inputs, labels = inputs_of(module, batch, sequence)
        optimizer = OptimizerStep(module, options)
        roles = _register(recorder, module, optimizer, inputs, labels)
        with explained(), _recorded(recorder, module, options, inputs, labels) as forward:
            with recorder:
                with autocast(options):
                    loss = forward()
                loss = optimizer.scaled(loss)
                loss.backward()  # type: ignore[no-untyped-call]
                del loss
            _register_state(recorder, module, optimizer, roles)
            recorder.in_optimizer = True
            with recorder:
                optimizer.step(recorder, roles)
        recording = recorder.finish()
    provenance = {**provenance_of(model, options, decoder), "torch": torch.__version__}
    longest = getattr(module, "longest_sequence", None)
    if isinstance(longest, int):
        provenance["longest_sequence"] = longest
    return assemble(recording, roles, decoder, provenance)


@contextmanager
def _recorded(
    recorder: Recorder, module: nn.Module, options: TraceOptions, inputs: Any, labels: Tensor
) -> Iterator[Callable[[], Tensor]]:
    """The function that computes the loss, by the options' frontend."""
    loss = loss_of(module, options)
    if options.frontend == "eager":
        with recorder.modules_of(module):
            yield lambda: loss(inputs, labels)
        return
    from cosim.trace.compiled import captured

    with autocast(options):
        forward = captured(loss, module, recorder, inputs, labels)
    yield forward


def loss_of(module: nn.Module, options: TraceOptions) -> Callable[[Any, Tensor], Tensor]:
    """The scalar loss of the module as a function of its inputs and labels."""

    def loss(inputs: Any, labels: Tensor) -> Tensor:
        return loss_of_output(
            _call(module, inputs),
            labels,
            fused=options.loss_fused,
            in_fp32=options.loss_in_fp32,
            logged=options.logged_losses,
        )

    return loss


def autocast(options: TraceOptions) -> AbstractContextManager[None]:
    """The options' autocast, while `operators_of` them is open."""
    format = DTYPES.get(str(options.autocast_format))
    return nullcontext() if format is None else torch.autocast("cuda", format)


def operators_of(options: TraceOptions) -> AbstractContextManager[None]:
    """The operators of a CUDA device, norms as the options have them."""
    return cuda_operators(options.rms_norm_fused, options.autocast_norms_in_fp32)


def _counter(progress: Progress | None) -> Callable[[int], None] | None:
    if progress is None:
        return None
    return lambda ops: progress(f"tracing: {ops} operators", None)


class _OneFakeMode(FakeTensorMode):  # type: ignore[no-untyped-call]
    """A mode that copy.deepcopy leaves as it is, so that layers which a module clones stay tensors of this mode.

    Tensors of another mode are taken in anew whenever an operator reads them: each view would be memory of its own.
    """

    def __deepcopy__(self, memo: object) -> FakeTensorMode:
        return self


@contextmanager
def _fake(options: TraceOptions) -> Iterator[None]:
    """Fake tensors, and the options' parameter format as the default format."""
    with default_format(options), _OneFakeMode(allow_non_fake_inputs=True) as mode, _quiet(), _conversions(mode):
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """PyTorch logs a traceback for each operator that refuses its shapes; here that is a size which is tried."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)


@contextmanager
def _conversions(mode: FakeTensorMode) -> Iterator[None]:
    """Lets a module convert its parameters: `module.to(format)` swaps fake ones, which PyTorch refuses as long as the
    mode remembers them.
    """
    swap = torch.utils.swap_tensors

    def forget_and_swap(one: Tensor, other: Tensor) -> None:
        remembered = mode.fake_tensor_converter.meta_converter.tensor_memo
        for key in [key for key, tensor in remembered.items() if tensor is one or tensor is other]:
            del remembered[key]
        swap(one, other)  # type: ignore[no-untyped-call]

    torch.utils.swap_tensors = forget_and_swap
    try:
        yield
    finally:
        torch.utils.swap_tensors = swap


@contextmanager
def default_format(options: TraceOptions) -> Iterator[None]:
    """The options' parameter format as the default format."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[options.parameter_format])
    try:
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
def explained() -> Iterator[None]:
    """Whatever the module raises becomes one sentence."""
    try:
        yield
    except InputError as error:
        if isinstance(error.__cause__, DataDependentOutputException):  # while a loader built the module
            raise UnknownValueError(_UNKNOWN_VALUE.format(raised_at(error.__cause__))) from error
        raise
    except DataDependentOutputException as error:
        raise UnknownValueError(_UNKNOWN_VALUE.format(raised_at(error))) from error
    except _DYNAMIC_SHAPE as error:
        raise DataDependentError(
            f"model: {raised_at(error)} makes a tensor whose shape depends on the values of its tensors "
            f"({getattr(error, 'func', type(error).__name__)}), which a trace does not have; use an operator whose "
            "shape is fixed (torch.where(mask, x, 0) for x[mask])"
        ) from error
    except (Exception, SystemExit) as error:
        raise InputError(f"model: the training step raised {_one_line(error)}") from error


_UNKNOWN_VALUE = "model: its control flow depends on the values of its tensors at {}, which a trace does not have"


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".partition("\n\nWhile executing")[0].split())[:300]


def build(model: Source, options: TraceOptions, sequence: int, told: Told | None = None) -> nn.Module:
    """The module in training mode; `told` has the numbers that its constructor reads of tensors."""
    with explained(), nullcontext() if told is None else Telling(told):
        if callable(model):
            module = model()
        else:
            attention: Any = options.attention
            module = build_module(model, attention=attention, dropout=options.dropout, seq_len=sequence)
    return module.train()


def _check_formats(module: nn.Module, options: TraceOptions) -> None:
    """Refuses a module that chose the format of its own parameters, but for a hundredth of them: what a step holds and
    sends follows from the run's precision.
    """
    wanted = DTYPES[options.parameter_format]
    other = [parameter for parameter in module.parameters() if parameter.dtype != wanted]
    count, total = (sum(p.numel() for p in parameters) for parameters in (other, module.parameters()))
    if count > total / 100:
        raise InputError(
            f"model: {count:,} of its {total:,} parameters are {str(other[0].dtype).removeprefix('torch.')}, which is "
            f"not modelled; allowed: torch.get_default_dtype(), here {options.parameter_format}, as training.precision "
            "and training.framework say"
        )


def inputs_of(module: nn.Module, batch: int, sequence: int) -> tuple[Any, Tensor]:
    """The module's inputs (tensor, tuple or mapping of tensors) and labels: its own, or (batch, sequence)."""
    labels = torch.zeros((batch, sequence), dtype=torch.int64)
    example = getattr(module, "example_inputs", None)
    own_labels = getattr(module, "example_labels", None)
    if callable(own_labels):
        with explained():
            labels = own_labels(batch, sequence)
    if callable(example):
        with explained():
            return example(batch, sequence), labels
    tables = [part.num_embeddings for part in module.modules() if isinstance(part, nn.Embedding)]
    return torch.randint(0, min(tables, default=2), (batch, sequence)), labels


def _call(module: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return module(**inputs)
    return module(*inputs) if isinstance(inputs, tuple | list) else module(inputs)


def _tensors(inputs: Any) -> list[Tensor]:
    if isinstance(inputs, Mapping):
        inputs = list(inputs.values())
    values = inputs if isinstance(inputs, tuple | list) else [inputs]
    return [value for value in values if isinstance(value, Tensor)]


def _register(recorder: Recorder, module: nn.Module, optimizer: OptimizerStep, inputs: Any, labels: Tensor) -> Roles:
    """Makes rows of what exists before the step; a parameter with two names (tied embeddings) is one row."""
    roles = Roles()
    for name, parameter in module.named_parameters():
        storage = recorder.storage_of(parameter)
        roles.parameters.append((name, parameter._cosim_row, parameter.requires_grad))  # type: ignore[attr-defined]
        roles.weights.add(storage)
    roles.weights |= {recorder.storage_of(buffer) for buffer in module.buffers()}
    roles.optimizer = {recorder.storage_of(tensor) for tensor in optimizer.masters}
    roles.inputs = {recorder.storage_of(tensor) for tensor in (*_tensors(inputs), labels)}
    return roles


def _register_state(recorder: Recorder, module: nn.Module, optimizer: OptimizerStep, roles: Roles) -> None:
    """Makes rows of the optimizer's state, of which backward decides: as if it had been there before the step."""
    optimizer.fill_state()
    roles.optimizer |= {recorder.storage_of(tensor) for tensor in optimizer.state()}
    roles.unused = {name for name, p in module.named_parameters() if p.requires_grad and p.grad is None}
