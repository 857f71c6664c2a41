"""Steps through pipelines: a rank's passes played in the schedule's order, messages, memory in flight, one end."""

import functools
from collections import deque

import numpy as np
import pytest

from cosim.engine.program import PICOSECONDS_PER_S
from cosim.footprint import resident
from cosim.memory import check_periodic
from cosim.parallel.schedules import Pass, build, needs
from cosim.played import Played
from cosim.simulate import _played
from cosim.spec import RunSpec
from cosim.summary import summarize

MODEL = {"family": "gpt", "layers": 8, "hidden": 1024, "heads": 16, "ffn": 4096, "vocab": 4096}
SCHEDULES = {"gpipe": 1, "1f1b": 1, "interleaved-1f1b": 2, "zb-h1": 1, "zb-h2": 1, "zb-v": 2, "dualpipe-v": 2}


def _spec(micro_batches: int = 8, devices: int = 4, **parallel: object) -> RunSpec:
    data = devices // (int(parallel.get("pipeline", 1)) * int(parallel.get("tensor", 1)))  # type: ignore[call-overload]
    return RunSpec.model_validate(
        {
            "workload": {"model": MODEL, "seq_len": 1024, "global_batch": micro_batches * data * 2, "micro_batch": 2},
            "system": {
                "accelerator": {"base": "a100-sxm-80gb", "set": {"power.limit": "2000 W"}},
                "devices": devices,
            },
            "parallel": parallel,
            "training": {"framework": "composer", "precision": "bf16"},
        }
    )


@functools.cache
def _step(micro_batches: int = 8, devices: int = 4, **parallel: object) -> Played:
    return _played(_spec(micro_batches, devices, **parallel), None)


def _passes(played: Played) -> dict[tuple[int, int, str], list[tuple[int, int]]]:
    """(device, micro-batch, phase) -> (start, end) of its compute tasks, sums over micro-batches included."""
    program, timeline = played.program, played.timeline
    found: dict[tuple[int, int, str], list[tuple[int, int]]] = {}
    for row in range(len(program)):
        stream, label = program.streams[program.stream[row]], program.labels[program.label[row]]
        if stream.kind == "compute" and label.kind in ("compute", "copy") and label.phase != "optimizer":
            key = (stream.device, int(program.micro_step[row]), label.phase)
            found.setdefault(key, []).append((int(timeline.start_ps[row]), int(timeline.end_ps[row])))
    return found


def test_1f1b_is_what_its_passes_and_messages_say_when_replayed() -> None:
    """An independent replay: each rank's passes in the schedule's order, each behind the message that it needs, and a
    rank that waits until its message is through.
    """
    played = _step(pipeline=4)
    program, timeline = played.program, played.timeline
    found = _passes(played)
    duration = {key: sum(end - start for start, end in spans) for key, spans in found.items()}
    message = {}
    for row in np.flatnonzero([program.labels[label].kind == "send_recv" for label in program.label]).tolist():
        stream = program.streams[program.stream[row]]
        key = (stream.device, int(program.micro_step[row]), program.labels[program.label[row]].phase)
        message[key] = int(timeline.end_ps[row] - timeline.start_ps[row])
    schedule = build("1f1b", 4, 8)
    done: dict[tuple[Pass, int, int], int] = {}
    arrival: dict[tuple[Pass, int, int], int] = {}
    clock, queues = [0] * 4, [deque(rank) for rank in schedule.ranks]
    while any(queues):
        for rank, queue in enumerate(queues):
            while queue and all(need in done for need in needs(queue[0], 4)):
                action = queue.popleft()
                phase = "forward" if action.what == Pass.FORWARD else "backward"
                ready = arrival.get((action.what, action.chunk, action.micro_batch), 0)
                end = max(clock[rank], ready) + duration[rank, action.micro_batch, phase]
                parts = (action.what,) if action.what == Pass.FORWARD else (Pass.INPUT_GRADIENT, Pass.WEIGHT_GRADIENT)
                for what in parts:
                    done[what, action.chunk, action.micro_batch] = end
                sent = message.get((rank, action.micro_batch, phase), 0)
                target = action.chunk + (1 if action.what == Pass.FORWARD else -1)
                arrival[action.what, target, action.micro_batch] = end + sent
                clock[rank] = end + sent
    last = max(max(end for spans in found.values() for _, end in spans), 0)
    assert last == pytest.approx(max(clock), rel=0.01)  # launches of the first kernels


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_memory_ends_a_step_as_it_began_and_time_adds_up(schedule: str) -> None:
    for parallel in ({}, {"zero": 1}, {"zero": 3}):
        played = _step(devices=8, pipeline=4, schedule=schedule, virtual_stages=SCHEDULES[schedule], **parallel)
        for device, rank in enumerate(played.ranks):
            check_periodic(played.program, played.timeline, device, resident(played, rank))
        times = summarize(played).time_breakdown_s
        total = sum(times["compute"].values()) + sum(times["exposed_communication"].values())
        assert total + times["bubble"] + times["host"] + times["optimizer"] == pytest.approx(played.step_time_s)


def test_the_bubble_is_that_of_the_closed_form() -> None:
    """(p - 1) / m of the ideal time (arXiv 2104.04473), and that over v with v chunks per rank; equal stages, so that
    the head, which the last rank alone has, is kept small.
    """
    for micro_batches in (8, 32):
        played = _step(micro_batches, pipeline=4)
        spans = [
            sum(end - start for (device, _, _), own in _passes(played).items() if device == rank for start, end in own)
            for rank in range(4)
        ]
        bubble = summarize(played).time_breakdown_s["bubble"] * PICOSECONDS_PER_S
        imbalance = max(spans) - sum(spans) / 4
        assert bubble == pytest.approx(3 / micro_batches * max(spans) + imbalance, rel=0.12)


def test_who_has_the_smaller_bubble() -> None:
    def bubble(**parallel: object) -> float:
        return summarize(_step(8, pipeline=4, **parallel)).time_breakdown_s["bubble"]

    one, gpipe, interleaved = bubble(), bubble(schedule="gpipe"), bubble(virtual_stages=2)
    zero = {name: bubble(schedule=name) for name in ("zb-h1", "zb-h2")}
    assert gpipe == pytest.approx(one, rel=0.1)
    assert interleaved < 0.75 * one
    assert zero["zb-h2"] < zero["zb-h1"] < 0.8 * one


def test_micro_batches_in_flight_are_those_of_the_schedule() -> None:
    """1F1B holds p - r of them on rank r, GPipe all; what one takes is the slope."""

    def activations(**parallel: object) -> list[float]:
        played = _step(8, pipeline=4, **parallel)
        found = []
        for device in range(4):
            rows = [
                row
                for row in range(len(played.program))
                if played.program.profile[row] >= 0
                and played.program.streams[played.program.stream[row]].device == device
            ]
            level = peak = 0
            for row in sorted(rows, key=lambda row: int(played.timeline.start_ps[row])):
                profile = played.program.profiles[played.program.profile[row]]
                for category, change in zip(profile.category.tolist(), profile.delta_bytes.tolist(), strict=True):
                    level += change if category == 3 else 0
                    peak = max(peak, level)
            found.append(peak)
        return found

    one, all_at_once = activations(), activations(schedule="gpipe")
    each = all_at_once[1] / 8  # a rank with blocks alone
    assert one[1] == pytest.approx(3 * each, rel=0.1)
    assert one[2] == pytest.approx(2 * each, rel=0.1)


def test_stages_of_other_sizes_move_work_from_rank_to_rank() -> None:
    even, uneven = _step(8, pipeline=2, devices=2), _step(8, pipeline=2, devices=2, stage_layers=(5, 3))
    layers = [
        [len({layer for block in rank.graph.blocks for layer in block.layers}) for rank in played.ranks]
        for played in (even, uneven)
    ]
    assert layers == [[4, 4], [5, 3]]
    assert uneven.step_time_s > 1.05 * even.step_time_s


def test_messages_between_nodes_take_the_network() -> None:
    inside = _step(8, pipeline=4)
    spec = RunSpec.model_validate(
        _spec(8, pipeline=4).echo() | {"system": {"accelerator": "a100-sxm-80gb", "devices": 4, "devices_per_node": 1}}
    )
    across = _played(spec, None)

    def longest(played: Played) -> int:
        kinds = [played.program.labels[label].kind for label in played.program.label]
        rows = [row for row, kind in enumerate(kinds) if kind == "send_recv"]
        return int((played.timeline.end_ps - played.timeline.start_ps)[rows].max())

    size = 2 * 1024 * 1024 * 2  # micro-batch x sequence x hidden in bf16, as autocast's residual in fp32 twice that
    assert longest(across) > 3 * longest(inside)
    assert longest(across) / PICOSECONDS_PER_S > size / 25e9
