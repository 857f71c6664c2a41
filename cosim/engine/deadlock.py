"""Which tasks wait for each other, said to people."""

from __future__ import annotations

import numpy as np

from cosim.engine.program import Program, Timeline

UNKNOWN = -1
"""The time, in a timeline, of what never happens."""


def who_waits(program: Program, timeline: Timeline) -> str:
    """One sentence about the first streams that can never go on, each with its first task that has not ended."""
    late = np.flatnonzero(timeline.end_ps == UNKNOWN)
    streams, first = np.unique(program.stream[late], return_index=True)
    blocked = [
        f"{program.streams[stream].name}: {_name(program, task)} waits for {_reason(program, timeline, task)}"
        for stream, task in zip(streams[:4].tolist(), late[first[:4]].tolist(), strict=True)
    ]
    more = f"; and {len(streams) - 4} more streams" if len(streams) > 4 else ""
    return "tasks wait for each other: " + "; ".join(blocked) + more


def _reason(program: Program, timeline: Timeline, task: int) -> str:
    if timeline.issue_ps[task] == UNKNOWN:
        issued = np.flatnonzero((program.host == program.host[task]) & (timeline.issue_ps != UNKNOWN))
        return f"its host thread, which waits for {_name(program, int(issued[-1]))} to end"
    for before in program.depends.row(task).tolist():
        if timeline.end_ps[before] == UNKNOWN:
            return f"{_name(program, before)} to end"
    if timeline.start_ps[task] == UNKNOWN:
        absent = (program.rendezvous == program.rendezvous[task]) & (timeline.start_ps == UNKNOWN)
        absent[task] = False
        others = np.flatnonzero(absent)[:3].tolist()
        return f"its rendezvous with {', '.join(_name(program, other) for other in others)}"
    return "a share of its resources that is too small to count"


def _name(program: Program, task: int) -> str:
    label = program.labels[program.label[task]]
    return f"task {task} ({label.name}{f', layer {label.layer}' if label.layer >= 0 else ''})"
