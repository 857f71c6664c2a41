"""A step as Chrome-trace JSON, which Perfetto, chrome://tracing and speedscope open: streams, flows, counters.

The trace-event format (Google, "Trace Event Format", and perfetto's JSON importer): a process per rank, a thread per
stream and one for the launches of each host thread. Tasks are complete events ("X"), with the ops of compute tasks
nested in them; a flow ("s", "f") leads from a task to each that waited for it on another stream, and from a message to
what waited for it on another rank; memory by category and what links carry are counters ("C"). Times are microseconds
in whole nanoseconds, which is how finely Perfetto sees. A slice ends a nanosecond before what follows or encloses it:
readers that add and compare fractions (speedscope) would take slices that touch for slices that overlap.
"""

from __future__ import annotations

import gzip
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cosim.engine.program import PICOSECONDS_PER_S, Label
from cosim.graph import Phase
from cosim.output import whole_file
from cosim.report import words
from cosim.report.rank_memory import curves
from cosim.result import Detail, Result, TracedStep
from hwmodels.units import InputError

Event = dict[str, Any]
MOST_EVENTS = 50_000
"""Ops below tasks are left out from where they would make more events than this."""
_PICOSECONDS_PER_NS = 1000
_LAUNCHES, _STREAMS = 1, 1001
"""First thread ids of host threads' launches and of streams; 0 is not a thread to Perfetto."""
_ORDER = {"host": 0, "compute": 2, "communication": 3}


def write_perfetto(result: Result, path: str | Path) -> None:
    """Writes the timeline of `result` to `path`, compressed if its name ends in .gz.

    Raises InputError: the result has no detail, or `path` cannot be written; then nothing is left behind.
    """
    text = json.dumps(chrome_trace(result), separators=(",", ":"), allow_nan=False).encode()
    with whole_file(Path(path), "perfetto") as written:
        compressed = Path(path).suffix == ".gz"
        written.write_bytes(gzip.compress(text, mtime=0) if compressed else text)


def chrome_trace(result: Result, most_events: int = MOST_EVENTS) -> dict[str, Any]:
    """The JSON object: `traceEvents` with metadata first and the others by time, `otherData` with the run.

    Micro-steps beyond those played are not in it; `otherData` says how many, and tasks of the micro-step that they
    repeat have `happens` in their args. Raises InputError for a result without detail.
    """
    detail = result.detail
    if detail is None:
        raise InputError("perfetto: this result has no timeline; simulate the run again")
    drawn = _Drawn(detail)
    events = [*_tasks(drawn), *_launches(drawn), *_flows(drawn), *_memory(drawn), *_links(drawn)]
    events += _ops(drawn, most_events - len(events))
    # enclosing slices before those inside; flows after the slices that they bind to; counters wherever
    order = {"X": 0, "s": 1, "f": 2, "C": 3}
    events.sort(key=lambda event: (event["ts"], order[event["ph"]], -event.get("dur", 0.0)))
    return {
        "displayTimeUnit": "ms",
        "otherData": _run(result, detail),
        "traceEvents": [*_names(result, drawn), *events],
    }


def microseconds(nanoseconds: int) -> float:
    """The number of microseconds from which a reader that multiplies by 1000 and truncates gets the nanoseconds back.

    Perfetto does so (src/trace_processor/importers/json/json_utils: CoerceToTs); 1.001 alone would become 1000.
    """
    value = nanoseconds / 1000
    return value if int(value * 1000) == nanoseconds else math.nextafter(value, math.inf)


class _Drawn:
    """The played tasks with their times in nanoseconds, and who they are for the trace."""

    def __init__(self, detail: Detail) -> None:
        self.detail, self.program, self.timeline = detail, detail.program, detail.timeline
        self.start = np.rint(self.timeline.start_ps / _PICOSECONDS_PER_NS).astype(np.int64)
        self.end = np.rint(self.timeline.end_ps / _PICOSECONDS_PER_NS).astype(np.int64)
        self.issue = np.rint(self.timeline.issue_ps / _PICOSECONDS_PER_NS).astype(np.int64)
        launched = self.timeline.issue_ps + self.program.launch_ps
        self.issued = np.rint(launched / _PICOSECONDS_PER_NS).astype(np.int64)
        self.pid = [stream.device + 1 for stream in self.program.streams]

    @property
    def seen(self) -> NDArray[np.int64]:
        """Tasks that take time enough to be drawn."""
        return np.flatnonzero(self.visible)

    @property
    def visible(self) -> NDArray[np.bool_]:
        """Which tasks are drawn."""
        return self.end > self.start + 1

    @property
    def launches(self) -> NDArray[np.int64]:
        """Tasks whose launch takes time enough to be drawn."""
        return np.flatnonzero((self.program.host >= 0) & (self.issued > self.issue + 1))

    def label(self, task: int) -> Label:
        return self.program.labels[int(self.program.label[task])]

    def slice(self, stream: int, first_tid: int, start: int, end: int) -> Event:
        """A complete event on the thread of a stream, without its name, a nanosecond shorter than `start` to `end`."""
        span = {"ts": microseconds(start), "dur": microseconds(end - start - 1)}
        return {"ph": "X", "pid": self.pid[stream], "tid": first_tid + stream, **span}


def _tasks(drawn: _Drawn) -> Iterator[Event]:
    detail, program = drawn.detail, drawn.program
    repeated = detail.micro_steps - detail.micro_steps_played
    moved = _link_bytes(drawn)
    for task in drawn.seen.tolist():
        label, stream = drawn.label(task), int(program.stream[task])
        args: dict[str, Any] = {"phase": label.phase, "micro_step": int(program.micro_step[task])}
        if label.layer >= 0:
            args["layer"] = label.layer
        if moved[task]:
            args["link_bytes"] = round(float(moved[task]))
        if repeated and args["micro_step"] == detail.micro_steps_played - 2:
            args["happens"] = 1 + repeated
        event = drawn.slice(stream, _STREAMS, int(drawn.start[task]), int(drawn.end[task]))
        yield event | {"name": words.plain_line(label.name), "cat": label.kind, "args": args}


def _launches(drawn: _Drawn) -> Iterator[Event]:
    for task in drawn.launches.tolist():
        label, host = drawn.label(task), int(drawn.program.host[task])
        event = drawn.slice(host, _LAUNCHES, int(drawn.issue[task]), int(drawn.issued[task]))
        args = {"phase": label.phase, "micro_step": int(drawn.program.micro_step[task])}
        yield event | {"name": f"launch {words.plain_line(label.name)}", "cat": "launch", "args": args}


def _flows(drawn: _Drawn) -> Iterator[Event]:
    """From a task's launch to the task, and from the end of a task to each on another stream that depends on it.

    A flow binds to the slices that are open at its two times, so it begins a nanosecond before the first one's end.
    """
    program = drawn.program
    visible, launched = drawn.visible, set(drawn.launches.tolist())
    number = itertools.count(1)
    for task in drawn.seen.tolist():
        stream, start = int(program.stream[task]), int(drawn.start[task])
        end = (drawn.pid[stream], _STREAMS + stream, start)
        if task in launched:
            host, issued = int(program.host[task]), min(int(drawn.issued[task]) - 2, start)
            yield from _flow("launch", next(number), (drawn.pid[host], _LAUNCHES + host, issued), end)
        for before in program.depends.row(task).tolist():
            other = int(program.stream[before])
            if other != stream and visible[before]:
                source = (drawn.pid[other], _STREAMS + other, int(drawn.end[before]) - 2)
                name = "dependency" if drawn.pid[other] == drawn.pid[stream] else "message"
                yield from _flow(name, next(number), source, end)


def _flow(name: str, number: int, *ends: tuple[int, int, int]) -> Iterator[Event]:
    """The two events of a flow, from and to (process, thread, nanoseconds)."""
    for phase, (pid, tid, time) in zip("sf", ends, strict=True):
        event = {"ph": phase, "id": number, "name": name, "cat": name, "pid": pid, "tid": tid, "ts": microseconds(time)}
        yield event | ({"bp": "e"} if phase == "f" else {})


def _memory(drawn: _Drawn) -> Iterator[Event]:
    """What every device holds by category, in bytes."""
    first = min((stream.device for stream in drawn.program.streams), default=0)
    for device, curve in enumerate(curves(drawn.detail), first):
        time = np.rint(curve.time_s * (PICOSECONDS_PER_S / _PICOSECONDS_PER_NS)).astype(np.int64)
        last: dict[str, int] = {}
        for point in range(len(time)):
            held = {name: round(float(curve.bytes[row, point])) for row, name in enumerate(curve.categories)}
            if held != last:
                yield {
                    "ph": "C",
                    "name": "memory",
                    "pid": device + 1,
                    "ts": microseconds(int(time[point])),
                    "args": held,
                }
            last = held


def _links(drawn: _Drawn) -> Iterator[Event]:
    """Bytes per second over each link, every task's spread evenly over its time."""
    program = drawn.program
    demands = program.demands
    task = np.repeat(np.arange(len(program)), np.diff(demands.indptr))
    shown = (drawn.end > drawn.start)[task]
    for number, resource in enumerate(program.resources):
        mine = shown & (demands.resource == number)
        if not resource.name.endswith("link") or not mine.any():
            continue
        rows = task[mine]
        moved = demands.amount[mine] * program.work_ps[rows]
        rate = moved / (drawn.timeline.end_ps[rows] - drawn.timeline.start_ps[rows])
        time = np.concatenate([drawn.start[rows], drawn.end[rows]])
        instants, place = np.unique(time, return_inverse=True)
        change = np.bincount(place, weights=np.concatenate([rate, -rate]))
        level = np.maximum(np.cumsum(change), 0.0)
        level[np.abs(level) < 1e-9 * resource.capacity] = 0.0
        pid = drawn.pid[int(program.stream[rows[0]])]
        for at, value in zip(instants.tolist(), level.tolist(), strict=True):
            args = {"bytes_per_s": value}
            yield {"ph": "C", "name": resource.name, "pid": pid, "ts": microseconds(at), "args": args}


def _link_bytes(drawn: _Drawn) -> NDArray[np.float64]:
    """Bytes that each task moves over links: what it demands of them, for as long as it would take alone."""
    program = drawn.program
    is_link = np.array([resource.name.endswith("link") for resource in program.resources], dtype=np.bool_)
    demands = program.demands
    task = np.repeat(np.arange(len(program)), np.diff(demands.indptr))
    amount = np.where(is_link[demands.resource], demands.amount, 0.0) if len(task) else demands.amount
    moved = np.zeros(len(program))
    np.add.at(moved, task, amount * program.work_ps[task] / PICOSECONDS_PER_S)
    return moved


def _ops(drawn: _Drawn, most: int) -> list[Event]:
    """The kernels inside the compute tasks of the first micro-step and of the optimizer, up to `most`.

    A task's time is shared among its ops as their times alone are.
    """
    program, ranks, events = drawn.program, drawn.detail.ranks, list[Event]()
    for task in drawn.seen.tolist():
        label, stream = drawn.label(task), int(program.stream[task])
        first, stop = label.ops
        chosen = program.micro_step[task] == 0 or label.phase == Phase.OPTIMIZER.name.lower()
        device = program.streams[stream].device
        if stop <= first or not chosen or device >= len(ranks):
            continue
        traced = ranks[device]
        ends = np.cumsum(traced.prices.time_s[first:stop])
        if len(events) + len(ends) > most:
            break
        if ends[-1] <= 0:
            continue
        low, high = int(drawn.start[task]), int(drawn.end[task]) - 1
        edges = low + np.rint(np.concatenate([[0.0], ends / ends[-1]]) * (high - low)).astype(np.int64)
        for op in (first + np.flatnonzero(np.diff(edges) > 1)).tolist():
            place = drawn.slice(stream, _STREAMS, int(edges[op - first]), int(edges[op - first + 1]))
            events.append(place | _op(traced, op))
    return events


def _op(traced: TracedStep, op: int) -> Event:
    graph, prices = traced.graph, traced.prices
    kind = graph.kinds[graph.op_kind[op]]
    shapes = " ".join("[" + ",".join(map(str, graph.shapes[spec])) + "]" for spec in kind.inputs[:4])
    args: dict[str, Any] = {
        "module": words.plain_line(graph.modules[graph.op_module[op]]),
        "phase": Phase(int(graph.op_phase[op])).name.lower(),
        "shapes": shapes,
        "flops": float(prices.flops[op]),
        "hbm_bytes": float(prices.hbm_bytes[op]),
        "limited_by": prices.limited_by[prices.limit[op]],
        "alone_us": float(prices.time_s[op]) * 1e6,
    }
    return {"name": words.plain_line(kind.target), "cat": kind.op_class, "args": args}


def _names(result: Result, drawn: _Drawn) -> Iterator[Event]:
    """Metadata: what processes and threads are called, and in which order they are shown."""
    program = drawn.program
    used = {("launch", int(program.host[task])) for task in drawn.launches.tolist()}
    used |= {("stream", int(program.stream[task])) for task in drawn.seen.tolist()}

    def said(name: str, pid: int, tid: int, /, **args: Any) -> Event:
        return {"ph": "M", "name": name, "pid": pid, "tid": tid, "ts": 0, "args": args}

    for device in sorted({stream.device for stream in program.streams}):
        name = f"rank {device}" if len(drawn.detail.ranks) > 1 else f"device {device}"
        yield said("process_name", device + 1, 0, name=name)
        yield said("process_labels", device + 1, 0, labels=words.machine(result))
        yield said("process_sort_index", device + 1, 0, sort_index=device)
    for what, number in sorted(used):
        stream, launch = program.streams[number], what == "launch"
        works_too = launch and ("stream", number) in used
        name = words.plain_line(stream.name) + (" launches" if works_too else "")
        tid = (_LAUNCHES if launch else _STREAMS) + number
        yield said("thread_name", stream.device + 1, tid, name=name)
        yield said("thread_sort_index", stream.device + 1, tid, sort_index=_ORDER.get(stream.kind, 4) * 1000 + number)


def _run(result: Result, detail: Detail) -> dict[str, Any]:
    played, micro_steps = detail.micro_steps_played, detail.micro_steps
    said = {
        "simulated_by": "cosim; no step of this run was executed",
        "model": words.model_name(result),
        "machine": words.machine(result),
        "step_time_s": result.step_time_s,
        "micro_steps": micro_steps,
        "micro_steps_played": played,
        "spec": result.to_json()["spec"],
    }
    if played < micro_steps:
        again = f"micro-step {played - 2} happens {1 + micro_steps - played} times and is drawn once"
        said["repeated"] = f"{again}, so the timeline is shorter than the step"
    return said
