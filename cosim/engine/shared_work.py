"""Work in progress on shared resources: what remains of it, at what speed, and when it will be done."""

from __future__ import annotations

import math
from bisect import insort
from dataclasses import dataclass

import simpy

from cosim.engine.check import LONGEST_PS
from cosim.engine.program import Program
from cosim.engine.sharing import Demand, speeds

NEVER = 2**63 - 1
AFTER_ALL_ELSE = simpy.events.EventPriority(2)  # SimPy's own are URGENT 0 and NORMAL 1


@dataclass(slots=True)
class _Flow:
    """Work in progress: `remaining_ps` of it at `since_ps`, and from then on `speed`; it is done at `done_ps`."""

    event: simpy.Event
    remaining_ps: float
    since_ps: int
    speed: float = 0.0
    done_ps: int = NEVER


class SharedWork:
    """The tasks that share resources at this instant.

    What starts and finishes at one instant is taken together: speeds are set once, after everything else then.
    """

    def __init__(self, env: simpy.Environment, program: Program) -> None:
        self.env = env
        self.capacity = [float(resource.capacity) for resource in program.resources]
        rows = (tuple((r, amount) for r, amount in row if amount > 0) for row in program.demands.rows())
        self.demands: dict[int, tuple[Demand, ...]] = {task: row for task, row in enumerate(rows) if row}
        priority: list[int] = program.priority.tolist()
        self.claims = {task: (priority[task], row) for task, row in self.demands.items()}
        kinds: dict[tuple[int, tuple[Demand, ...]], int] = {}
        self.kind = {task: kinds.setdefault(claim, len(kinds)) for task, claim in self.claims.items()}
        self.flows: dict[int, _Flow] = {}
        self.order: list[int] = []  # the running tasks by row
        self.settling = False
        self.alarm = NEVER
        self.known: dict[tuple[int, ...], list[float]] = {}  # by kind of claim: sets that run together repeat

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
        kinds = tuple([self.kind[task] for task in self.order])
        if kinds not in self.known:
            claims = [self.claims[task] for task in self.order]
            self.known[kinds] = speeds([row for _, row in claims], [urgency for urgency, _ in claims], self.capacity)
        return self.known[kinds]
