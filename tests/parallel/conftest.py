"""One small trace per model, and plans over it."""

import functools
from collections.abc import Callable

import pytest

from cosim.graph import OpGraph
from cosim.parallel.data_parallel import DataParallelPlan, plan
from cosim.parallel.groups import group
from cosim.techniques.precision import StepFormats
from cosim.trace import TraceOptions, trace
from workloads.model import from_dimensions

MODELS = {
    "tied": {"family": "gpt", "layers": 3, "hidden": 64, "heads": 2, "vocab": 301, "max_positions": 128},
    "untied": {"family": "llama", "layers": 3, "hidden": 64, "heads": 4, "kv_heads": 2, "ffn": 160, "vocab": 300},
}
MASTERS = StepFormats(parameter=2, master=4, gradient=2, gather=2, reduce=2, optimizer_state=8)


@functools.cache
def _trace(name: str) -> OpGraph:
    return trace(from_dimensions(MODELS[name]), TraceOptions(batch=1, sequence=64))


@pytest.fixture(scope="session")
def traced() -> Callable[[str], OpGraph]:
    return _trace


@pytest.fixture(scope="session")
def planned() -> Callable[..., DataParallelPlan]:
    """`planned("tied", zero=1, degree=8)`: a plan with 16-bit compute and fp32 Adam unless `formats` says otherwise."""

    def make(name: str, **changes: object) -> DataParallelPlan:
        defaults = {
            "zero": 0,
            "formats": MASTERS,
            "overlap_gradients": True,
            "overlap_parameters": True,
            "bucket_bytes": 25 * 2**20,
            "first_bucket_bytes": 2**20,
        }
        degree = int(changes.pop("degree", 8))  # type: ignore[call-overload]
        ranks = group(degree, 1, 8, degree)
        return plan(_trace(name), group=ranks, **{**defaults, **changes})  # type: ignore[arg-type]

    return make
