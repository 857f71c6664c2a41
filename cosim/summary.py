"""Timeline -> Result: where the step's time, memory, energy and money went, and what holds it back."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cosim.engine.program import PICOSECONDS_PER_S, Program, Timeline
from cosim.graph import Category, OpGraph, Phase
from cosim.mapping.pricing import Prices
from cosim.mapping.rank import COMPUTE
from cosim.memory import memory_over_time
from cosim.parallel.data_parallel import DataParallelPlan
from cosim.result import Detail, MemoryCurve, OpRow, Result, Roofline, TracedStep
from cosim.spec import RunSpec
from cosim.stacks.stack import Stack
from cosim.techniques.precision import Precision
from hwmodels.accelerator import Accelerator
from hwmodels.cluster import Cluster
from hwmodels.units import format_quantity

Floats = NDArray[np.float64]
_LIMITS = {
    "compute": "matrix units",
    "memory": "memory bandwidth",
    "vector": "vector units",
    "special": "special-function units",
    "latency": "kernel latency",
}
# Backward of a fused attention kernel computes QK^T again: 2.5 times forward's FLOPs, of which 2 are the model's.
_ATTENTION_BACKWARD_SHARE = 2.0 / 2.5


@dataclass(frozen=True)
class Played:
    """A played step with all that led to it."""

    spec: RunSpec
    graph: OpGraph
    plan: DataParallelPlan
    prices: Prices
    program: Program
    timeline: Timeline
    accelerator: Accelerator
    cluster: Cluster
    stack: Stack
    formats: Precision
    micro_steps_played: int
    clock_rounds: int

    @cached_property
    def repeats(self) -> int:
        """Micro-steps that are not played because they repeat the one before the last."""
        return self.spec.micro_steps - self.micro_steps_played

    @cached_property
    def weight(self) -> NDArray[np.int64]:
        """How often each task happens in the step: those of the micro-step before the last stand for the repeated
        ones.
        """
        repeated = self.program.micro_step == self.micro_steps_played - 2
        return np.where(repeated, 1 + self.repeats, 1)

    @cached_property
    def occurrences(self) -> NDArray[np.int64]:
        """How often each op of the graph runs in the step."""
        in_optimizer = self.graph.op_phase == Phase.OPTIMIZER
        return np.where(in_optimizer, 1, self.spec.micro_steps)

    @cached_property
    def breakdown(self) -> _Breakdown:
        return _break_down(self)

    @property
    def step_time_s(self) -> float:
        """Seconds of the whole step, repeated micro-steps included."""
        return self.breakdown.step_ps / PICOSECONDS_PER_S

    @cached_property
    def dynamic_energy_j(self) -> float:
        """Joules per device and step above idle: kernels, and bytes over links and through memory in collectives."""
        ops = float((self.prices.energy_j * self.occurrences).sum())
        sent = 0.0
        plan = self.plan
        if plan.degree > 1:
            kinds = [label.kind for label in self.program.labels]
            for row in np.flatnonzero(self.program.stream > COMPUTE).tolist():
                sent += self._collective_energy(kinds[self.program.label[row]], row) * float(self.weight[row])
        return ops + sent

    def _collective_energy(self, kind: str, row: int) -> float:
        """Energy of a collective task, from the bytes that it sends: its share of a link's rate over its time."""
        demands = self.program.demands
        low, high = demands.indptr[row], demands.indptr[row + 1]
        seconds = float(self.program.work_ps[row]) / PICOSECONDS_PER_S
        moved = sum(
            float(amount) * seconds
            for resource, amount in zip(demands.resource[low:high], demands.amount[low:high], strict=True)
            if self.program.resources[resource].name.endswith("link")
        )
        return self.accelerator.power.energy_j(0.0, "fp32", {"link": moved, "hbm": 2 * moved})

    def sustained_clock_hz(self, nominal: Accelerator) -> float:
        """The clock at which the step's average power keeps to the limit."""
        if self.step_time_s == 0:
            return nominal.clock_hz
        power = self.dynamic_energy_j / self.step_time_s
        ratio = self.accelerator.clock_hz / nominal.clock_hz
        at_nominal = power / ratio**3  # energy is priced at the nominal voltage; see Power.sustained_clock
        return min(nominal.clock_hz, nominal.power.sustained_clock(max(power, at_nominal * ratio**3), nominal.clock_hz))


@dataclass(frozen=True, slots=True)
class _Breakdown:
    """The compute stream's time, in picoseconds of the whole step."""

    step_ps: float
    waiting: Mapping[str, float]  # gaps with a collective running, by its kind
    interference: float  # compute slowed by collectives
    host: float
    copies: float  # kernels that the graph does not have: copies around collectives, accumulation


def _break_down(played: Played) -> _Breakdown:
    program, timeline, weight = played.program, played.timeline, played.weight
    kinds = [label.kind for label in program.labels]
    rows = np.flatnonzero(program.stream == COMPUTE)
    others = np.flatnonzero(program.stream > COMPUTE)
    order = others[np.argsort(timeline.start_ps[others], kind="stable")]
    busy = [(int(timeline.start_ps[r]), int(timeline.end_ps[r]), kinds[program.label[r]]) for r in order.tolist()]
    waiting: dict[str, float] = {}
    host = interference = copies = step = 0.0
    cursor, first = 0, 0
    for row in rows.tolist():
        start, end, times = int(timeline.start_ps[row]), int(timeline.end_ps[row]), float(weight[row])
        first, covered = _covered(busy, first, cursor, start, waiting, times)
        host += (start - cursor - covered) * times
        excess = end - start - int(program.work_ps[row])
        launched = program.host[row] >= 0 and end == timeline.issue_ps[row] + program.span_ps[row]
        host += excess * times if launched else 0.0
        interference += 0.0 if launched else excess * times
        copies += int(program.work_ps[row]) * times if kinds[program.label[row]] == "copy" else 0.0
        step += (end - cursor) * times
        cursor = end
    tail = timeline.makespan_ps - cursor
    if tail > 0:
        _, covered = _covered(busy, 0, cursor, timeline.makespan_ps, waiting, 1.0)
        host += tail - covered
        step += tail
    return _Breakdown(step, waiting, interference, host, copies)


def _covered(
    busy: list[tuple[int, int, str]], first: int, low: int, high: int, waiting: dict[str, float], times: float
) -> tuple[int, int]:
    """How much of [low, high] a collective covers, added to `waiting` by kind; and where to look from next time."""
    covered, cursor = 0, low
    while first < len(busy) and busy[first][1] <= low:
        first += 1
    for start, end, kind in busy[first:]:
        if start >= high or cursor >= high:
            break
        part = min(end, high) - max(start, cursor)
        if part > 0:
            waiting[kind] = waiting.get(kind, 0.0) + part * times
            covered += part
            cursor = min(end, high)
    return first, covered


def summarize(played: Played) -> Result:
    """The result of a played step."""
    spec, accelerator = played.spec, played.accelerator
    devices, step_s = spec.system.devices, played.step_time_s
    curve, resident = _memory(played)
    capacity = accelerator.memory.hbm.capacity_bytes
    peak = {name: float(value) for name, value in resident.items()}
    peak_total = sum(peak.values())
    model_flops, hardware_flops = _flops(played)
    peak_flops = accelerator.peak_flops(played.formats.compute) * devices * _clock_ratio(played)
    power_j = played.dynamic_energy_j + accelerator.idle_power_w * step_s
    energy = power_j * devices
    hourly = accelerator.price_usd_per_hour
    cost = hourly / 3600.0 * step_s * devices if hourly else None
    times = _time_breakdown(played)
    tokens = spec.tokens_per_step
    return Result(
        step_time_s=step_s,
        step_time_interval_s=None,
        tokens_per_s=tokens / step_s if step_s else 0.0,
        tokens_per_s_per_device=tokens / step_s / devices if step_s else 0.0,
        mfu=model_flops / (peak_flops * step_s) if step_s else 0.0,
        hfu=hardware_flops / (peak_flops * step_s) if step_s else 0.0,
        model_flops=model_flops,
        feasible=peak_total <= capacity,
        infeasible_reason=None if peak_total <= capacity else _infeasible(played, peak, capacity),
        peak_memory_bytes=peak_total,
        worst_rank=0,
        memory_bytes=peak,
        memory_capacity_bytes=float(capacity),
        time_breakdown_s=times,
        clock_hz=accelerator.clock_hz,
        energy_j=energy,
        cost_usd=cost,
        run=_run(spec, step_s, energy, cost),
        limited_by=_limited_by(played, times),
        anchor_factor=None,
        calibration=_calibration(accelerator),
        extrapolated=_extrapolated(played),
        assumed=tuple(f"{played.stack.name}: {key}" for key in played.stack.assumed),
        unknown_ops=_unknown(played),
        warnings=(),
        spec=spec.echo(),
        detail=_detail(played, curve, capacity),
    )


def _clock_ratio(played: Played) -> float:
    """MFU is against the nominal peak, whatever the sustained clock."""
    nominal = played.cluster.accelerator.clock_hz
    return nominal / played.accelerator.clock_hz


def _flops(played: Played) -> tuple[float, float]:
    """FLOPs per step of all devices: the model's (no recomputation), and with recomputation."""
    graph = played.graph
    classes = np.array([kind.op_class for kind in graph.kinds])[graph.op_kind]
    share = np.select(
        [classes == "attention_backward", np.isin(classes, ["matmul", "attention"])],
        [_ATTENTION_BACKWARD_SHARE, 1.0],
        0.0,
    )
    flops = played.prices.flops * share * played.occurrences
    model = np.isin(graph.op_phase, [Phase.FORWARD, Phase.BACKWARD])
    again = graph.op_phase == Phase.RECOMPUTE
    replicas = played.plan.degree
    return float(flops[model].sum()) * replicas, float(flops[model | again].sum()) * replicas


def _time_breakdown(played: Played) -> dict[str, Any]:
    graph, second = played.graph, PICOSECONDS_PER_S
    parts = played.breakdown
    classes = [kind.op_class.removesuffix("_backward") for kind in graph.kinds]
    in_optimizer = graph.op_phase == Phase.OPTIMIZER
    time = played.prices.time_s * played.occurrences
    compute: dict[str, float] = {}
    by_kind = np.bincount(graph.op_kind, weights=np.where(in_optimizer, 0.0, time), minlength=len(classes))
    for op_class, seconds in zip(classes, by_kind.tolist(), strict=True):
        if seconds > 0:
            compute[op_class] = compute.get(op_class, 0.0) + seconds
    if parts.copies:
        compute["copy"] = compute.get("copy", 0.0) + parts.copies / second
    exposed = {kind: value / second for kind, value in sorted(parts.waiting.items()) if value}
    if parts.interference > 0:
        exposed["interference"] = parts.interference / second
    return {
        "compute": dict(sorted(compute.items(), key=lambda item: -item[1])),
        "exposed_communication": exposed,
        "bubble": 0.0,
        "host": parts.host / second,
        "optimizer": float(time[in_optimizer].sum()),
    }


def _limited_by(played: Played, times: Mapping[str, Any]) -> str:
    """The largest of: what limits the kernels, each by its own resource; exposed communication; the host."""
    time = played.prices.time_s * played.occurrences
    names = [_LIMITS.get(name, name) for name in played.prices.limited_by]
    by_limit = np.bincount(played.prices.limit, weights=time, minlength=len(names))
    shares: dict[str, float] = {}
    for name, seconds in zip(names, by_limit.tolist(), strict=True):
        shares[name] = shares.get(name, 0.0) + seconds
    shares["communication"] = math.fsum(times["exposed_communication"].values())
    shares["host"] = times["host"]
    name, seconds = max(shares.items(), key=lambda item: item[1])
    total = played.step_time_s
    return f"{name} ({seconds / total:.0%} of the step)" if total else "nothing"


def _memory(played: Played) -> tuple[MemoryCurve, dict[str, float]]:
    return memory_over_time(played.program, played.timeline, 0, _resident(played))


def _resident(played: Played) -> dict[Category, float]:
    """What is in memory during the whole step."""
    resident: dict[Category, float] = dict(played.plan.resident_bytes())
    spec, stack = played.spec, played.stack
    resident[Category.INPUTS] = 2 * 8 * spec.workload.micro_batch * spec.workload.seq_len
    communicators = 1 if played.plan.degree > 1 else 0
    resident[Category.FRAMEWORK] = (
        stack.blas_workspace_bytes.on(played.accelerator.architecture)
        + stack.context_bytes
        + communicators * stack.communicator_bytes
    )
    return resident


def _infeasible(played: Played, peak: Mapping[str, float], capacity: float) -> str:
    over = sum(peak.values()) - capacity
    need = f"needs {format_quantity(sum(peak.values()), 'data')} of {format_quantity(capacity, 'data')}"
    return f"{need}, {format_quantity(over, 'data')} too much; {_remedy(played, peak)}"


def _remedy(played: Played, peak: Mapping[str, float]) -> str:
    """What would make it fit, by what takes the most memory."""
    spec, plan = played.spec, played.plan
    state = peak.get("weights", 0.0) + peak.get("gradients", 0.0) + peak.get("optimizer", 0.0)
    passing = peak.get("activations", 0.0) + peak.get("temporary", 0.0)
    remedies: list[str] = []
    if passing >= state or plan.zero == 3:
        if spec.training.recompute != "full":
            remedies.append("recompute: full")
        if spec.workload.micro_batch > 1:
            remedies.append("a smaller micro_batch")
        remedies.append("a shorter seq_len")
    if state > passing or not remedies:
        if plan.zero < 3 and plan.degree > 1:
            remedies.append("zero: 3")
        remedies.append("more devices to shard over (zero: 3)")
    largest = "activations and temporaries" if passing >= state else "weights, gradients and optimizer states"
    return f"most of it is {largest}; try {' or '.join(remedies)}"


def _run(spec: RunSpec, step_s: float, energy: float, cost: float | None) -> dict[str, float] | None:
    if spec.workload.tokens is None:
        return None
    steps = spec.workload.tokens / spec.tokens_per_step
    run = {"time_s": steps * step_s, "energy_j": steps * energy}
    return run if cost is None else run | {"cost_usd": steps * cost}


def _calibration(accelerator: Accelerator) -> dict[str, Any]:
    provenance = [
        dict(zip(entry.__slots__, (getattr(entry, s) for s in entry.__slots__), strict=True))
        for entry in accelerator.provenance
    ]
    return {"status": accelerator.calibration_status, "provenance": provenance}


def _extrapolated(played: Played) -> tuple[str, ...]:
    accelerator = played.accelerator
    if accelerator.calibration_status == "calibrated":
        return ()
    return (f"{accelerator.name}: no calibration, its family's defaults are used",)


def _unknown(played: Played) -> tuple[Mapping[str, Any], ...]:
    graph = played.graph
    time = played.prices.time_s * played.occurrences
    by_kind = np.bincount(graph.op_kind, weights=time, minlength=len(graph.kinds))
    share: dict[str, float] = {}
    for kind, seconds in zip(graph.kinds, by_kind.tolist(), strict=True):
        if kind.op_class == "unknown":
            share[kind.target] = share.get(kind.target, 0.0) + seconds
    total = played.step_time_s or 1.0
    rows = [
        {"target": target, "count": int(count), "share": share.get(target, 0.0) / total}
        for target, count in graph.unknown_ops.items()
    ]
    return tuple(sorted(rows, key=lambda row: -float(row["share"])))


def _detail(played: Played, curve: MemoryCurve, capacity: float) -> Detail:
    accelerator = played.accelerator
    return Detail(
        program=played.program,
        timeline=played.timeline,
        ops=_op_rows(played),
        memory=curve,
        roofline=Roofline(
            {name: accelerator.peak_flops(name) for name in accelerator.formats}, accelerator.memory.hbm.rate("stream")
        ),
        device_capacity_bytes=float(capacity),
        model_name=_model_name(played.spec),
        parameters=played.graph.parameter_count(),
        micro_steps=played.spec.micro_steps,
        micro_steps_played=played.micro_steps_played,
        traced=TracedStep(
            graph=played.graph,
            prices=played.prices,
            resident_bytes=_resident(played),
            allocation_unit_bytes=played.stack.allocation_unit_bytes,
            optimizer_shards=played.plan.optimizer_shards,
        ),
    )


def _model_name(spec: RunSpec) -> str:
    model = spec.workload.model
    if isinstance(model, str):
        return model
    return str(
        getattr(model, "huggingface", None) or getattr(model, "python", None) or getattr(model, "family", "model")
    )


def _op_rows(played: Played) -> tuple[OpRow, ...]:
    """Ops grouped by module (block numbers as *), price and phase."""
    graph, prices = played.graph, played.prices
    starred: dict[str, int] = {}
    module = np.array([starred.setdefault(_starred(name), len(starred)) for name in graph.modules], dtype=np.int64)
    names = list(starred)
    key = (module[graph.op_module] * len(Phase) + graph.op_phase) * len(prices.limited_by) + prices.limit
    distinct, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    times = played.occurrences.astype(np.float64)
    sums = {
        name: np.bincount(inverse, weights=getattr(prices, name) * times, minlength=len(distinct))
        for name in ("time_s", "flops", "hbm_bytes")
    }
    counts = np.bincount(inverse, weights=times, minlength=len(distinct))
    rows = []
    for i, op in enumerate(first.tolist()):
        kind = graph.kinds[graph.op_kind[op]]
        if kind.op_class == "view":
            continue
        rows.append(
            OpRow(
                module=names[module[graph.op_module[op]]],
                target=kind.target,
                op_class=kind.op_class,
                phase=Phase(int(graph.op_phase[op])).name.lower(),
                count=int(counts[i]),
                time_s=float(sums["time_s"][i]),
                flops=float(sums["flops"][i]),
                hbm_bytes=float(sums["hbm_bytes"][i]),
                limited_by=prices.limited_by[prices.limit[op]],
                shape=" x ".join(_shape(graph, spec) for spec in kind.inputs[:3]),
            )
        )
    return tuple(sorted(rows, key=lambda row: -row.time_s))


def _starred(module: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", module)


def _shape(graph: OpGraph, spec: int) -> str:
    return "[" + ",".join(str(size) for size in graph.shapes[spec]) + "]"
