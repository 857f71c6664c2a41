"""What one simulated step says: the stable, versioned result, and the detail that reports draw.

`Result.to_json` is the contract with users (schema_version); `Detail` is what a report needs beyond it and is never
written to a file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from cosim.engine.program import Program, Timeline
    from cosim.graph import Category, OpGraph
    from cosim.mapping.pricing import Prices

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class OpRow:
    """Ops of one kind in one module (repeated blocks as `layers.*`) and phase, over the whole step of one device."""

    module: str
    target: str
    op_class: str
    phase: str
    count: int
    time_s: float  # all of them, alone on the device
    flops: float
    hbm_bytes: float
    limited_by: str
    shape: str  # for people: "8192x4096x14336"


@dataclass(frozen=True, slots=True)
class MemoryCurve:
    """Bytes in use on the worst rank over the step: `time_s` (n,), `bytes` (categories, n), `categories` as in
    memory_bytes.
    """

    time_s: NDArray[np.float64]
    bytes: NDArray[np.float64]
    categories: tuple[str, ...]
    peak_time_s: float
    peak_during: str  # what ran at the peak, for people


@dataclass(frozen=True, slots=True)
class Roofline:
    """The machine's ceilings that the ops are drawn against."""

    peak_flops: Mapping[str, float]  # by format
    hbm_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class TracedStep:
    """The ops below the tasks of one device, to which `Label.ops` refers, and what is always in its memory."""

    graph: OpGraph
    prices: Prices
    resident_bytes: Mapping[Category, float]
    allocation_unit_bytes: int
    optimizer_shards: int


@dataclass(frozen=True, slots=True)
class Detail:
    """What reports draw. Tasks of `timeline` that repeat (micro-steps beyond those played) are not repeated here."""

    program: Program
    timeline: Timeline
    ops: tuple[OpRow, ...]
    memory: MemoryCurve
    roofline: Roofline
    device_capacity_bytes: float
    model_name: str
    parameters: int
    micro_steps: int
    micro_steps_played: int
    traced: TracedStep | None = None  # of the rank that holds most
    ranks: tuple[TracedStep, ...] = ()  # of every device of the program


class TimeBreakdown(TypedDict, total=False):
    """Where the step's seconds go; the parts add up to it."""

    compute: Mapping[str, float]  # by class of op
    exposed_communication: Mapping[str, float]  # by kind of collective
    bubble: float
    host: float
    optimizer: float


class Calibration(TypedDict):
    """Whether the accelerator's constants were fitted, and each with what it was fitted on."""

    status: str
    provenance: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Result:
    """One simulated training step. Times in seconds, memory in bytes, of one device; energy and cost of the whole
    system.
    """

    step_time_s: float
    step_time_interval_s: tuple[float, float] | None
    tokens_per_s: float
    tokens_per_s_per_device: float
    mfu: float  # model FLOPs utilisation: attention counted (causal half), recomputation not
    hfu: float  # recomputation counted
    model_flops: float  # per step, all devices
    feasible: bool
    infeasible_reason: str | None
    peak_memory_bytes: float  # worst rank, as torch.cuda.max_memory_allocated counts: tensors and library workspaces
    worst_rank: int
    memory_bytes: Mapping[str, float]  # at the peak: weights gradients optimizer activations temporary framework
    device_memory_bytes: Mapping[str, float]  # allocated reserved context communicators total, and what is offered
    memory_capacity_bytes: float
    time_breakdown_s: TimeBreakdown  # compute: {op class: s}, exposed_communication: {kind: s}, bubble, host, optimizer
    clock_hz: float
    clock_rounds: int  # how often the step was played until its clock kept to the power limit; at most three
    energy_j: float
    cost_usd: float | None
    run: Mapping[str, float] | None  # time_s, energy_j, cost_usd with workload.tokens; goodput with system.failures
    limited_by: str
    anchor_factor: float | None
    calibration: Calibration  # status, provenance
    extrapolated: tuple[str, ...]
    assumed: tuple[str, ...]
    unknown_ops: tuple[Mapping[str, Any], ...]  # target, count, share of the step's time
    warnings: tuple[str, ...]
    spec: Mapping[str, Any]  # the run file, defaults filled in
    schema_version: int = SCHEMA_VERSION
    detail: Detail | None = field(default=None, compare=False, repr=False)

    def to_json(self) -> dict[str, Any]:
        """The stable JSON object: every field but `detail`, with plain dicts, lists, numbers and text."""
        fields = [f.name for f in dataclasses.fields(self) if f.name != "detail"]
        ordered = ["schema_version", *(name for name in fields if name != "schema_version")]
        return {name: _plain(getattr(self, name)) for name in ordered}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    return value
