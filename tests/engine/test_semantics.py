"""Each engine against a twin that applies the sentences of `cosim.engine.program` one by one, at every picosecond.

The twin shares only the speeds' arithmetic, which test_sharing.py checks by itself.
"""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosim.engine import DeadlockError, play
from cosim.engine.sharing import speeds
from cosim.engine.task import Task, program_of

pytestmark = pytest.mark.usefixtures("each_engine")

STREAMS, HOSTS = 3, 2
NAMES = ["a", "b", "c", "host 0", "host 1"]
CAPACITY = [1.0, 0.7]


class Twin:
    """State of every task at one picosecond: None, or when it was issued, started, done with its work, ended."""

    def __init__(self, tasks):
        self.tasks = tasks
        self.now = 0
        n = len(tasks)
        self.issued, self.started, self.worked, self.ended = [[None] * n for _ in range(4)]
        self.flow = {}  # task: [remaining, since, speed, finish]
        self.changed = False

    def play(self):
        """Timeline as three lists, or None when it never ends."""
        # Alone, a task takes at most 1 / 0.7 of its work; nothing is ever idle for longer than a launch or a span.
        longest = 20 + 2 * sum(t.work_ps + t.launch_ps + t.whole_span_ps for t in self.tasks)
        while None in self.ended and self.now <= longest:
            while self.issue() or self.begin() or self.finish_work() or self.finish():
                pass
            if self.changed:
                self.set_speeds()
            self.now += 1
        return None if None in self.ended else (self.issued, self.started, self.ended)

    def before(self, task, field):
        """The row before on the same stream or host."""
        owner = getattr(self.tasks[task], field)
        return max((t for t in range(task) if getattr(self.tasks[t], field) == owner), default=None)

    def issue(self):
        for i, task in enumerate(self.tasks):
            p = None if task.host < 0 else self.before(i, "host")
            free = p is None or (
                self.issued[p] is not None
                and self.now >= self.issued[p] + self.tasks[p].launch_ps
                and (not self.tasks[p].synchronises or self.ended[p] is not None)
            )
            if self.issued[i] is None and free:
                self.issued[i] = self.now
                return True
        return False

    def may_start(self, i):
        p = self.before(i, "stream")
        waits_for = [*self.tasks[i].depends, *([] if p is None else [p])]
        return self.issued[i] is not None and all(self.ended[other] is not None for other in waits_for)

    def begin(self):
        for i, task in enumerate(self.tasks):
            members = (
                [i]
                if task.rendezvous < 0
                else [j for j, other in enumerate(self.tasks) if other.rendezvous == task.rendezvous]
            )
            if self.started[i] is None and all(self.may_start(j) for j in members):
                for j in members:
                    self.started[j] = self.now
                    if self.tasks[j].demands and self.tasks[j].work_ps:
                        self.flow[j] = [float(self.tasks[j].work_ps), self.now, 0.0, None]
                        self.changed = True
                return True
        return False

    def finish_work(self):
        for i, task in enumerate(self.tasks):
            if self.started[i] is None or self.worked[i] is not None:
                continue
            if i not in self.flow:
                if self.now >= self.started[i] + task.work_ps:
                    self.worked[i] = self.now
                    return True
            elif self.flow[i][3] == self.now:
                self.worked[i] = self.now
                del self.flow[i]
                self.changed = True
                return True
        return False

    def finish(self):
        for i, task in enumerate(self.tasks):
            launched = task.host < 0 or (self.issued[i] is not None and self.now >= self.issued[i] + task.whole_span_ps)
            if self.ended[i] is None and self.worked[i] is not None and launched:
                self.ended[i] = self.now
                return True
        return False

    def set_speeds(self):
        self.changed = False
        rows = sorted(self.flow)
        demands, priority = [self.tasks[i].demands for i in rows], [self.tasks[i].priority for i in rows]
        for i, speed in zip(rows, speeds(demands, priority, CAPACITY), strict=True):
            remaining, since, old, _ = self.flow[i]
            if speed != old:
                remaining = max(0.0, remaining - old * (self.now - since))
                finish = self.now + max(1, math.ceil(remaining / speed)) if speed else None
                self.flow[i] = [remaining, self.now, speed, finish]


@st.composite
def programs(draw, tasks=8, sharing=True, later=True):
    """Small programs with some of everything; a few of them deadlock."""
    n = draw(st.integers(0, tasks))
    amounts = st.sampled_from([0.1, 0.3, 0.5, 1.0])
    rows = st.lists(st.tuples(st.integers(0, 1), amounts), max_size=2) if sharing else st.just([])
    result = []
    for i in range(n):
        work, launch = draw(st.integers(0, 12)), draw(st.integers(0, 6))
        others = st.integers(0, n - 1 if later and draw(st.integers(0, 29)) == 0 else i - 1) if i else st.nothing()
        result.append(
            Task(
                stream=draw(st.integers(0, STREAMS - 1)),
                work_ps=work,
                host=draw(st.sampled_from([-1, STREAMS, STREAMS, STREAMS + 1])),
                launch_ps=launch,
                span_ps=draw(st.sampled_from([None, 0, launch, launch + work + 9])),
                synchronises=draw(st.booleans()),
                priority=draw(st.integers(0, 1)),
                rendezvous=draw(st.sampled_from([-1] * 8 + [0, 1])),
                depends=tuple(draw(st.lists(others, max_size=2, unique=True))) if i else (),
                demands=tuple(draw(rows)),
            )
        )
    return result


def played(tasks, names=NAMES):
    try:
        timeline = play(program_of(tasks, names, CAPACITY))
    except DeadlockError:
        return None
    return timeline.issue_ps.tolist(), timeline.start_ps.tolist(), timeline.end_ps.tolist()


@given(programs())
@settings(max_examples=300, deadline=None)
def test_the_engine_does_what_the_text_says_at_every_picosecond(tasks):
    assert played(tasks) == Twin(tasks).play()


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 2), st.sampled_from([0.1, 0.3, 0.45, 1.0])), max_size=12))
@settings(max_examples=150, deadline=None)
def test_many_flows_that_come_and_go_on_one_resource(flows):
    tasks = [
        Task(i % 5, work, priority=urgency, demands=((i % 2, amount),))
        for i, (work, urgency, amount) in enumerate(flows)
    ]
    assert played(tasks) == Twin(tasks).play()


@given(st.lists(st.integers(3, 40), min_size=4, max_size=8))
@settings(max_examples=100, deadline=None)
def test_a_relay_of_urgent_flows_across_streams_changes_no_speed_at_the_handover(legs):
    """The next leg starts at the instant at which the one before ends, some events later: nobody else notices.

    The others run at 0.9 / 3, so that their ends are whole picoseconds but for rounding, which must happen just once.
    """
    relay = [
        Task(i % 2, leg, priority=1, depends=(i - 1,) if i else (), demands=((0, 0.1),)) for i, leg in enumerate(legs)
    ]
    beside = [Task(2 + i, 30 * (i + 1), demands=((0, 1.0),)) for i in range(3)]
    assert played([*relay, *beside]) == Twin([*relay, *beside]).play()


@given(programs())
@settings(max_examples=50, deadline=None)
def test_playing_twice_gives_the_same_and_streams_have_no_rank(tasks):
    first = played(tasks)
    assert played(tasks) == first
    turned = [dataclasses.replace(t, stream=4 - t.stream, host=t.host if t.host < 0 else 4 - t.host) for t in tasks]
    assert played(turned, NAMES[::-1]) == first


def test_a_hundred_thousand_picoseconds_of_crowded_links_keep_capacity():
    rng = np.random.default_rng(0)
    tasks = [Task(i % 8, int(rng.integers(1, 500)), demands=((i % 2, 1.0),)) for i in range(2000)]
    timeline = play(program_of(tasks, [str(i) for i in range(8)], CAPACITY))
    # Each resource moves at most its capacity per picosecond, and while flows last it moves just that.
    for resource, capacity in enumerate(CAPACITY):
        mine = [i for i in range(len(tasks)) if i % 2 == resource]
        moved = sum(tasks[i].work_ps for i in mine)
        last = max(timeline.end_ps[i] for i in mine)
        assert moved / capacity <= last <= moved / capacity + 2 * len(mine)
