"""How many tasks a second the engines play, native beside SimPy's, and how many events a second memory adds up."""

import time
from typing import Any

import numpy as np
import pytest

from cosim.engine.native_engine import NativeEngine
from cosim.engine.program import MemoryProfile, Program, Stream, Timeline
from cosim.engine.simpy_engine import SimpyEngine
from cosim.engine.task import Task, program_of
from cosim.memory import memory_over_time

TASKS = 20_000
DEVICES, LAYERS, STEPS = 8, 40, 208  # of the step on many devices: 8 x 3 x 40 x 208 = 200 thousand tasks


def _streams(streams: int, sharing: bool) -> Program:
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


def _step_on_many_devices() -> Program:
    """Two kernels per layer and device, which hold its cores, and a collective of all that takes some of them.

    Every device has a host thread, a compute and a communication stream; a layer's collective runs beside its second
    kernel, and the next layer waits for it.
    """
    work = np.random.default_rng(0).integers(10_000_000, 90_000_000, (STEPS * LAYERS, DEVICES, 3)).tolist()
    tasks: list[Task] = []
    for layer in range(STEPS * LAYERS):
        for device in range(DEVICES):
            compute, communication, host = 3 * device, 3 * device + 1, 3 * device + 2
            row, times, cores = len(tasks), work[layer][device], 2 * device
            before = (row - 3 * DEVICES + 2,) if layer else ()
            kernel = {"stream": compute, "host": host, "launch_ps": 5_000_000, "demands": ((cores, 1.0),)}
            tasks += [
                Task(work_ps=times[0], depends=before, **kernel),
                Task(work_ps=times[1], **kernel),
                Task(
                    communication,
                    times[2],
                    host=host,
                    launch_ps=5_000_000,
                    priority=1,
                    rendezvous=layer,
                    depends=(row,),
                    demands=((cores, 0.15), (cores + 1, 1.0)),
                ),
            ]
    streams = [Stream(f"{kind} {i}", i, kind) for i in range(DEVICES) for kind in ("compute", "communication", "host")]
    return program_of(tasks, streams, [1.0] * (2 * DEVICES))


PROGRAMS = {
    "1 stream that shares nothing": lambda: _streams(1, False),
    "8 streams that share nothing": lambda: _streams(8, False),
    "1 stream on a resource": lambda: _streams(1, True),
    "8 streams that share a resource": lambda: _streams(8, True),
    "a step on 8 devices": _step_on_many_devices,
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_engine(benchmark: Any, capsys: Any, name: str) -> None:
    program = PROGRAMS[name]()
    started = time.perf_counter()
    expected = SimpyEngine().play(program)
    simpy_s = time.perf_counter() - started
    timeline = benchmark.pedantic(NativeEngine().play, args=(program,), rounds=15, warmup_rounds=2)
    assert timeline.end_ps.tolist() == expected.end_ps.tolist()
    benchmark.extra_info |= {"tasks": len(program), "simpy_s": simpy_s}
    if benchmark.stats is not None:
        native_s = benchmark.stats.stats.median
        with capsys.disabled():
            print(
                f"\n{name}, {len(program):,} tasks: native {len(program) / native_s:,.0f} tasks/s, "
                f"simpy {len(program) / simpy_s:,.0f} tasks/s, {simpy_s / native_s:.0f} times"
            )


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
