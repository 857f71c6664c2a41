"""Timeline -> Result: where the step's time, memory, energy and money went, and what holds it back."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cosim.engine.program import PICOSECONDS_PER_S
from cosim.footprint import DeviceMemory, device_memory_at, memory, resident
from cosim.goodput import run_with_failures
from cosim.graph import OpGraph, OpKind, Phase
from cosim.mapping.replicas import first_replica
from cosim.notices import notices
from cosim.parallel.communication import COLLECTIVE
from cosim.played import Played, RankPart
from cosim.result import Calibration, Detail, MemoryCurve, OpRow, Result, Roofline, TimeBreakdown, TracedStep
from cosim.spec import RunSpec
from cosim.techniques import quantization
from cosim.trace.vocabulary import attention_dims
from hwmodels.accelerator import Accelerator
from hwmodels.units import format_quantity

Floats = NDArray[np.float64]
Remedy = Callable[[float], str]
_LIMITS = {
    "compute": "matrix units",
    "memory": "memory bandwidth",
    "vector": "vector units",
    "special": "special-function units",
    "latency": "kernel latency",
}


def summarize(played: Played, remedy: Remedy | None = None) -> Result:
    """The result of a played step; `remedy` says what would make it fit, given the bytes that it needs."""
    spec, accelerator = played.spec, played.accelerator
    devices, step_s = spec.system.devices, played.step_time_s
    worst, curve, resident = memory(played)
    capacity = accelerator.memory.hbm.capacity_bytes
    peak = {name: float(value) for name, value in resident.items()}
    device = device_memory_at(played, sum(peak.values()))
    fits = device.total <= device.offered
    model_flops, hardware_flops = _flops(played)
    # against the nominal peak, whatever clock is sustained
    peak_flops = played.cluster.accelerator.peak_flops(played.formats.compute) * devices
    energy = (played.dynamic_energy_j + accelerator.idle_power_w * step_s) * devices
    price = accelerator.price_usd_per_s
    cost = price * step_s * devices if price else None
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
        feasible=fits,
        infeasible_reason=None if fits else _infeasible(peak, device, remedy),
        peak_memory_bytes=device.allocated,
        worst_rank=worst,
        memory_bytes=peak,
        device_memory_bytes=device.bytes(),
        memory_capacity_bytes=float(capacity),
        time_breakdown_s=times,
        clock_hz=accelerator.clock_hz,
        clock_rounds=played.clock_rounds,
        energy_j=energy,
        cost_usd=cost,
        run=_run(played, step_s, energy, cost),
        limited_by=_limited_by(played, times),
        anchor_factor=None,
        calibration=_calibration(accelerator),
        extrapolated=_extrapolated(played),
        assumed=tuple(f"{played.stack.name}: {key}" for key in played.stack.assumed),
        unknown_ops=_unknown(played),
        warnings=notices(played),
        spec=spec.echo(),
        detail=_detail(played, worst, curve, capacity),
    )


def _flops(played: Played) -> tuple[float, float]:
    """FLOPs per step of all devices: the model's (no recomputation), and with recomputation."""
    graph = played.whole
    per_kind = np.array([_models_share(graph, kind) for kind in graph.kinds])
    share = per_kind[graph.op_kind] * np.where(_half_masked(graph), 0.5, 1.0)
    flops = played.model_flops * share * played.spec.micro_steps
    model = np.isin(graph.op_phase, [Phase.FORWARD, Phase.BACKWARD])
    again = graph.op_phase == Phase.RECOMPUTE
    replicas = played.spec.data_parallel
    return float(flops[model].sum()) * replicas, float(flops[model | again].sum()) * replicas


def _models_share(graph: OpGraph, kind: OpKind) -> float:
    """The share of an op's FLOPs that the model asks for: of a fused attention's backward all but the scores, which it
    computes again (arXiv 2205.14135): 2 in 2.5 times forward's, where values are as wide as keys.
    """
    if kind.op_class == "attention_backward":
        *_, head_dim, value_dim = attention_dims(graph, kind)
        return (2 * head_dim + 2 * value_dim) / (3 * head_dim + 2 * value_dim)
    return 1.0 if kind.op_class in ("matmul", "attention", "convolution") else 0.0


def _half_masked(graph: OpGraph) -> NDArray[np.bool_]:
    """Which ops are products over all scores of unfused causal attention, of which the mask leaves half to the model.

    They are batched, two of their three dimensions are the same, and a softmax of their module reads what was filled
    under a mask.
    """

    def over_scores(kind: OpKind) -> bool:
        if kind.op_class != "matmul":
            return False
        left, right = (graph.specs[spec].dims for spec in kind.inputs[-2:])
        return len(left) == 3 and len({left[-2], left[-1], right[-1]}) == 2

    scores = np.array([over_scores(kind) for kind in graph.kinds], dtype=np.bool_)
    found: NDArray[np.bool_] = scores[graph.op_kind] & np.isin(graph.op_module, _masked_modules(graph))
    return found


def _masked_modules(graph: OpGraph) -> list[int]:
    """Modules with a softmax over scores that were filled under a mask, there or before (T5's bias is, once for all
    layers); the fill is followed through views, copies and arithmetic.
    """
    members = [[kind, *(graph.kinds[member] for member in kind.attribute("members", ()))] for kind in graph.kinds]
    fills = [any(one.target.startswith("aten.masked_fill") for one in kinds) for kinds in members]
    ends = [any(one.op_class == "softmax" for one in kinds) for kinds in members]
    passes = [any(one.op_class in ("view", "copy", "pointwise") for one in kinds) for kinds in members]
    if not any(fills):
        return []
    filled: set[int] = set()
    modules: set[int] = set()
    for op in np.flatnonzero(graph.op_phase == Phase.FORWARD).tolist():
        kind = int(graph.op_kind[op])
        masked = fills[kind] or not filled.isdisjoint(graph.op_inputs.row(op).tolist())
        if masked and ends[kind]:
            modules.add(int(graph.op_module[op]))
        elif masked and passes[kind]:
            filled.update(graph.op_outputs.row(op).tolist())
    return sorted(modules)


def _time_breakdown(played: Played) -> TimeBreakdown:
    """On average over pipeline ranks."""
    second, parts = PICOSECONDS_PER_S, played.breakdown
    compute: dict[str, float] = {}
    exposed: dict[str, float] = {}
    optimizer = 0.0
    for rank in played.ranks:
        optimizer += _add_times(played, rank, compute, exposed)
    ranks = len(played.ranks)
    compute = {name: seconds / ranks for name, seconds in compute.items()}
    exposed = {name: seconds / ranks for name, seconds in exposed.items()}
    if parts.copies:
        compute["copy"] = compute.get("copy", 0.0) + parts.copies / second
    exposed |= {kind: value / second for kind, value in sorted(parts.waiting.items()) if value}
    if parts.interference > 0:
        exposed["interference"] = parts.interference / second
    return {
        "compute": dict(sorted(compute.items(), key=lambda item: -item[1])),
        "exposed_communication": exposed,
        "bubble": parts.bubble / second,
        "host": parts.host / second,
        "optimizer": optimizer / ranks,
    }


def _add_times(played: Played, rank: RankPart, compute: dict[str, float], exposed: dict[str, float]) -> float:
    """Add the seconds of a rank's ops by class, and of its collectives by group and kind; answers the update's."""
    graph = rank.graph
    classes = [kind.op_class.removesuffix("_backward") for kind in graph.kinds]
    apart = np.array([kind.op_class in ("quantize", COLLECTIVE) for kind in graph.kinds], dtype=np.bool_)
    in_optimizer = (graph.op_phase == Phase.OPTIMIZER) & ~apart[graph.op_kind]
    time = rank.prices.time_s * played.occurrences(rank)
    by_kind = np.bincount(graph.op_kind, weights=np.where(in_optimizer, 0.0, time), minlength=len(classes))
    for kind, op_class, seconds in zip(graph.kinds, classes, by_kind.tolist(), strict=True):
        if seconds > 0 and op_class == COLLECTIVE:
            name = f"{kind.attribute('group')} {kind.target.removeprefix('cosim.')}"
            exposed[name] = exposed.get(name, 0.0) + seconds
        elif seconds > 0:
            compute[op_class] = compute.get(op_class, 0.0) + seconds
    return float(time[in_optimizer].sum())


def _limited_by(played: Played, times: TimeBreakdown) -> str:
    """The largest of: what limits kernels, each by its own resource; exposed communication; the bubble; the host."""
    shares: dict[str, float] = {}
    for rank in played.ranks:
        time = rank.prices.time_s * played.occurrences(rank) / len(played.ranks)
        names = [_LIMITS.get(name, name) for name in rank.prices.limited_by]
        by_limit = np.bincount(rank.prices.limit, weights=time, minlength=len(names))
        for name, seconds in zip(names, by_limit.tolist(), strict=True):
            shares[name] = shares.get(name, 0.0) + seconds
    shares["communication"] = math.fsum(times["exposed_communication"].values())
    shares["host"] = times["host"]
    shares["pipeline bubble"] = times["bubble"]
    name, seconds = max(shares.items(), key=lambda item: item[1])
    total = played.step_time_s
    return f"{name} ({seconds / total:.0%} of the step)" if total else "nothing"


def _infeasible(peak: Mapping[str, float], device: DeviceMemory, remedy: Remedy | None) -> str:
    total, capacity = device.total, device.offered
    need = f"needs {format_quantity(total, 'data')} of {format_quantity(capacity, 'data')}"
    state = peak.get("weights", 0.0) + peak.get("gradients", 0.0) + peak.get("optimizer", 0.0)
    passing = peak.get("activations", 0.0) + peak.get("temporary", 0.0)
    largest = "activations and temporaries" if passing >= state else "weights, gradients and optimizer states"
    said = f"{need}, {format_quantity(total - capacity, 'data')} too much; most of it is {largest}"
    return said if remedy is None else f"{said}; {remedy(total)}"


def _run(played: Played, step_s: float, energy: float, cost: float | None) -> dict[str, float] | None:
    spec = played.spec
    if spec.workload.tokens is None:
        return None
    steps = spec.workload.tokens / spec.tokens_per_step
    run = {"time_s": steps * step_s, "energy_j": steps * energy}
    if cost is not None:
        run["cost_usd"] = steps * cost
    return run if spec.system.failures is None else _with_failures(played, run)


def _with_failures(played: Played, run: Mapping[str, float]) -> dict[str, float]:
    """The same run with failures; what is not training or computed again draws idle power."""
    failures, devices = played.spec.system.failures, played.spec.system.devices
    assert failures is not None
    checkpoint_s = failures.checkpoint_time
    if checkpoint_s is None:
        assert failures.storage_bandwidth is not None
        checkpoint_s = _checkpoint_bytes(played) / failures.storage_bandwidth
    said = failures.checkpoint_interval
    interval_s = None if isinstance(said, str) else said
    between_s = failures.mean_time_between_failures / devices
    found = run_with_failures(run["time_s"], between_s, checkpoint_s, failures.restart_time, interval_s)
    longer, idle_s = 1 / found.goodput, found.checkpoints_s + found.restarts_s
    computed = run["energy_j"] * (1 + found.again_s / found.training_s) if found.training_s else 0.0
    return {
        **{key: value * longer for key, value in run.items()},
        "energy_j": computed + played.accelerator.idle_power_w * devices * idle_s,
        "training_s": found.training_s,
        "goodput": found.goodput,
        "failures": found.failures,
        "checkpoint_time_s": checkpoint_s,
        "checkpoint_interval_s": found.checkpoint_interval_s,
    }


def _checkpoint_bytes(played: Played) -> float:
    """Of all parameters as the optimizer reads them, and its states."""
    graph, formats = played.whole, played.stages[0].plan.formats
    sizes = {p.storage: (math.prod(graph.shapes[p.spec]), p.trained) for p in graph.parameters}
    return float(sum(n * (formats.master + formats.optimizer_state * trained) for n, trained in sizes.values()))


def _calibration(accelerator: Accelerator) -> Calibration:
    entries = [dataclasses.asdict(entry) for entry in accelerator.provenance]
    return {"status": accelerator.calibration_status, "provenance": entries}


def _extrapolated(played: Played) -> tuple[str, ...]:
    accelerator = played.accelerator
    found = []
    if accelerator.calibration_status != "calibrated":
        found.append(f"{accelerator.name}: no calibration, its family's defaults are used")
    elif accelerator.calibrated_on is not None and accelerator.calibrated_on[1]:
        base, changed = accelerator.calibrated_on
        found.append(f"{accelerator.name}: calibration inherited from {base}, changed: {', '.join(changed)}")
    power = accelerator.power
    if not power.energy_per_flop_j and not power.energy_per_byte_j:
        found.append(f"{accelerator.name}: no energies: energy is that of an idle chip, and its clock is never limited")
    elif not power.energy_per_flop_j or not power.energy_per_byte_j:
        lacks = "per FLOP" if not power.energy_per_flop_j else "per byte"
        found.append(f"{accelerator.name}: no energies {lacks}: energy is too low")
    return (*found, *quantization.uncalibrated(played.whole, accelerator))


def _unknown(played: Played) -> tuple[Mapping[str, Any], ...]:
    share: dict[str, float] = {}
    for rank in played.ranks:
        time = rank.prices.time_s * played.occurrences(rank) / len(played.ranks)
        by_kind = np.bincount(rank.graph.op_kind, weights=time, minlength=len(rank.graph.kinds))
        for kind, seconds in zip(rank.graph.kinds, by_kind.tolist(), strict=True):
            if kind.op_class == "unknown":
                share[kind.target] = share.get(kind.target, 0.0) + seconds
    total = played.step_time_s or 1.0
    rows = [
        {"target": target, "count": int(count), "share": share.get(target, 0.0) / total}
        for target, count in played.whole.unknown_ops.items()
    ]
    return tuple(sorted(rows, key=lambda row: -float(row["share"])))


def _detail(played: Played, worst: int, curve: MemoryCurve, capacity: float) -> Detail:
    accelerator = played.accelerator
    ranks = tuple(
        TracedStep(
            graph=rank.graph,
            prices=rank.prices,
            resident_bytes=resident(played, rank),
            allocation_unit_bytes=played.stack.allocation_unit_bytes,
            optimizer_shards=rank.plan.optimizer_shards,
        )
        for rank in played.stages
    )
    program, timeline = first_replica(played.program, played.timeline, played.replicas)
    return Detail(
        program=program,
        timeline=timeline,
        ops=_op_rows(played),
        memory=curve,
        roofline=Roofline(
            {name: accelerator.peak_flops(name) for name in accelerator.formats}, accelerator.memory.hbm.rate("stream")
        ),
        device_capacity_bytes=float(capacity),
        model_name=_model_name(played.spec),
        parameters=played.whole.parameter_count(),
        micro_steps=played.spec.micro_steps,
        micro_steps_played=played.micro_steps_played,
        traced=ranks[worst],
        ranks=ranks,
    )


def _model_name(spec: RunSpec) -> str:
    model = spec.workload.model
    if isinstance(model, str):
        return model
    return str(
        getattr(model, "huggingface", None) or getattr(model, "python", None) or getattr(model, "family", "model")
    )


def _op_rows(played: Played) -> tuple[OpRow, ...]:
    """Ops grouped by module (block numbers as *), price and phase, on average over pipeline ranks."""
    merged: dict[tuple[str, ...], OpRow] = {}
    for rank in played.ranks:
        for row in _rank_rows(played, rank):
            key = (row.module, row.target, row.phase, row.limited_by, row.shape)
            other = merged.get(key)
            if other is not None:
                sums = {name: getattr(row, name) + getattr(other, name) for name in ("count", "time_s", "flops")}
                row = dataclasses.replace(row, hbm_bytes=row.hbm_bytes + other.hbm_bytes, **sums)
            merged[key] = row
    return tuple(sorted(merged.values(), key=lambda row: -row.time_s))


def _rank_rows(played: Played, rank: RankPart) -> Iterator[OpRow]:
    graph, prices = rank.graph, rank.prices
    starred: dict[str, int] = {}
    module = np.array([starred.setdefault(_starred(name), len(starred)) for name in graph.modules], dtype=np.int64)
    names = list(starred)
    key = (module[graph.op_module] * len(Phase) + graph.op_phase) * len(prices.limited_by) + prices.limit
    distinct, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    times = played.occurrences(rank).astype(np.float64)
    sums = {
        name: np.bincount(inverse, weights=getattr(prices, name) * times, minlength=len(distinct)) / len(played.ranks)
        for name in ("time_s", "flops", "hbm_bytes")
    }
    counts = np.bincount(inverse, weights=times, minlength=len(distinct))
    for i, op in enumerate(first.tolist()):
        kind = graph.kinds[graph.op_kind[op]]
        if kind.op_class == "view":
            continue
        yield OpRow(
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


def _starred(module: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", module)


def _shape(graph: OpGraph, spec: int) -> str:
    return "[" + ",".join(str(size) for size in graph.shapes[spec]) + "]"
