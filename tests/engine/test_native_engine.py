"""The engine in C++ gives SimPy's timelines, bit for bit, lets others run meanwhile, and can be chosen and stopped."""

import dataclasses
import signal
import sys
import threading
import time

import numpy as np
import pytest

from cosim import engine
from cosim.engine import DeadlockError
from cosim.engine.native_engine import NativeEngine
from cosim.engine.program import Engine, Label, Program, Resource, Stream
from cosim.engine.simpy_engine import SimpyEngine
from cosim.engine.task import Task, program_of
from hwmodels.units import InputError

SCALES_PS = (3, 100, 10**6, 10**12)
AMOUNTS = (0.0, 0.1, 0.15, 0.3, 1 / 3, 0.7, 1.0)
TOO_MUCH = 1e25  # nothing that demands it ever ends
LABELS = (Label("gemm", "matmul", "forward", 3), Label("all-reduce", "all-reduce", "backward"))


class Draw:
    """The random choices of one program: how many queues and resources it has, how long its tasks are."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.streams, self.hosts = self.whole(1, 9), self.whole(0, 3)
        self.resources = self.whole(1, 6) if self.chance(0.7) else 0
        self.scale_ps = SCALES_PS[self.whole(0, 3)]
        self.orderly = self.chance(0.85)  # else some tasks depend on later ones
        self.synchronising = 0.1 if self.chance(0.5) else 0.0
        self.hopeless = 0.02 if self.chance(0.1) else 0.0

    def whole(self, first: int, last: int) -> int:
        return int(self.rng.integers(first, last + 1))

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def time_ps(self, most: int) -> int:
        return (0, most, self.whole(0, most))[self.whole(0, 2)]

    def amount(self) -> float:
        if self.chance(self.hopeless):
            return TOO_MUCH
        return float(self.rng.choice(AMOUNTS) if self.chance(0.7) else self.rng.random())

    def demands(self) -> tuple[tuple[int, float], ...]:
        if not self.resources or self.chance(0.3):
            return ()
        return tuple((self.whole(0, self.resources - 1), self.amount()) for _ in range(self.whole(1, 3)))

    def task(self, stream: int, before: int, rendezvous: int) -> Task:
        last = before - 1 if self.orderly else before + 3
        depends = [self.whole(0, last) for _ in range(self.whole(0, 3))] if last >= 0 and self.chance(0.4) else []
        # The host thread may be the last stream: a queue that works and issues.
        host = self.whole(self.streams - 1, self.streams + self.hosts - 1) if self.hosts and self.chance(0.8) else -1
        return Task(
            stream,
            work_ps=self.time_ps(self.scale_ps),
            host=host,
            launch_ps=self.time_ps(self.scale_ps // 2),
            span_ps=None if self.chance(0.6) else self.time_ps(2 * self.scale_ps),
            synchronises=self.chance(self.synchronising),
            priority=self.whole(-1, 2),
            rendezvous=rendezvous,
            depends=tuple(depends),
            demands=self.demands(),
            label=LABELS[self.whole(0, 1)],
        )


def random_program(seed: int) -> Program:
    """The program of this seed: up to 10 streams, 3 host threads, 6 resources and about 100 tasks."""
    draw = Draw(np.random.default_rng(seed))
    tasks: list[Task] = []
    for group in range(draw.whole(0, 39)):
        meet = draw.chance(0.15)
        chosen, before = draw.rng.permutation(draw.streams)[: draw.whole(1, draw.streams) if meet else 1], len(tasks)
        tasks += [draw.task(stream, before, 7 * group if meet else -1) for stream in chosen.tolist()]
    tasks = [dataclasses.replace(t, depends=tuple(row for row in t.depends if row < len(tasks))) for t in tasks]
    queues = [Stream(f"queue {i}", i % 3, "compute") for i in range(draw.streams + draw.hosts)]
    capacities = draw.rng.choice([0.7, 1.0, 3.0], draw.resources).tolist()
    return program_of(tasks, queues, [Resource("link", capacity) for capacity in capacities])


def answer(engine: Engine, program: Program) -> str | list[list[int]]:
    """The timeline, or what the deadlock's message says."""
    try:
        timeline = engine.play(program)
    except DeadlockError as deadlock:
        return str(deadlock)
    return [timeline.issue_ps.tolist(), timeline.start_ps.tolist(), timeline.end_ps.tolist()]


def test_a_thousand_random_programs_play_alike_to_the_picosecond() -> None:
    programs = [random_program(seed) for seed in range(1000)]
    answers = [answer(NativeEngine(), program) for program in programs]
    different = [seed for seed in range(1000) if answers[seed] != answer(SimpyEngine(), programs[seed])]
    assert different == []
    # They are worth comparing: many tasks, many of them slowed by others, and every reason to wait for ever.
    deadlocks = " ".join(said for said in answers if isinstance(said, str))
    for reason in ("to end", "its host thread", "its rendezvous", "too small to count", "more streams"):
        assert deadlocks.count(reason) >= 20, reason
    played = [(p, times) for p, times in zip(programs, answers, strict=True) if not isinstance(times, str)]
    assert len(played) >= 500
    slowed = sum(
        int(np.sum(np.subtract(end, start) > np.maximum(p.work_ps, p.span_ps))) for p, (_, start, end) in played
    )
    assert sum(len(p) for p in programs) >= 20_000
    assert slowed >= 1000


def crowd(streams: int, tasks: int) -> Program:
    """Everybody shares one resource, so that every change is a change for all."""
    work = np.random.default_rng(0).integers(10**6, 10**7, tasks).tolist()
    return program_of(
        [Task(i % streams, work[i], demands=((0, 1.0),)) for i in range(tasks)], [str(i) for i in range(streams)], [1.0]
    )


def test_many_flows_on_one_resource_play_alike() -> None:
    program = crowd(60, 600)
    assert answer(NativeEngine(), program) == answer(SimpyEngine(), program)


def test_groups_of_flows_that_share_nothing_with_each_other_play_alike() -> None:
    """Speeds are set anew only in the group that changed; SimPy's engine sets them all, which must change no bit."""
    rng = np.random.default_rng(1)
    tasks = []
    for i in range(1500):
        group = i % 6
        demands = tuple((2 * group + side, float(rng.random())) for side in range(2) if rng.random() < 0.7)
        tasks.append(Task(i % 24, int(rng.integers(1, 10**9)), priority=int(rng.integers(2)), demands=demands))
    program = program_of(tasks, [str(i) for i in range(24)], [1.0, 0.3] * 6)
    assert answer(NativeEngine(), program) == answer(SimpyEngine(), program)


def test_columns_may_have_other_types_and_strides() -> None:
    program = random_program(3)
    wide = {
        name: np.repeat(getattr(program, name).astype(np.int64), 2)[::2]
        for name in ("stream", "host", "rendezvous", "priority", "work_ps", "launch_ps")
    }
    assert answer(NativeEngine(), dataclasses.replace(program, **wide)) == answer(NativeEngine(), program)


@pytest.mark.parametrize("player", [NativeEngine(), SimpyEngine()], ids=["native", "simpy"])
def test_more_picoseconds_than_can_be_counted_are_an_error(player: Engine) -> None:
    slow = Task(0, 10**12, demands=((0, 4e6),))  # 46 days each, at a quarter of a millionth of the speed
    assert player.play(program_of([slow] * 2, ["a"], [1.0])).makespan_ps == 8 * 10**18
    with pytest.raises(OverflowError):
        player.play(program_of([slow, slow, Task(0, 2 * 10**18)], ["a"], [1.0]))
    with pytest.raises(DeadlockError, match="too small to count"):
        player.play(program_of([slow] * 3, ["a"], [1.0]))


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers")
def test_playing_lets_other_threads_run_and_stops_when_a_signal_says_so() -> None:
    class Stop(Exception):
        pass

    def stop(_number: int, _frame: object) -> None:
        raise Stop

    program = crowd(1500, 30_000)  # many seconds
    counted, over = [0], threading.Event()

    def count() -> None:
        while not over.wait(0.001):
            counted[0] += 1

    thread = threading.Thread(target=count)
    before = signal.signal(signal.SIGALRM, stop)
    thread.start()
    started = time.perf_counter()
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(Stop):
            NativeEngine().play(program)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        over.set()
        thread.join()
    assert time.perf_counter() - started < 2
    assert counted[0] > 5


def test_native_is_the_default_and_the_environment_or_a_caller_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COSIM_ENGINE", raising=False)
    assert isinstance(engine.choose(), NativeEngine)
    assert isinstance(engine.choose("simpy"), SimpyEngine)
    monkeypatch.setenv("COSIM_ENGINE", "simpy")
    assert isinstance(engine.choose(), SimpyEngine)
    assert isinstance(engine.choose("native"), NativeEngine)
    monkeypatch.setenv("COSIM_ENGINE", "fast")
    with pytest.raises(InputError, match="COSIM_ENGINE: 'fast' is not an engine; native and simpy are"):
        engine.choose()


def test_without_the_extension_simpy_plays_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COSIM_ENGINE", raising=False)
    monkeypatch.setitem(sys.modules, "cosim_native", None)
    monkeypatch.delitem(sys.modules, "cosim.engine.native_engine")
    with pytest.warns(UserWarning, match="the native engine cannot be loaded .*SimPy"):
        assert isinstance(engine.choose(), SimpyEngine)
    with pytest.raises(InputError, match="COSIM_ENGINE: the native engine cannot be loaded"):
        engine.choose("native")
