"""The work of making a trace grows as its operators do."""

import cProfile
import pstats

import pytest

from cosim.trace import TraceOptions, trace
from workloads.model import from_dimensions


def calls_per_op(layers: int, optimizer: str) -> float:
    """Function calls of a trace, by operator that it records."""
    model = from_dimensions({"family": "gpt", "layers": layers, "hidden": 64, "heads": 2, "vocab": 100})
    profile = cProfile.Profile()
    graph = profile.runcall(trace, model, TraceOptions(optimizer=optimizer, batch=1, sequence=16))
    return float(pstats.Stats(profile).total_calls / len(graph))  # type: ignore[attr-defined]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_deep_model_costs_no_more_per_operator_than_a_shallow_one(optimizer: str) -> None:
    calls_per_op(2, optimizer)  # imports and caches
    assert calls_per_op(24, optimizer) < 1.02 * calls_per_op(6, optimizer)
