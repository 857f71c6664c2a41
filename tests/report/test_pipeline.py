"""A step over pipeline ranks in every report: the picture, the traffic, the trace and the terminal."""

from __future__ import annotations

import dataclasses
import io
import json
import re

import numpy as np
import pytest
from rich.console import Console

from cosim.engine.program import Timeline
from cosim.memory import memory_over_time
from cosim.parallel.schedules import Pass, build
from cosim.report.communication import traffic
from cosim.report.figures.pipeline import pipeline_figure, pipeline_lanes, pipeline_lookup
from cosim.report.html import page
from cosim.report.memory_snapshot import memory_snapshot
from cosim.report.perfetto import chrome_trace
from cosim.report.rank_memory import peaks
from cosim.report.terminal import print_result
from cosim.result import Detail, Result

RANKS, MICRO_BATCHES = 4, 8
WORDS = {"forward": Pass.FORWARD, "backward": Pass.BACKWARD, "input gradient": Pass.INPUT_GRADIENT}
WORDS["weight gradient"] = Pass.WEIGHT_GRADIENT


def _detail(result: Result) -> Detail:
    assert result.detail is not None
    return result.detail


def test_boxes_are_the_schedules_actions_in_its_order(pipelined: Result) -> None:
    detail, spec = _detail(pipelined), pipelined.spec["parallel"]
    schedule = build(spec["schedule"], RANKS, MICRO_BATCHES, spec["virtual_stages"])
    lanes = pipeline_lanes(detail.program, detail.timeline)
    for lane, actions in zip(lanes.lanes, schedule.ranks, strict=True):
        said = (re.fullmatch(r"(\D+) chunk (\d+), micro-batch (\d+)", lanes.texts[text]) for text in lane.text)
        drawn = [(WORDS[one[1]], int(one[2]), int(one[3])) for one in said if one]
        assert drawn == [(action.what, action.chunk, action.micro_batch) for action in actions]


def test_passes_and_waits_fill_every_rank(pipelined: Result) -> None:
    detail = _detail(pipelined)
    lanes = pipeline_lanes(detail.program, detail.timeline)
    end = detail.timeline.makespan_ps / 1e12
    waits = 0.0
    for lane in lanes.lanes:
        assert (lane.start_s[1:] >= lane.end_s[:-1] - 1e-15).all()
        waiting = np.array([lanes.keys[key] == "waiting" for key in lane.key])
        busy = (lane.end_s - lane.start_s)[~waiting].sum()
        waits += end - busy
        assert (lane.end_s - lane.start_s).sum() == pytest.approx(end, rel=0.01)  # the shortest waits are left out
    assert lanes.idle_share == pytest.approx(waits / (RANKS * end))
    assert lanes.idle_share >= pipelined.time_breakdown_s["bubble"] / pipelined.step_time_s


def test_later_chunks_are_lighter_and_named_once(pipelined: Result) -> None:
    detail = _detail(pipelined)
    lanes = pipeline_lanes(detail.program, detail.timeline)
    traces = [trace for trace in pipeline_figure(lanes).data if trace.fill]
    named = [trace.name for trace in traces if trace.showlegend]
    assert len(named) == len(set(named))
    chunks = pipelined.spec["parallel"]["virtual_stages"]
    forward = [trace.fillcolor for trace in traces if trace.name == "forward"]
    assert len(set(forward)) == len(forward) == chunks
    assert [int(color[1:3], 16) for color in forward] == sorted(int(color[1:3], 16) for color in forward)


def test_the_page_has_the_pipeline_and_can_number_its_boxes(pipelined: Result) -> None:
    text = page(pipelined)
    assert "<h2>Pipeline</h2>" in text
    assert "<h2>Communication</h2>" in text
    lookup = json.loads(re.findall(r'id="tasks">(.*?)</script>', text)[0])["pipeline"]
    numbered = [
        t for t, k in zip(lookup["lanes"][0]["text"], lookup["lanes"][0]["key"], strict=True) if lookup["ink"][k]
    ]
    assert {re.findall(r"\d+$", lookup["texts"][text])[0] for text in numbered} == set(map(str, range(MICRO_BATCHES)))


def test_messages_are_the_boundaries_times_the_micro_batches(pipelined: Result) -> None:
    """An activation in bf16 forward, its gradient backward, over every boundary between chunks, by either sender."""
    message = next(row for row in traffic(pipelined) if row.kind == "send_recv")
    boundaries = RANKS * pipelined.spec["parallel"]["virtual_stages"] - 1
    calls = 2 * boundaries * MICRO_BATCHES
    assert message.calls * RANKS == pytest.approx(calls)
    assert message.bytes * RANKS == pytest.approx(calls * 512 * 512 * 2)
    assert not message.crosses


def test_gradients_are_reduced_and_parameters_gathered_once(pipelined: Result) -> None:
    """ZeRO 1 on two replicas, and the tied table summed between the first and the last rank."""
    rows = {(row.group, row.kind): row for row in traffic(pipelined)}
    parameters = _detail(pipelined).parameters + 4096 * 512  # the first and the last rank both hold the table
    assert rows["data", "reduce_scatter"].bytes * RANKS == pytest.approx(4 * parameters, rel=1e-3)
    assert rows["data", "all_gather"].bytes * RANKS == pytest.approx(2 * parameters, rel=1e-3)
    assert rows["tied", "all_reduce"].calls == pytest.approx(2 / RANKS)


def test_the_rank_that_holds_most_is_the_worst(pipelined: Result) -> None:
    detail, held = _detail(pipelined), peaks(pipelined)
    assert int(np.argmax(held)) == pipelined.worst_rank
    assert max(held) == pytest.approx(pipelined.peak_memory_bytes)
    for rank, step in enumerate(detail.ranks):
        _, at_peak = memory_over_time(detail.program, detail.timeline, rank, step.resident_bytes)
        assert held[rank] == pytest.approx(sum(at_peak.values()))


def test_the_terminal_names_the_bubble_and_the_worst_rank(pipelined: Result) -> None:
    file = io.StringIO()
    print_result(pipelined, Console(file=file, width=100))
    lines = [" ".join(line.split()) for line in file.getvalue().splitlines()]
    bubble = 100 * pipelined.time_breakdown_s["bubble"] / pipelined.step_time_s
    assert any(line.startswith("bubble ") and f"{bubble:.1f} %" in line for line in lines)
    named = [line for line in lines if re.match(r"rank \d", line)]
    assert len(named) == RANKS
    assert [line for line in named if "(the most)" in line] == [named[pipelined.worst_rank]]


def test_perfetto_shows_every_rank_its_messages_and_its_memory(pipelined: Result) -> None:
    detail = _detail(pipelined)
    events = chrome_trace(pipelined)["traceEvents"]
    names = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names == {f"rank {rank}" for rank in range(RANKS)}
    flows = {event["id"]: {} for event in events if event["name"] == "message"}
    for event in events:
        if event["name"] == "message":
            flows[event["id"]][event["ph"]] = event["pid"]
    sends = [label.name.startswith("send") for label in detail.program.labels]
    assert sum(len({*ends.values()}) == 2 for ends in flows.values()) == len(flows)
    assert len(flows) >= sum(sends[label] for label in detail.program.label)
    held = dict.fromkeys(range(RANKS), 0)
    for event in events:
        if event["ph"] == "C" and event["name"] == "memory":
            rank = event["pid"] - 1
            held[rank] = max(held[rank], sum(event["args"].values()))
    assert list(held.values()) == pytest.approx(list(peaks(pipelined)), rel=1e-6)
    kernels = {event["pid"] for event in events if event["ph"] == "X" and event["name"].startswith("aten.")}
    assert kernels == {rank + 1 for rank in range(RANKS)}


def test_the_memory_snapshot_is_of_the_rank_that_holds_most(pipelined: Result) -> None:
    entries = memory_snapshot(pipelined)["device_traces"][0]
    sign = {"alloc": 1, "free_completed": -1}
    level = np.cumsum([sign.get(entry["action"], 0) * entry["size"] for entry in entries])
    assert level.max() + pipelined.memory_bytes["framework"] == pytest.approx(pipelined.peak_memory_bytes)


def test_a_pipeline_of_ten_thousand_tasks_adds_little_to_a_page(pipelined: Result) -> None:
    """Plotly itself is 4.8 MB."""
    detail = _detail(pipelined)
    times = 10_000 // len(detail.program) + 1
    program, period = detail.program, detail.timeline.makespan_ps
    many = dataclasses.replace(
        program,
        stream=np.tile(program.stream, times),
        label=np.tile(program.label, times),
        micro_step=np.concatenate([program.micro_step + MICRO_BATCHES * i for i in range(times)]),
    )
    assert len(many.stream) > 10_000
    start, end = (
        np.concatenate([column + period * i for i in range(times)])
        for column in (detail.timeline.start_ps, detail.timeline.end_ps)
    )
    lanes = pipeline_lanes(many, Timeline(start, start, end))
    assert len(pipeline_figure(lanes).to_json()) + len(json.dumps(pipeline_lookup(lanes))) < 2.5e6
