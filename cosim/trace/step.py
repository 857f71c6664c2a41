"""Makes the graph of a training step: chooses the sizes to trace at, records, and binds the graph to the sizes asked
for.

The sizes are primes first (`sizes.py`), so that the graph binds to any batch and sequence length; a module that
refuses them is traced with its actual sequence length, then with both actual sizes. torch is imported when a trace is
made, not before.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from cosim.graph import OpGraph
from cosim.trace.options import TraceOptions
from cosim.trace.sizes import SizeDecoder, probe_batch, probe_sequences
from hwmodels.units import InputError
from workloads.model import Model, ModelConfig

if TYPE_CHECKING:
    import torch

Progress = Callable[[str, float | None], None]
Source = Model | Callable[[], "torch.nn.Module"]


class DataDependentError(InputError):
    """The module's control flow depends on the values of its tensors, which a trace does not have."""


def trace(model: Source, options: TraceOptions | None = None, progress: Progress | None = None) -> OpGraph:
    """The graph of one training step of `model`, bound to `options.batch` and `options.sequence`.

    `model` is a configuration, a Hugging Face or user module, or a function that builds a module. Where the module
    could not run at the probing sizes, `axes` lacks "batch" or "sequence"; `provenance["fixed"]` names them with
    their size. Raises InputError: the module cannot be built, its forward or backward fails, or its control flow
    depends on data.
    """
    options = options or TraceOptions()
    start = time.perf_counter()
    if progress is not None:
        progress("importing torch", None)
    from cosim.trace.run import probing_limits, record

    model = canonical(model, options.sequence)
    if progress is not None:
        progress("building the model", None)
    failure: InputError | None = None
    for batch, sequence in _attempts(*probing_limits(model, options)):
        try:
            graph = record(model, options, SizeDecoder(batch, sequence), progress)
        except DataDependentError:
            raise
        except InputError as error:
            failure = error
            continue
        seconds = round(time.perf_counter() - start, 3)
        return bind(dataclasses.replace(graph, provenance={**graph.provenance, "seconds": seconds}), options)
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
    for axis, size in graph.provenance.get("fixed", {}).items():
        if sizes[axis] != size:
            raise InputError(f"model: the module fixes its {axis} size to {size}; {sizes[axis]} is not possible")
    return graph.bind(**{axis: size for axis, size in sizes.items() if axis in graph.axes})


def _attempts(dimensions: set[int], longest: int | None) -> Iterator[tuple[int | None, int | None]]:
    """Pairs of probing batch and sequence, None where the actual size is used."""
    batch = probe_batch(dimensions)
    for sequence in probe_sequences(dimensions, longest):
        yield batch, sequence
    yield batch, None
    yield None, None


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
