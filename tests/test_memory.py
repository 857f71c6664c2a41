"""Memory over time against a loop that walks the events one by one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosim.engine import play
from cosim.engine.program import Label, MemoryProfile, Stream, Timeline
from cosim.engine.task import Task, program_of
from cosim.graph import Category
from cosim.memory import check_periodic, memory_over_time

GIB = 2**30


def profile(*events):
    """Events as (fraction, category, bytes)."""
    fraction, category, delta = zip(*events, strict=True) if events else ((), (), ())
    return MemoryProfile(np.array(fraction, float), np.array(category, np.int8), np.array(delta, np.int64))


def walked(program, timeline, device, resident):
    """(peak, bytes of each category at the peak, time of the peak), one event after another."""
    events = []
    for task in range(len(program)):
        if program.profile[task] < 0 or program.streams[program.stream[task]].device != device:
            continue
        its = program.profiles[program.profile[task]]
        start, end = int(timeline.start_ps[task]), int(timeline.end_ps[task])
        for fraction, category, delta in zip(its.fraction, its.category, its.delta_bytes, strict=True):
            events.append((start + int(fraction * (end - start)), category, int(delta)))
    events.sort(key=lambda event: event[0])
    held = {category: resident.get(category, 0) for category in Category}
    best = (sum(held.values()), dict(held), 0)
    for time, category, delta in events:
        held[Category(category)] += delta
        if sum(held.values()) > best[0]:
            best = (sum(held.values()), dict(held), time)
    return best


@st.composite
def programs(draw):
    profiles = [
        profile(
            *[
                (f, draw(st.integers(0, 6)), draw(st.integers(-50, 100)))
                for f in sorted(draw(st.lists(st.floats(0, 1), max_size=4)))
            ]
        )
        for _ in range(3)
    ]
    tasks = [
        Task(
            stream=draw(st.integers(0, 2)),
            work_ps=draw(st.integers(0, 9)),
            profile=draw(st.sampled_from([None, *profiles])),
        )
        for _ in range(draw(st.integers(0, 10)))
    ]
    return program_of(tasks, [Stream("a", 0, "compute"), Stream("b", 0, "copy"), Stream("c", 1, "compute")])


@given(programs(), st.integers(0, 1), st.dictionaries(st.sampled_from(list(Category)), st.integers(0, 200)))
@settings(max_examples=150, deadline=None)
def test_the_peak_is_that_of_walking_the_events(program, device, resident):
    timeline = play(program)
    curve, peak = memory_over_time(program, timeline, device, resident)
    total, held, time_ps = walked(program, timeline, device, resident)
    assert sum(peak.values()) == total == curve.bytes.sum(axis=0).max()
    assert peak["weights"] == held[Category.WEIGHTS]
    assert peak["activations"] == held[Category.ACTIVATIONS] + held[Category.INPUTS]
    assert curve.peak_time_s == pytest.approx(time_ps * 1e-12)
    assert np.all(np.diff(curve.time_s) >= 0)


def test_a_layer_cake_of_activations_peaks_at_the_end_of_forward():
    layers, kept, scratch = 10, 100, 30
    forward = profile((0.0, 3, kept), (0.0, 4, scratch), (1.0, 4, -scratch))
    backward = profile((0.0, 4, 2 * scratch), (1.0, 4, -2 * scratch), (1.0, 3, -kept))
    tasks = [
        Task(0, 10, profile=forward, label=Label(f"forward block {i}", "compute", "forward", i)) for i in range(layers)
    ]
    tasks += [
        Task(0, 20, profile=backward, label=Label(f"backward block {i}", "compute", "backward", i))
        for i in range(layers)[::-1]
    ]
    program = program_of(tasks, ["compute"])
    timeline = play(program)
    resident = {Category.WEIGHTS: 1000, Category.FRAMEWORK: 7}
    curve, peak = memory_over_time(program, timeline, 0, resident)
    assert peak == {
        "weights": 1000,
        "gradients": 0,
        "optimizer": 0,
        "activations": layers * kept,
        "temporary": 2 * scratch,
        "framework": 7,
    }
    assert curve.peak_during == "backward block 9"
    assert curve.peak_time_s == layers * 10 * 1e-12
    assert curve.time_s[-1] == timeline.makespan_ps * 1e-12
    check_periodic(program, timeline, 0, resident)


def test_what_is_only_resident_is_flat():
    program = program_of([Task(0, 10)], ["compute"])
    curve, peak = memory_over_time(program, play(program), 0, {Category.WEIGHTS: 5.0, Category.INPUTS: 2.0})
    assert sum(peak.values()) == 7.0
    assert curve.bytes.sum(axis=0).tolist() == [7.0, 7.0]
    assert curve.peak_during == "the beginning of the step"
    empty = program_of([], [])
    assert sum(memory_over_time(empty, play(empty), 0, {})[1].values()) == 0


def test_a_million_events_are_drawn_with_few_points_and_the_true_peak():
    rng = np.random.default_rng(1)
    n = 100_000
    program = program_of([Task(0, 1, profile=profile(*[(f / 10, 4, 0) for f in range(10)]))], ["compute"])
    sizes = rng.integers(1, 1000, (n,))
    profiles = tuple(profile(*[(f / 10, 4, (1 if f % 2 == 0 else -1) * int(s)) for f in range(10)]) for s in sizes[:50])
    tasks = [Task(0, 1000, profile=profiles[i % 50]) for i in range(n)]
    tasks[7 * n // 10] = Task(0, 1000, profile=profile((0.5, 3, GIB), (0.5, 3, -GIB)))
    program = program_of(tasks, ["compute"])
    ends = np.arange(1, n + 1) * 1000
    curve, peak = memory_over_time(program, Timeline(ends * 0, ends - 1000, ends), 0, {})
    assert peak["activations"] == GIB
    assert len(curve.time_s) <= 4000
    assert curve.bytes.sum(axis=0).max() == GIB
    # Every tenth of the step shows how high its temporaries went.
    for part in range(10):
        inside = (curve.time_s >= part * n * 1e-10) & (curve.time_s < (part + 1) * n * 1e-10)
        assert curve.bytes[4][inside].max() == sizes[:50].max()


def test_a_curve_that_falls_below_zero_or_does_not_return_is_named():
    label = Label("mlp", "compute", "forward", 2)
    leak = program_of([Task(0, 5, profile=profile((0.0, 3, 10)), label=label)], ["compute"])
    with pytest.raises(ValueError, match=r"activations end the step \+10 bytes"):
        check_periodic(leak, play(leak), 0, {})
    early = program_of([Task(0, 5, profile=profile((0.0, 3, -10), (1.0, 3, 10)), label=label)], ["compute"])
    with pytest.raises(ValueError, match="activations fall to -10 bytes during mlp"):
        check_periodic(early, play(early), 0, {})
    check_periodic(early, play(early), 0, {Category.ACTIVATIONS: 10})
