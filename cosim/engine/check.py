"""Whether a program can be played at all: an engine looks here before it starts."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cosim.engine.program import MemoryProfile, Program
from cosim.graph import Category

COLUMNS = (
    *("work_ps", "host", "launch_ps", "span_ps", "synchronises"),
    *("priority", "rendezvous", "label", "profile", "micro_step"),
)
LONGEST_PS = 2**62
"""53 days: what all the times of a program may add up to, so that no time overflows an int64."""


def check(program: Program) -> None:
    """Raises ValueError that names the column, the task and the value which cannot be."""
    tasks, streams = len(program), len(program.streams)
    for name in COLUMNS:
        if len(getattr(program, name)) != tasks:
            raise ValueError(f"program: {name} has {len(getattr(program, name))} rows, stream has {tasks}")
    _within(program, "stream", program.stream, 0, streams)
    _within(program, "host", program.host, -1, streams)
    _within(program, "label", program.label, 0, len(program.labels))
    _within(program, "profile", program.profile, -1, len(program.profiles))
    _within(program, "rendezvous", program.rendezvous, -1, None)
    total_ps = 0.0
    for name in ("work_ps", "launch_ps", "span_ps"):
        _within(program, name, getattr(program, name), 0, None)
        total_ps += float(np.sum(getattr(program, name), dtype=np.float64))
    if total_ps >= LONGEST_PS:
        raise ValueError(f"program: its times add up to {total_ps * 1e-12:.3g} s, more than an engine can count")
    _rows("depends", program.depends.indptr, len(program.depends.indices), tasks)
    _within(program, "depends", program.depends.indices, 0, tasks, program.depends.indptr)
    _check_demands(program)
    for index, profile in enumerate(program.profiles):
        _check_profile(index, profile)


def _check_demands(program: Program) -> None:
    demands = program.demands
    _rows("demands", demands.indptr, len(demands.resource), len(program))
    if len(demands.amount) != len(demands.resource):
        raise ValueError(f"program: demands name {len(demands.resource)} resources and {len(demands.amount)} amounts")
    _within(program, "demands.resource", demands.resource, 0, len(program.resources), demands.indptr)
    bad = np.flatnonzero(~(np.isfinite(demands.amount) & (demands.amount >= 0)))
    if len(bad):
        raise ValueError(f"program: demands.amount is {demands.amount[bad[0]]}; it must be finite and not negative")
    for resource in program.resources:
        if not (np.isfinite(resource.capacity) and resource.capacity > 0):
            raise ValueError(f"program: the capacity of {resource.name!r} is {resource.capacity}; it must be positive")


def _check_profile(index: int, profile: MemoryProfile) -> None:
    if not len(profile.fraction) == len(profile.category) == len(profile.delta_bytes):
        raise ValueError(f"program: the columns of memory profile {index} differ in length")
    if len(profile.fraction) and not (profile.fraction.min() >= 0 and profile.fraction.max() <= 1):
        raise ValueError(f"program: memory profile {index} has a fraction outside 0..1")
    if len(profile.category) and not (profile.category.min() >= 0 and profile.category.max() < len(Category)):
        raise ValueError(f"program: memory profile {index} has an unknown category")


def _within(
    program: Program,
    column: str,
    values: NDArray[Any],
    least: int,
    end: int | None,
    indptr: NDArray[Any] | None = None,
) -> None:
    """Every value is in least..end - 1; `indptr` says which task the values of a ragged column belong to."""
    wrong = values < least if end is None else (values < least) | (values >= end)
    if not wrong.any():
        return
    place = int(np.argmax(wrong))
    task = place if indptr is None else int(np.searchsorted(indptr, place, side="right")) - 1
    allowed = f"at least {least}" if end is None else f"{least} to {end - 1}"
    label = int(program.label[task])
    name = f" ({program.labels[label].name})" if 0 <= label < len(program.labels) else ""
    raise ValueError(f"program: {column} of task {task}{name} is {values[place]}; it must be {allowed}")


def _rows(column: str, indptr: NDArray[Any], entries: int, tasks: int) -> None:
    good = len(indptr) == tasks + 1 and indptr[0] == 0 and indptr[-1] == entries and bool(np.all(np.diff(indptr) >= 0))
    if not good:
        raise ValueError(f"program: {column}.indptr must rise from 0 to {entries} over {tasks + 1} entries")
