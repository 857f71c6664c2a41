"""Small models to trace, and a few sums over a graph."""

from collections.abc import Callable

import numpy as np
import pytest

from cosim.graph import Category, OpGraph
from cosim.trace import TraceOptions, trace
from cosim.trace.run import record
from cosim.trace.sizes import SizeDecoder
from cosim.trace.step import canonical
from workloads.model import ModelConfig, from_dimensions

Trace = Callable[[ModelConfig, TraceOptions], OpGraph]
GPT = {"family": "gpt", "layers": 3, "hidden": 96, "heads": 4, "vocab": 500, "max_positions": 1024}
LLAMA = {"family": "llama", "layers": 3, "hidden": 96, "heads": 6, "kv_heads": 2, "ffn": 224, "vocab": 500}


@pytest.fixture
def gpt() -> ModelConfig:
    return from_dimensions(GPT)


@pytest.fixture
def llama() -> ModelConfig:
    return from_dimensions(LLAMA)


@pytest.fixture
def traced_at() -> Trace:
    """Traces at the actual sizes, without any probing."""
    return lambda model, options: record(canonical(model, options.sequence), options, SizeDecoder(None, None), None)


@pytest.fixture
def bound_as_traced(traced_at: Trace) -> Trace:
    """The graph of a model bound to the options' sizes, after seeing that a trace at those sizes is the same."""

    def described(graph: OpGraph) -> list[tuple[object, ...]]:
        """Every op in order, with the sizes and storages of what it reads and writes."""
        rows: list[tuple[object, ...]] = []
        for op in range(len(graph)):
            kind = graph.kinds[graph.op_kind[op]]
            tensors = [*graph.op_inputs.row(op).tolist(), *graph.op_outputs.row(op).tolist()]
            shapes = tuple(graph.shapes[graph.tensor_spec[t]] for t in tensors)
            storages = tuple(int(graph.tensor_storage[t]) for t in tensors)
            rows.append((kind.target, kind.attributes, kind.mutated, shapes, storages))
        return rows

    def compared(model: ModelConfig, options: TraceOptions) -> OpGraph:
        graph, again = trace(model, options), traced_at(model, options)
        assert described(graph) == described(again)
        for column in ("storage_bytes", "storage_alloc", "storage_free", "storage_category"):
            np.testing.assert_array_equal(getattr(graph, column), getattr(again, column))
        assert graph.blocks == again.blocks
        return graph

    return compared


@pytest.fixture
def bytes_of() -> Callable[[OpGraph, Category], int]:
    """Bytes of all storages of a category."""

    def total(graph: OpGraph, category: Category) -> int:
        return int(graph.storage_bytes[graph.storage_category == category].sum())

    return total


@pytest.fixture
def live_bytes() -> Callable[[OpGraph], np.ndarray]:
    """Bytes alive after each op, what existed before the step included."""

    def curve(graph: OpGraph) -> np.ndarray:
        change = np.zeros(len(graph) + 2, dtype=np.int64)
        np.add.at(change, np.maximum(graph.storage_alloc, 0), graph.storage_bytes)
        np.add.at(change, np.minimum(graph.storage_free, len(graph)) + 1, -graph.storage_bytes)
        return np.cumsum(change)[: len(graph)]

    return curve
