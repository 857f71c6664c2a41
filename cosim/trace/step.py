"""Makes the graph of a training step: chooses the sizes to trace at, records, and binds the graph to the sizes asked
for.

The sizes are primes first (`sizes.py`), so that the graph binds to any batch and sequence length, which a second
trace checks where the module is not this project's own; a module that
refuses them is traced with its actual sequence length, then with both actual sizes. torch is imported when a trace is
made, not before.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from cosim.graph import OpGraph
from cosim.trace.options import TraceOptions
from cosim.trace.sizes import SizeDecoder, probe_batches, probe_sequences
from hwmodels.units import InputError
from workloads.model import Model, ModelConfig

if TYPE_CHECKING:
    import torch

    from cosim.trace.values import Told, Values

Progress = Callable[[str, float | None], None]
Source = Model | Callable[[], "torch.nn.Module"]


class DataDependentError(InputError):
    """The module's control flow or shapes depend on the values of its tensors, which a trace does not have."""


class UnknownValueError(DataDependentError):
    """The module's code reads a number of its tensors, which a run on small real tensors may tell."""


class GraphBreakError(InputError):
    """torch.compile does not capture the module as one graph."""


def trace(model: Source, options: TraceOptions | None = None, progress: Progress | None = None) -> OpGraph:
    """The graph of one training step of `model`, bound to `options.batch` and `options.sequence`.

    `model` is a configuration, a Hugging Face or user module, or a function that builds a module. Where the module
    could not run at the probing sizes, `axes` lacks "batch" or "sequence"; `provenance["fixed"]` names them with their
    size. Where its control flow depends on data, it takes the branches that small random tensors take, and
    `provenance["assumed_values"]` names their lines. Raises InputError: PyTorch is missing, the module cannot be
    built, its forward or backward fails, or its shapes depend on data.
    """
    options = options or TraceOptions()
    start = time.perf_counter()
    tell = progress or (lambda text, fraction: None)
    tell("importing torch", None)
    try:
        from cosim.trace.rehearsal import rehearse
    except ModuleNotFoundError as error:
        raise InputError(f"tracing a model needs {error.name}; install it with: pip install cosim[trace]") from error

    model = canonical(model, options.sequence)
    tell("building the model", None)
    try:
        graph = _traced(model, options, progress, None)
    except UnknownValueError:
        if options.frontend == "compile":
            raise
        tell("running small real tensors through the model, whose control flow depends on values", None)
        graph = _traced(model, options, progress, rehearse(model, options))
    seconds = round(time.perf_counter() - start, 3)
    return bind(dataclasses.replace(graph, provenance={**graph.provenance, "seconds": seconds}), options)


def _traced(model: Source, options: TraceOptions, progress: Progress | None, values: Values | None) -> OpGraph:
    """The graph at the first sizes at which the module can be traced, told the `values` that its code reads."""
    from cosim.trace.run import probing_limits, record

    def told(batch: int | None, sequence: int | None, again: bool = False) -> Told | None:
        sizes = batch or options.batch, sequence or options.sequence
        return None if values is None else values.told(sizes, again)

    def at(decoder: SizeDecoder, again: bool = False) -> OpGraph:
        return record(model, options, decoder, progress, told(decoder.batch, decoder.sequence, again))

    failure: InputError | None = None
    for decoder, second in _attempts(model, options, *probing_limits(model, options, told(None, None))):
        if values and values.varying and second is None:
            raise DataDependentError(
                f"model: {values.varying[0]} reads a whole number that depends on the values of its tensors, and its "
                "operators or their shapes follow that number, which a trace does not have"
            )
        try:
            graph = at(decoder)
            if second is not None:
                again = at(second, again=True)
                if options.frontend == "compile":  # `again` is at the actual sizes, and decides
                    graph = graph if same_step(bind(graph, options), again) else again
                elif not same_step(graph, again):
                    failure = InputError("model: its operators change with its sizes")
                    continue
        except (DataDependentError, GraphBreakError):
            raise
        except InputError as error:
            failure = error
            continue
        notes = {"assumed_values": values.assumed} if values and values.assumed else {}
        return dataclasses.replace(graph, provenance={**graph.provenance, **notes})
    assert failure is not None
    raise failure


def canonical(model: Source, sequence: int) -> Source:
    """`model` as far as its graph depends on the sequence length: a learned position table must have a row per
    position.
    """
    if not isinstance(model, ModelConfig):
        return model
    return model.for_sequence(sequence if model.pos_emb == "learned" else 1)


def bind(graph: OpGraph, options: TraceOptions) -> OpGraph:
    """The graph at the options' sizes. Raises InputError if one of them is fixed to another value by the traced
    module.
    """
    sizes = {"batch": options.batch, "sequence": options.sequence}
    longest = graph.provenance.get("longest_sequence")
    if longest is not None and options.sequence > longest:
        raise InputError(f"model: attention within a window of {longest} tokens is not modelled for {options.sequence}")
    for axis, size in graph.provenance.get("fixed", {}).items():
        if sizes[axis] != size:
            raise InputError(f"model: the module fixes its {axis} size to {size}; {sizes[axis]} is not possible")
    return graph.bind(**{axis: size for axis, size in sizes.items() if axis in graph.axes})


def one_sequence_differs(model: Source, options: TraceOptions) -> bool:
    """Whether a batch of one sequence is traced as such: copies that reorder dimensions vanish where one of them is 1.

    The fused attention of this project's own models makes no such copy; relative positions are never fused, and vit
    sums the gradient of its positions over the batch.
    """
    same = isinstance(model, ModelConfig) and model.pos_emb != "relative" and model.family != "vit"
    return options.batch == 1 and not (same and options.attention == "flash")


def is_own_decoder(model: Source) -> TypeGuard[ModelConfig]:
    """Whether the model is this project's gpt or llama."""
    return isinstance(model, ModelConfig) and model.family in ("gpt", "llama")


def _attempts(
    model: Source, options: TraceOptions, dimensions: set[int], longest: int | None
) -> Iterator[tuple[SizeDecoder, SizeDecoder | None]]:
    """Sizes to trace at, and others at which a second trace must be the same; a decoder without a size uses the actual.

    Models of this project bind to every size, which its tests show; others may do anything with their sizes and are
    traced twice. What torch.compile's partitioner saves depends on sizes: it is traced at the actual ones too.
    """
    batches: list[int | None] = list(probe_batches(dimensions))
    if one_sequence_differs(model, options):
        batches = [None, None]
    twice = not isinstance(model, ModelConfig)
    if options.frontend == "compile":
        for sequence, _ in probe_sequences(dimensions, longest):
            yield SizeDecoder(batches[0], sequence), SizeDecoder(None, None)
        yield SizeDecoder(None, None), None
        return
    for sequence, other in probe_sequences(dimensions, longest):
        yield SizeDecoder(batches[0], sequence), SizeDecoder(batches[1], other) if twice else None
    if batches[0] is not None:
        yield SizeDecoder(batches[0], None), SizeDecoder(batches[1], None) if twice else None
    yield SizeDecoder(None, None), None


def same_step(graph: OpGraph, again: OpGraph) -> bool:
    """Whether `graph`, bound to the sizes of `again`, is `again`: operators, shapes, storages and lifetimes."""
    sizes = {axis: again.axes[axis] for axis in ("batch", "sequence") if axis in again.axes}
    bound = graph.bind(**sizes)

    def shapes(g: OpGraph) -> list[tuple[int, ...]]:
        return [g.shapes[spec] for spec in g.tensor_spec.tolist()]

    def targets(g: OpGraph) -> list[str]:
        return [g.kinds[kind].target for kind in g.op_kind.tolist()]

    columns = ("op_phase", "tensor_storage", "storage_bytes", "storage_alloc", "storage_free")
    return (
        all(np.array_equal(getattr(bound, column), getattr(again, column)) for column in columns)
        and targets(bound) == targets(again)
        and shapes(bound) == shapes(again)
    )


def provenance_of(model: Source, options: TraceOptions, decoder: SizeDecoder) -> dict[str, Any]:
    """What was traced, how, and which sizes are fixed."""
    fixed = {}
    if decoder.batch is None:
        fixed["batch"] = options.batch
    if decoder.sequence is None:
        fixed["sequence"] = options.sequence
    recipe = {key: value for key, value in dataclasses.asdict(options).items() if key not in ("batch", "sequence")}
    return {
        "model": repr(model) if dataclasses.is_dataclass(model) else getattr(model, "__qualname__", "module"),
        "options": recipe,
        "probe": {"batch": decoder.batch, "sequence": decoder.sequence},
        "fixed": fixed,
    }
