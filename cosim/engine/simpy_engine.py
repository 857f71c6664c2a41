"""The reference engine: a program played by SimPy, with one process per stream and one per host thread.

A host thread never waits but where a task synchronises, so up to there it knows when it will issue each task.
A stream waits for each of its tasks in turn: issued, dependencies ended, rendezvous met; then for its work and span.
Tasks without demands take a known time; the others do their work in `_SharedWork`, the only place where speeds live.
"""

from __future__ import annotations

import itertools
import math
from bisect import insort
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import simpy

from cosim.engine.check import LONGEST_PS, check
from cosim.engine.program import DeadlockError, Program, Timeline
from cosim.engine.sharing import Demand, speeds

Steps = Generator[simpy.Event, Any, None]
UNKNOWN = -1
NEVER = 2**63 - 1
AFTER_ALL_ELSE = simpy.events.EventPriority(2)  # SimPy's own are URGENT 0 and NORMAL 1


class SimpyEngine:
    """Plays programs as the text of `cosim.engine.program` says; every other engine must give the same timeline."""

    def play(self, program: Program) -> Timeline:
        """Raises ValueError for a program that means nothing, DeadlockError when tasks wait for each other."""
        check(program)
        return _Play(program).run()


class _Play:
    """One program being played: its columns as Python numbers, what is known so far, and the processes."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.work: list[int] = program.work_ps.tolist()
        self.launch: list[int] = program.launch_ps.tolist()
        self.span: list[int] = program.span_ps.tolist()
        self.synchronises: list[bool] = program.synchronises.tolist()
        self.rendezvous: list[int] = program.rendezvous.tolist()
        others: list[int] = program.depends.indices.tolist()
        self.depends = [others[a:b] for a, b in itertools.pairwise(program.depends.indptr.tolist())]
        tasks = len(program)
        self.issue = [0 if host < 0 else UNKNOWN for host in program.host.tolist()]
        self.hosted = [host >= 0 for host in program.host.tolist()]
        self.start = [UNKNOWN] * tasks
        self.end = [UNKNOWN] * tasks
        self.env = simpy.Environment()
        self.issued: dict[int, simpy.Event] = {}  # only of tasks that a process waits for
        self.ended: dict[int, list[simpy.Event]] = {}
        self.meetings: dict[int, simpy.Event] = {}
        self.absent = _count(self.rendezvous)
        self.shared = _SharedWork(self.env, program)

    def run(self) -> Timeline:
        for tasks in _queues(self.program.host.tolist(), len(self.program.streams)):
            self.env.process(self.host_thread(tasks))
        for tasks in _queues(self.program.stream.tolist(), len(self.program.streams)):
            self.env.process(self.stream(tasks))
        self.env.run()
        if UNKNOWN in self.end:
            raise DeadlockError(self.who_waits())
        return Timeline(*(np.array(times, dtype=np.int64) for times in (self.issue, self.start, self.end)))

    def host_thread(self, tasks: list[int]) -> Steps:
        """Issues its tasks one after another; `clock` runs ahead of the simulated time until it has to wait."""
        clock = 0
        for task in tasks:
            self.issue[task] = clock
            if task in self.issued:
                self.issued[task].succeed()
            clock += self.launch[task]
            if self.synchronises[task]:
                yield from self.until_ended(task)
                clock = max(clock, self.end[task])

    def stream(self, tasks: list[int]) -> Steps:
        """Runs its tasks one after another."""
        env = self.env
        for task in tasks:
            if self.issue[task] == UNKNOWN:
                self.issued[task] = env.event()
                yield self.issued[task]
            for before in self.depends[task]:
                if self.end[before] == UNKNOWN:
                    yield from self.until_ended(before)
            issue = self.issue[task]
            meets, shares = self.rendezvous[task] >= 0, task in self.shared.demands
            if issue > env.now and (meets or shares):
                yield env.timeout(issue - env.now)
            if meets:
                yield from self.meet(self.rendezvous[task])
            self.start[task] = max(int(env.now), issue)
            if shares and self.work[task]:
                yield self.shared.work(task, self.work[task])
                end = int(env.now)
            else:
                end = self.start[task] + self.work[task]
            if self.hosted[task]:
                end = max(end, issue + self.span[task])
            if end > env.now:
                yield env.timeout(end - env.now)
            self.end[task] = end
            for waiting in self.ended.pop(task, ()):
                waiting.succeed()

    def until_ended(self, task: int) -> Steps:
        event = self.env.event()
        self.ended.setdefault(task, []).append(event)
        yield event

    def meet(self, number: int) -> Steps:
        """Waits until every task of this rendezvous is here; the last one to come sets all off at the same instant."""
        self.absent[number] -= 1
        if number not in self.meetings:
            self.meetings[number] = self.env.event()
        if self.absent[number] == 0:
            self.meetings[number].succeed()
        else:
            yield self.meetings[number]

    def who_waits(self) -> str:
        """One sentence about the first streams that can never go on."""
        program = self.program
        blocked = []
        for index, tasks in enumerate(_queues(program.stream.tolist(), len(program.streams))):
            task = next((task for task in tasks if self.end[task] == UNKNOWN), None)
            if task is not None:
                blocked.append(f"{program.streams[index].name}: {self.name(task)} waits for {self.reason(task)}")
        more = f"; and {len(blocked) - 4} more streams" if len(blocked) > 4 else ""
        return "tasks wait for each other: " + "; ".join(blocked[:4]) + more

    def reason(self, task: int) -> str:
        if self.issue[task] == UNKNOWN:
            host = int(self.program.host[task])
            issued = np.flatnonzero((self.program.host == host) & (np.array(self.issue) != UNKNOWN))
            return f"its host thread, which waits for {self.name(int(issued[-1]))} to end"
        for before in self.depends[task]:
            if self.end[before] == UNKNOWN:
                return f"{self.name(before)} to end"
        if self.start[task] == UNKNOWN:
            others = [t for t, number in enumerate(self.rendezvous) if number == self.rendezvous[task] and t != task]
            late = [t for t in others if self.start[t] == UNKNOWN]
            return f"its rendezvous with {', '.join(self.name(t) for t in late[:3])}"
        return "a share of its resources that is too small to count"

    def name(self, task: int) -> str:
        label = self.program.labels[self.program.label[task]]
        return f"task {task} ({label.name}{f', layer {label.layer}' if label.layer >= 0 else ''})"


@dataclass(slots=True)
class _Flow:
    """Work in progress: `remaining_ps` of it at `since_ps`, and from then on `speed`; it is done at `done_ps`."""

    event: simpy.Event
    remaining_ps: float
    since_ps: int
    speed: float = 0.0
    done_ps: int = NEVER


class _SharedWork:
    """The tasks that share resources at this instant.

    What starts and finishes at one instant is taken together: speeds are set once, after everything else then.
    """

    def __init__(self, env: simpy.Environment, program: Program) -> None:
        self.env = env
        self.capacity = [float(resource.capacity) for resource in program.resources]
        self.priority: list[int] = program.priority.tolist()
        rows = (tuple((r, amount) for r, amount in row if amount > 0) for row in program.demands.rows())
        self.demands: dict[int, tuple[Demand, ...]] = {task: row for task, row in enumerate(rows) if row}
        self.flows: dict[int, _Flow] = {}
        self.order: list[int] = []  # the running tasks by row
        self.settling = False
        self.alarm = NEVER
        self.known: dict[tuple[Any, ...], list[float]] = {}  # sets that run together repeat

    def work(self, task: int, work_ps: int) -> simpy.Event:
        """The event of `work_ps` of work being done, from now, at the speeds that `task` will get."""
        event = self.env.event()
        self.flows[task] = _Flow(event, float(work_ps), int(self.env.now))
        insort(self.order, task)
        self.changed()
        return event

    def changed(self) -> None:
        if not self.settling:
            self.settling = True
            settle = self.env.event()
            settle._ok, settle._value = True, None  # triggered, as simpy.Timeout does it: succeed() knows no priority
            settle.callbacks.append(self.settle)
            self.env.schedule(settle, AFTER_ALL_ELSE)

    def settle(self, _: simpy.Event) -> None:
        """New speeds for the tasks that now run. One whose speed stays keeps its finish: nothing is rounded twice."""
        self.settling = False
        now = int(self.env.now)
        first = NEVER
        for task, speed in zip(self.order, self.speeds(), strict=True):
            flow = self.flows[task]
            if speed != flow.speed:
                flow.remaining_ps = max(0.0, flow.remaining_ps - flow.speed * (now - flow.since_ps))
                flow.since_ps, flow.speed = now, speed
                needs = flow.remaining_ps / speed if speed > 0 else math.inf
                flow.done_ps = now + max(1, math.ceil(needs)) if needs < LONGEST_PS else NEVER
            first = min(first, flow.done_ps)
        if first not in (self.alarm, NEVER):
            self.env.timeout(first - now).callbacks.append(self.finish)
        self.alarm = first

    def finish(self, _: simpy.Event) -> None:
        """Those whose work is done give back what they held; an alarm that has been overtaken finds nobody."""
        done = [task for task in self.order if self.flows[task].done_ps == self.env.now]
        for task in done:
            self.flows.pop(task).event.succeed()
            self.order.remove(task)
        if done:
            self.changed()

    def speeds(self) -> list[float]:
        rows = tuple((self.priority[task], self.demands[task]) for task in self.order)
        if rows not in self.known:
            self.known[rows] = speeds([row for _, row in rows], [priority for priority, _ in rows], self.capacity)
        return self.known[rows]


def _queues(owner: list[int], owners: int) -> list[list[int]]:
    """The tasks of each stream or host thread, in row order."""
    queues: list[list[int]] = [[] for _ in range(owners)]
    for task, index in enumerate(owner):
        if index >= 0:
            queues[index].append(task)
    return queues


def _count(numbers: list[int]) -> dict[int, int]:
    count: dict[int, int] = {}
    for number in numbers:
        if number >= 0:
            count[number] = count.get(number, 0) + 1
    return count
