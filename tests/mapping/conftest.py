"""A tiny trace mapped onto a cluster and played, with any option changed."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pytest

from cosim import engine, stacks
from cosim.engine.program import PICOSECONDS_PER_S, Program, Timeline
from cosim.graph import Category, OpGraph
from cosim.mapping.data_parallel import build_program
from cosim.mapping.pricing import Kernels, price
from cosim.mapping.rank import interference
from cosim.mapping.segments import Segment, segments
from cosim.parallel.data_parallel import DataParallelPlan, plan
from cosim.parallel.groups import group
from cosim.stacks.stack import Stack
from cosim.techniques.fusion import fuse
from cosim.techniques.precision import StepFormats
from cosim.techniques.recompute import recompute
from cosim.trace import TraceOptions, trace
from hwmodels import accelerator as accelerators
from hwmodels.accelerator import Accelerator
from hwmodels.cluster import Cluster
from workloads.model import from_dimensions

MODELS = {
    "gpt": {"family": "gpt", "layers": 4, "hidden": 64, "heads": 2, "vocab": 301, "max_positions": 128},
    "llama": {"family": "llama", "layers": 4, "hidden": 64, "heads": 4, "kv_heads": 2, "ffn": 160, "vocab": 300},
}
MASTERS = StepFormats(parameter=2, master=4, gradient=2, gather=2, reduce=2, optimizer_state=8)


@dataclass(frozen=True)
class Step:
    """A played step and all that it was made from."""

    graph: OpGraph
    plan: DataParallelPlan
    stack: Stack
    segments: list[Segment]
    program: Program
    timeline: Timeline

    @property
    def time_s(self) -> float:
        return self.timeline.makespan_ps / PICOSECONDS_PER_S

    @property
    def resident(self) -> Mapping[Category, int]:
        return self.plan.resident_bytes()

    def kinds(self) -> list[str]:
        """What each task is: compute, copy, host, all_gather, reduce_scatter, all_reduce."""
        return [self.program.labels[label].kind for label in self.program.label.tolist()]

    def sent(self, kind: str) -> float:
        """Bytes that the rank sends on its links in collectives of a kind."""
        demands = self.program.demands
        links = [resource.name.endswith("link") for resource in self.program.resources]
        total = 0.0
        for row in np.flatnonzero(np.array(self.kinds()) == kind).tolist():
            for i in range(demands.indptr[row], demands.indptr[row + 1]):
                if links[demands.resource[i]]:
                    total += demands.amount[i] * self.program.work_ps[row] / PICOSECONDS_PER_S
        return total


@functools.cache
def _trace(name: str, **options: object) -> OpGraph:
    recipe = {"parameter_format": "bf16", "master_format": "fp32", "batch": 1, "sequence": 64, **options}
    return trace(from_dimensions(MODELS[name]), TraceOptions(**recipe))  # type: ignore[arg-type]


@functools.cache
def _accelerator() -> Accelerator:
    return accelerators.load("h100-sxm-80gb")


def _step(
    name: str = "gpt",
    *,
    degree: int = 8,
    per_node: int = 8,
    zero: int = 0,
    micro_steps: int = 2,
    formats: StepFormats = MASTERS,
    overlap: bool = True,
    recomputed: str | int = "none",
    compiled: bool = False,
    bucket_bytes: int = 2**16,
    framework: str = "pytorch",
    accelerator: Accelerator | None = None,
    trace_options: Mapping[str, object] = {},
    one_copy: bool = False,
    **facts: object,
) -> Step:
    if one_copy:  # of the parameters, which the optimizer updates as they are
        trace_options = {**trace_options, "master_format": None}
        formats = StepFormats(parameter=2, master=2, gradient=2, gather=2, reduce=2, optimizer_state=4)
    graph = recompute(_trace(name, **trace_options), recomputed)
    stack = dataclasses.replace(stacks.load(framework), **facts)  # type: ignore[arg-type]
    graph = fuse(graph, "block") if compiled else graph
    chip = accelerator or _accelerator()
    cluster = Cluster.build(chip, max(degree, 1), per_node)
    made = plan(
        graph,
        group=group(degree, 1, cluster.domain, max(degree, 1)),
        zero=zero,
        formats=formats,
        overlap_gradients=overlap,
        overlap_parameters=overlap,
        bucket_bytes=bucket_bytes,
        first_bucket_bytes=2**14,
    )
    prices = price(graph, chip, Kernels("tf32", "flash-2", stack), made.optimizer_shards)
    parts = segments(graph, prices, stack, interference(made, cluster), made.optimizer_shards, compiled)
    program, _ = build_program(made, parts, cluster, stack, micro_steps)
    return Step(graph, made, stack, parts, program, engine.play(program))


@pytest.fixture(scope="session")
def step() -> Callable[..., Step]:
    """`step("gpt", zero=3, degree=8, micro_steps=2, forward_prefetch=True)`: stack facts by name."""
    return _step


@pytest.fixture(scope="session")
def h100() -> Accelerator:
    return _accelerator()
