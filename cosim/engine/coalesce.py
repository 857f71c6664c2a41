"""Fewer, longer tasks with the same ends: what a host thread issues without a pause becomes one row.

Exact while tasks run at speed 1; where they share resources, a merged task has no gaps in its work.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cosim.engine.kernels import merge_tasks
from cosim.engine.program import Demands, Program
from cosim.graph import Csr


@dataclass(frozen=True, slots=True)
class Coalesced:
    """A smaller program, and which of its tasks each task of the original became part of."""

    program: Program
    task: NDArray[np.int64]


def coalesce(program: Program) -> Coalesced:
    """Merges tasks that nothing from outside can come between; the ends stay the same when no resource is shared.

    Task b joins task a when b is next on both a's stream and a's host thread; b waits for nobody but a, and meets
    nobody; nobody else waits for a, and a's host thread does not; they share label, priority, demands and micro-step;
    and neither changes memory.
    """
    joins = _joins(program)
    first = np.flatnonzero(~joins)
    # Members of one group need not be neighbours in the rows: other streams and hosts lie between.
    group = np.empty(len(program), dtype=np.int64)
    group[first] = np.arange(len(first))
    before = _previous(program.stream)
    for task in np.flatnonzero(joins).tolist():
        group[task] = group[before[task]]
    work, launch, span = (column[first].copy() for column in (program.work_ps, program.launch_ps, program.span_ps))
    synchronises = program.synchronises[first].copy()
    for task in np.flatnonzero(joins).tolist():
        into = group[task]
        second = (program.work_ps[task], program.launch_ps[task], program.span_ps[task])
        work[into], launch[into], span[into] = merge_tasks((work[into], launch[into], span[into]), second)
        synchronises[into] |= program.synchronises[task]
    rows = [sorted({int(group[other]) for other in program.depends.row(int(task))}) for task in first]
    merged = dataclasses.replace(
        program,
        work_ps=work,
        launch_ps=launch,
        span_ps=span,
        synchronises=synchronises,
        depends=Csr.of(rows),
        demands=_pick(program.demands, first),
        **{name: getattr(program, name)[first] for name in _KEPT},
    )
    return Coalesced(merged, group)


_KEPT = ("stream", "host", "priority", "rendezvous", "label", "profile", "micro_step")


def _joins(program: Program) -> NDArray[np.bool_]:
    """Whether each task joins the one before it on its stream."""
    tasks = np.arange(len(program))
    before = _previous(program.stream)
    hosted = program.host >= 0
    joins: NDArray[np.bool_] = (before >= 0) & (program.host == program.host[before])
    joins &= ~hosted | (_previous(program.host) == before)
    for name in ("label", "priority", "micro_step"):
        joins &= getattr(program, name) == getattr(program, name)[before]
    joins &= (program.rendezvous < 0) & (program.profile < 0) & (program.profile[before] < 0)
    joins &= ~(hosted & program.synchronises[before])
    # A dependency on the task before is implied by the stream; every other one parts its ends from their neighbours.
    waiting = np.repeat(tasks, np.diff(program.depends.indptr))
    outside = program.depends.indices != before[waiting]
    joins[waiting[outside]] = False
    awaited = np.zeros(len(program), dtype=np.bool_)
    awaited[program.depends.indices[outside]] = True
    joins &= ~awaited[before]
    rows = program.demands.rows()
    for task in np.flatnonzero(joins).tolist():
        joins[task] = rows[task] == rows[before[task]]
    return joins


def _previous(owner: NDArray[Any]) -> NDArray[np.int64]:
    """The task before each one with the same owner (stream or host thread); -1 for the first."""
    order = np.argsort(owner, kind="stable")
    same = owner[order][1:] == owner[order][:-1]
    previous = np.full(len(owner), -1, dtype=np.int64)
    previous[order[1:][same]] = order[:-1][same]
    return previous


def _pick(demands: Demands, tasks: NDArray[np.int64]) -> Demands:
    lengths = np.diff(demands.indptr)[tasks]
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    entry = np.repeat(demands.indptr[tasks] - indptr[:-1], lengths) + np.arange(indptr[-1])
    return Demands(indptr, demands.resource[entry], demands.amount[entry])
