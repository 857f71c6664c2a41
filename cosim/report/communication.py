"""What a rank communicates in a step: by group and kind, with the link that carries it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cosim.engine.program import PICOSECONDS_PER_S, Sent
from cosim.graph import Phase
from cosim.parallel.communication import communications
from cosim.report import words
from cosim.report.communicators import Communicators
from cosim.result import Detail, Result


@dataclass(frozen=True, slots=True)
class Traffic:
    """Collectives or messages of one kind in one group: per step and rank, on average over pipeline ranks.

    `bytes` are full buffers (`hwmodels.work.Collective`). `time_s` is how long they run; of those among the ops of the
    model, how long compute waits for them.
    """

    group: str
    kind: str
    ranks: int
    crosses: bool  # nodes
    calls: float
    bytes: float
    time_s: float


def traffic(result: Result) -> list[Traffic]:
    """The rows, longest first; none without detail."""
    detail = result.detail
    if detail is None or not detail.ranks:
        return []
    devices = len(detail.ranks)
    ranks = Communicators.of(result.spec)
    node = int(words.looked_up(result.spec, "system.nvlink_domain") or words.looked_up(result.spec, _NODE, 8))
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for sent, calls, time_s in [*_of_tasks(detail), *_of_ops(detail)]:
        row = sums[sent.group, sent.kind]
        for place, more in enumerate((calls, calls * sent.bytes, time_s)):
            row[place] += more / devices
    found = []
    for (group, kind), (calls, size, time_s) in sums.items():
        if ranks.size(group) > 1:
            crosses = any(len({member // node for member in ranks.members(group, rank)}) > 1 for rank in ranks.ranks)
            members = 2 if kind == "send_recv" else ranks.size(group)
            found.append(Traffic(group, kind, members, crosses, calls, size, time_s))
    return sorted(found, key=lambda row: -row.time_s)


_NODE = "system.devices_per_node"


def _of_tasks(detail: Detail) -> Iterator[tuple[Sent, float, float]]:
    """(what, how often, for how long) of each task that only communicates."""
    program, timeline = detail.program, detail.timeline
    repeats = detail.micro_steps - detail.micro_steps_played
    repeated = (program.micro_step == detail.micro_steps_played - 2) & (repeats > 0)
    times = np.where(repeated, 1 + repeats, 1)
    sends = np.array([bool(label.sent) for label in program.labels], dtype=np.bool_)[program.label]
    for task in np.flatnonzero(sends).tolist():
        first, *others = program.labels[program.label[task]].sent
        often = float(times[task])
        yield first, often, often * float(timeline.end_ps[task] - timeline.start_ps[task]) / PICOSECONDS_PER_S
        yield from ((other, often, 0.0) for other in others)


def _of_ops(detail: Detail) -> Iterator[tuple[Sent, float, float]]:
    for step in detail.ranks:
        for one in communications(step.graph):
            often = 1.0 if step.graph.op_phase[one.op] == Phase.OPTIMIZER else float(detail.micro_steps)
            yield Sent(one.kind, one.group, float(one.bytes)), often, often * float(step.prices.time_s[one.op])
