"""Small models to trace, and a few sums over a graph."""

from collections.abc import Callable

import numpy as np
import pytest

from cosim.graph import Category, OpGraph
from workloads.model import ModelConfig, from_dimensions

GPT = {"family": "gpt", "layers": 3, "hidden": 96, "heads": 4, "vocab": 500, "max_positions": 1024}
LLAMA = {"family": "llama", "layers": 3, "hidden": 96, "heads": 6, "kv_heads": 2, "ffn": 224, "vocab": 500}


@pytest.fixture
def gpt() -> ModelConfig:
    return from_dimensions(GPT)


@pytest.fixture
def llama() -> ModelConfig:
    return from_dimensions(LLAMA)


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
