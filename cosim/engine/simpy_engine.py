"""The reference engine: a program played by SimPy, with one process per stream and one per host thread.

A host thread never waits but where a task synchronises, so up to there it knows when it will issue each task.
A stream waits for each of its tasks in turn: issued, dependencies ended, rendezvous met; then for its work and span.
Tasks without demands take a known time; the others do their work in `SharedWork`, the only place where speeds live.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator
from typing import Any

import numpy as np
import simpy

from cosim.engine.check import check
from cosim.engine.deadlock import UNKNOWN, who_waits
from cosim.engine.program import DeadlockError, Program, Timeline
from cosim.engine.shared_work import SharedWork

Steps = Generator[simpy.Event, Any, None]


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
        self.shared = SharedWork(self.env, program)

    def run(self) -> Timeline:
        for tasks in _queues(self.program.host.tolist(), len(self.program.streams)):
            self.env.process(self.host_thread(tasks))
        for tasks in _queues(self.program.stream.tolist(), len(self.program.streams)):
            self.env.process(self.stream(tasks))
        self.env.run()
        timeline = Timeline(*(np.array(times, dtype=np.int64) for times in (self.issue, self.start, self.end)))
        if UNKNOWN in self.end:
            raise DeadlockError(who_waits(self.program, timeline))
        return timeline

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
