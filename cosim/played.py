"""A step that was played, with all that led to it: how long it took, where the time went, which energy and clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from cosim.engine.program import PICOSECONDS_PER_S, Program, Timeline
from cosim.graph import OpGraph, Phase
from cosim.mapping.pricing import Prices
from cosim.mapping.rank import COMPUTE
from cosim.parallel.data_parallel import DataParallelPlan
from cosim.spec import RunSpec
from cosim.stacks.stack import Stack
from cosim.techniques.precision import Precision
from hwmodels.accelerator import Accelerator
from hwmodels.cluster import Cluster

_LEAST_FOR_CORES = 0.01  # of the power limit, however much memory and links draw
_SETTLED = 0.005  # of the nominal clock: two rounds that differ by less are one


@dataclass(frozen=True)
class Played:
    """A played step with all that led to it."""

    spec: RunSpec
    whole: OpGraph  # of one replica, before it was cut
    model_flops: NDArray[np.float64]  # of its ops
    graph: OpGraph  # of one rank
    plan: DataParallelPlan
    prices: Prices
    program: Program
    moved_j: NDArray[np.float64]  # of each task that the graph does not have: its bytes through memory and over links
    timeline: Timeline
    accelerator: Accelerator
    cluster: Cluster
    stack: Stack
    formats: Precision
    micro_steps_played: int
    clock_rounds: int = 1

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
    def breakdown(self) -> Breakdown:
        """Where the time went."""
        return _break_down(self)

    @property
    def step_time_s(self) -> float:
        """Seconds of the whole step, repeated micro-steps included."""
        return self.breakdown.step_ps / PICOSECONDS_PER_S

    @property
    def clock_ratio(self) -> float:
        """The clock that was played, over the nominal one."""
        return self.accelerator.clock_hz / self.cluster.accelerator.clock_hz

    @cached_property
    def core_energy_j(self) -> float:
        """Joules per device and step of arithmetic and on-chip memory.

        Work is priced at the nominal voltage; the cores' voltage goes with the clock, and energy with its square.
        """
        return (float(self._energy_of_ops_j.sum()) - self._op_memory_energy_j) * self._voltage**2

    @cached_property
    def moved_energy_j(self) -> float:
        """Joules per device and step of bytes through main memory and over links, whose voltage is their own."""
        return self._op_memory_energy_j + float((self.moved_j * self.weight).sum())

    @property
    def dynamic_energy_j(self) -> float:
        """Joules per device and step above idle."""
        return self.core_energy_j + self.moved_energy_j

    @property
    def _voltage(self) -> float:
        return self.accelerator.power.voltage(self.clock_ratio)

    @property
    def _energy_of_ops_j(self) -> NDArray[np.float64]:
        return self.prices.energy_j * self.occurrences

    @cached_property
    def _op_memory_energy_j(self) -> float:
        moved = float((self.prices.hbm_bytes * self.occurrences).sum())
        return self.accelerator.power.energy_j(0.0, "fp32", {"hbm": moved})

    @cached_property
    def sustained_clock_hz(self) -> float:
        """The clock (Hz) at which a step of this duration keeps to the power limit; see `Power.sustained_clock`.

        Memory and links draw what they draw, and the cores have what is left.
        """
        nominal = self.cluster.accelerator
        power = nominal.power
        if not self.step_time_s:
            return nominal.clock_hz
        moved_w, core_w = self.moved_energy_j / self.step_time_s, self.core_energy_j / self.step_time_s
        drawn_w = min(power.idle_w + moved_w, (1 - _LEAST_FOR_CORES) * power.limit_w)
        left = replace(power, idle_w=max(power.idle_w, drawn_w))
        return left.sustained_clock(core_w / self.clock_ratio / self._voltage**2, nominal.clock_hz)

    @property
    def clock_is_sustained(self) -> bool:
        """Whether the clock that was played is the one that its power leaves."""
        off = abs(self.sustained_clock_hz - self.accelerator.clock_hz)
        return off <= _SETTLED * self.cluster.accelerator.clock_hz


@dataclass(frozen=True, slots=True)
class Breakdown:
    """The compute stream's time, in picoseconds of the whole step."""

    step_ps: float
    waiting: Mapping[str, float]  # gaps with a collective running, by its kind
    interference: float  # compute slowed by collectives
    host: float
    copies: float  # kernels that the graph does not have: copies around collectives, accumulation


def _break_down(played: Played) -> Breakdown:
    program, timeline, weight = played.program, played.timeline, played.weight
    kinds = [label.kind for label in program.labels]
    rows = np.flatnonzero(program.stream == COMPUTE)
    awaited = _awaited_ps(program, timeline)
    others = np.flatnonzero(program.stream > COMPUTE)
    order = others[np.argsort(timeline.start_ps[others], kind="stable")]
    busy = [(int(timeline.start_ps[r]), int(timeline.end_ps[r]), kinds[program.label[r]]) for r in order.tolist()]
    waiting: dict[str, float] = {}
    host = interference = copies = step = 0.0
    cursor, first = 0, 0
    for row in rows.tolist():
        start, end, times = int(timeline.start_ps[row]), int(timeline.end_ps[row]), float(weight[row])
        first, covered = _covered(busy, first, cursor, min(start, awaited[row]), waiting, times)
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
    return Breakdown(step, waiting, interference, host, copies)


def _awaited_ps(program: Program, timeline: Timeline) -> list[int]:
    """When the last collective ends that each task depends on; 0 for none."""
    depends = program.depends
    task = np.repeat(np.arange(len(program)), np.diff(depends.indptr))
    ends = np.where(program.stream[depends.indices] > COMPUTE, timeline.end_ps[depends.indices], 0)
    latest = np.zeros(len(program), dtype=np.int64)
    np.maximum.at(latest, task, ends)
    found: list[int] = latest.tolist()
    return found


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
