"""Small traces, made once, and sums over a graph."""

import functools
from collections.abc import Callable

import numpy as np
import pytest

from cosim.graph import Category, OpGraph, Phase
from cosim.trace import TraceOptions, trace
from workloads.model import ModelConfig, from_dimensions

Traced = Callable[..., OpGraph]

MODELS = {
    "gpt": {"family": "gpt", "layers": 3, "hidden": 96, "heads": 4, "vocab": 500, "max_positions": 256},
    "llama": {"family": "llama", "layers": 3, "hidden": 96, "heads": 6, "kv_heads": 2, "ffn": 224, "vocab": 500},
    "untied": {"family": "gpt", "layers": 2, "hidden": 64, "heads": 2, "vocab": 300, "tied_embeddings": False},
}


def model_named(name: str) -> ModelConfig:
    return from_dimensions(MODELS[name])


@functools.cache
def _trace(name: str, options: tuple[tuple[str, object], ...]) -> OpGraph:
    return trace(model_named(name), TraceOptions(**{"batch": 2, "sequence": 64, **dict(options)}))  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def traced() -> Traced:
    """`traced("gpt", attention="unfused")`: the graph at 2 sequences of 64 tokens."""
    return lambda name, **options: _trace(name, tuple(sorted(options.items())))


@pytest.fixture(scope="session")
def model() -> Callable[[str], ModelConfig]:
    return model_named


def live_bytes(graph: OpGraph, *categories: Category) -> np.ndarray:
    """Bytes alive after each op's allocations and before its frees, of `categories` (none: all)."""
    counted = np.isin(graph.storage_category, categories) if categories else np.ones(len(graph.storage_alloc), bool)
    change = np.zeros(len(graph) + 2, dtype=np.int64)
    np.add.at(change, np.maximum(graph.storage_alloc[counted], 0), graph.storage_bytes[counted])
    np.add.at(change, np.minimum(graph.storage_free[counted], len(graph)) + 1, -graph.storage_bytes[counted])
    return np.cumsum(change)[: len(graph)]


def ops(graph: OpGraph, op_class: str, phase: Phase | None = None) -> int:
    """How many ops of a class, in a phase or in all."""
    mine = np.array([kind.op_class == op_class for kind in graph.kinds])[graph.op_kind]
    return int(np.sum(mine if phase is None else mine & (graph.op_phase == phase)))


@pytest.fixture(scope="session")
def live() -> Callable[..., np.ndarray]:
    return live_bytes


@pytest.fixture(scope="session")
def count() -> Callable[..., int]:
    return ops


@pytest.fixture(scope="session")
def saved() -> Callable[[OpGraph], int]:
    """Activations that are alive when forward ends."""

    def total(graph: OpGraph) -> int:
        last = int(np.flatnonzero(graph.op_phase == Phase.FORWARD)[-1])
        return int(live_bytes(graph, Category.ACTIVATIONS)[last])

    return total


@pytest.fixture(scope="session")
def alive() -> Callable[[OpGraph], None]:
    """Asserts that every op's operands are in memory when it runs, and that nothing is freed before it is made."""

    def check(graph: OpGraph) -> None:
        for operands in (graph.op_inputs, graph.op_outputs):
            op = np.repeat(np.arange(len(graph)), np.diff(operands.indptr))
            storage = graph.tensor_storage[operands.indices]
            assert (graph.storage_alloc[storage] <= op).all()
            assert (graph.storage_free[storage] >= op).all()
        made = graph.storage_alloc >= 0
        assert (graph.storage_free[made] >= graph.storage_alloc[made]).all()

    return check
