"""How many tasks a second the reference engine plays, and how many events a second memory adds up."""

from typing import Any

import numpy as np
import pytest

from cosim.engine.program import MemoryProfile, Program, Timeline
from cosim.engine.simpy_engine import SimpyEngine
from cosim.engine.task import Task, program_of
from cosim.memory import memory_over_time

TASKS = 20_000


def _program(streams: int, sharing: bool) -> Program:
    """Kernels in turn on all streams, issued by one host thread; every fifth waits for the one before it."""
    work = np.random.default_rng(0).integers(1_000_000, 9_000_000, TASKS).tolist()
    tasks = [
        Task(
            stream=i % streams,
            work_ps=work[i],
            host=streams,
            launch_ps=100_000,
            depends=(i - 1,) if i % 5 == 1 else (),
            demands=((0, 0.3),) if sharing else (),
        )
        for i in range(TASKS)
    ]
    return program_of(tasks, [*(f"stream {i}" for i in range(streams)), "host"], [1.0])


@pytest.mark.parametrize("streams", [1, 8])
@pytest.mark.parametrize("sharing", [False, True], ids=["alone", "sharing"])
def test_engine(benchmark: Any, capsys: Any, streams: int, sharing: bool) -> None:
    program = _program(streams, sharing)
    benchmark.extra_info["tasks"] = TASKS
    benchmark.pedantic(SimpyEngine().play, args=(program,), rounds=5, warmup_rounds=1)
    if benchmark.stats is not None:
        with capsys.disabled():
            how = "share a resource" if sharing else "share nothing"
            rate = TASKS / benchmark.stats.stats.median
            print(f"\nsimpy engine: {streams} streams that {how}: {rate:,.0f} tasks/s")


def test_memory(benchmark: Any, capsys: Any) -> None:
    per_task, size = 10, 512
    steps = np.linspace(0, 1, per_task)
    profile = MemoryProfile(steps, np.full(per_task, 3, np.int8), np.resize([size, -size], per_task).astype(np.int64))
    program = program_of([Task(0, 1000, profile=profile)] * 100_000, ["compute"])
    ends = np.arange(1, len(program) + 1, dtype=np.int64) * 1000
    timeline = Timeline(np.zeros_like(ends), ends - 1000, ends)
    benchmark.pedantic(memory_over_time, args=(program, timeline, 0, {}), rounds=3, warmup_rounds=1)
    if benchmark.stats is not None:
        with capsys.disabled():
            print(f"\nmemory over time: {len(program) * per_task / benchmark.stats.stats.median:,.0f} events/s")
