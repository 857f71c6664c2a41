"""Memory over time: every task's allocations, placed where its timeline put the task, added up on what is always there.

Peak and when it is reached come from all events; the curve for drawing is thinned afterwards and keeps the peak.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cosim.engine.program import PICOSECONDS_PER_S, MemoryProfile, Program, Timeline
from cosim.graph import Category
from cosim.result import MemoryCurve

CATEGORIES = ("weights", "gradients", "optimizer", "activations", "temporary", "framework")
"""As `Result.memory_bytes` names them. A batch of inputs lives through the step and is counted with the activations."""

_REPORTED = {
    Category.WEIGHTS: "weights",
    Category.GRADIENTS: "gradients",
    Category.OPTIMIZER: "optimizer",
    Category.ACTIVATIONS: "activations",
    Category.TEMPORARY: "temporary",
    Category.INPUTS: "activations",
    Category.FRAMEWORK: "framework",
}
_PLACE = np.array([CATEGORIES.index(_REPORTED[category]) for category in Category])
_NO_EVENTS = MemoryProfile(np.empty(0), np.empty(0, dtype=np.int8), np.empty(0, dtype=np.int64))
_INTERVALS = 1300  # of the drawn curve, each with its highest, lowest and last point


def memory_over_time(
    program: Program, timeline: Timeline, device: int, resident: Mapping[Category, float]
) -> tuple[MemoryCurve, dict[str, float]]:
    """The curve of one device over the step (about 4000 points at most), and its peak by category (bytes).

    `resident` is in memory from the beginning on; the tasks' profiles add to it and take from it.
    """
    events = _events(program, timeline, device)
    base = _base(resident)
    total = np.concatenate([[0], np.cumsum(events.delta_bytes)]) + base.sum()
    time_ps = np.concatenate([[0], events.time_ps])  # point 0 is the beginning of the step
    peak = int(np.argmax(total))
    points = np.union1d(_for_drawing(time_ps, total), [0, peak])
    drawn = np.empty((len(CATEGORIES), len(points) + 1))
    drawn[:, :-1] = base[:, None] + held(events.place, events.delta_bytes, len(CATEGORIES), points)
    drawn[:, -1] = drawn[:, -2]
    until_ps = max(timeline.makespan_ps, int(time_ps[-1]))
    curve = MemoryCurve(
        time_s=np.append(time_ps[points], until_ps) / PICOSECONDS_PER_S,
        bytes=drawn,
        categories=CATEGORIES,
        peak_time_s=float(time_ps[peak] / PICOSECONDS_PER_S),
        peak_during=_name(program, int(events.task[peak - 1])) if peak else "the beginning of the step",
    )
    at_peak = drawn[:, int(np.searchsorted(points, peak))]
    return curve, dict(zip(CATEGORIES, at_peak.tolist(), strict=True))


def held(
    place: NDArray[Any], delta_bytes: NDArray[np.int64], places: int, points: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Bytes (places, points) that the changes before each point have left; point 0 is before the first."""
    levels = np.empty((places, len(points)), dtype=np.int64)
    for number in range(places):
        levels[number] = np.concatenate([[0], np.cumsum(np.where(place == number, delta_bytes, 0))])[points]
    return levels


def check_periodic(program: Program, timeline: Timeline, device: int, resident: Mapping[Category, float]) -> None:
    """Raises ValueError when a category falls below zero, or ends the step with more or less than it began with."""
    events = _events(program, timeline, device)
    base = _base(resident)
    for place, name in enumerate(CATEGORIES):
        mine = np.flatnonzero(events.place == place)
        if not len(mine):
            continue
        level = base[place] + np.cumsum(events.delta_bytes[mine])
        lowest = int(np.argmin(level))
        if level[lowest] < 0:
            task = int(events.task[mine[lowest]])
            raise ValueError(f"memory: {name} fall to {level[lowest]:.0f} bytes during {_name(program, task)}")
        if level[-1] != base[place]:
            over = level[-1] - base[place]
            raise ValueError(f"memory: {name} end the step {over:+.0f} bytes from where they began")


@dataclass(frozen=True, slots=True)
class _Events:
    """Every change of one device's memory, in order: when, which place in CATEGORIES, by how much, and whose."""

    time_ps: NDArray[np.int64]
    place: NDArray[np.int64]
    delta_bytes: NDArray[np.int64]
    task: NDArray[np.int64]


def _events(program: Program, timeline: Timeline, device: int) -> _Events:
    """Events at one picosecond keep the order of their tasks, and within a task that of its profile."""
    here = np.array([stream.device == device for stream in program.streams], dtype=np.bool_)
    profiles = [_NO_EVENTS, *program.profiles]
    fraction, category, delta = (
        np.concatenate([getattr(profile, name) for profile in profiles])
        for name in ("fraction", "category", "delta_bytes")
    )
    length = np.array([len(profile.fraction) for profile in profiles])
    first = np.cumsum(length) - length
    tasks = np.flatnonzero(program.profile >= 0)
    tasks = tasks[here[program.stream[tasks]]]
    chosen = program.profile[tasks] + 1
    task = np.repeat(tasks, length[chosen])
    count = np.cumsum(length[chosen]) - length[chosen]  # events of the tasks before
    source = np.repeat(first[chosen] - count, length[chosen]) + np.arange(len(task))
    fraction, category, delta = fraction[source], category[source], delta[source]
    start = timeline.start_ps[task]
    time = start + np.floor(fraction * (timeline.end_ps[task] - start)).astype(np.int64)
    order = np.argsort(time, kind="stable")
    return _Events(time[order], _PLACE[category[order]], delta[order], task[order])


def _base(resident: Mapping[Category, float]) -> NDArray[np.float64]:
    base = np.zeros(len(CATEGORIES))
    for category, size in resident.items():
        base[_PLACE[category]] += size
    return base


def _for_drawing(time_ps: NDArray[np.int64], total: NDArray[np.float64]) -> NDArray[np.int64]:
    """All points when they are few; else of each of equal intervals of time the highest, the lowest and the last."""
    if len(total) <= 3 * _INTERVALS:
        return np.arange(len(total))
    interval = (time_ps.astype(np.float64) * (_INTERVALS / (int(time_ps[-1]) + 1))).astype(np.int64)
    starts = np.flatnonzero(np.diff(interval, prepend=-1))
    chosen = [np.append(starts[1:], len(total)) - 1]
    for extreme in (np.maximum, np.minimum):
        value = np.repeat(extreme.reduceat(total, starts), np.diff(np.append(starts, len(total))))
        at = np.flatnonzero(total == value)
        chosen.append(at[np.flatnonzero(np.diff(interval[at], prepend=-1))])
    return np.unique(np.concatenate(chosen))


def _name(program: Program, task: int) -> str:
    return program.labels[int(program.label[task])].name
