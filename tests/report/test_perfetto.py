"""The timeline file keeps the rules of the trace-event format, and says what the played step did."""

import dataclasses
import gzip
import json
import math
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cosim
from cosim.report.perfetto import chrome_trace, microseconds, write_perfetto
from cosim.result import Result

REQUIRED = {
    "X": {"name", "cat", "ts", "dur", "pid", "tid"},
    "s": {"name", "cat", "id", "ts", "pid", "tid"},
    "f": {"name", "cat", "id", "ts", "pid", "tid"},
    "C": {"name", "ts", "pid", "args"},
    "M": {"name", "pid", "tid", "args"},
}
RUN = """
workload:
  model: {family: gpt, layers: 3, hidden: 256, heads: 4, vocab: 512}
  seq_len: 256
  global_batch: 64
system: {accelerator: h100-sxm-80gb, devices: 8}
parallel: {zero: %d}
"""


@pytest.fixture(scope="module", params=[0, 3])
def simulated(request: pytest.FixtureRequest) -> Result:
    return cosim.simulate(cosim.RunSpec.from_text(RUN % request.param))


def nanoseconds(event: dict[str, Any]) -> tuple[int, int]:
    """Begin and end as Perfetto reads them: numbers times 1000, truncated."""
    begin = int(event["ts"] * 1000.0)
    return begin, begin + int(event["dur"] * 1000.0)


def check(trace: dict[str, Any]) -> None:
    """The rules of the format that a reader relies on."""
    events = trace["traceEvents"]
    named: set[tuple[int, int]] = set()
    last: dict[tuple[int, int], float] = defaultdict(float)
    open_slices: dict[tuple[int, int], list[tuple[int, float]]] = defaultdict(list)
    flows: dict[str, Counter[int]] = {"s": Counter(), "f": Counter()}
    for event in events:
        assert event["ph"] in REQUIRED
        assert REQUIRED[event["ph"]] <= event.keys()
        assert event["pid"] > 0, "process 0 is the idle process"
        assert all(math.isfinite(value) and value >= 0 for key, value in event.items() if key in ("ts", "dur"))
        thread = (event["pid"], event.get("tid", 0))
        if event["ph"] == "M":
            named |= {thread} if event["name"] == "thread_name" else set()
            continue
        assert event["ts"] >= last[thread], "times run backwards on a thread"
        last[thread] = event["ts"]
        if event["ph"] == "C":
            assert all(math.isfinite(value) and value >= 0 for value in event["args"].values())
            continue
        assert thread in named
        if event["ph"] == "X":
            begin, end = nanoseconds(event)
            until = event["ts"] + event["dur"]  # a reader that adds fractions
            stack = open_slices[thread]
            while stack and stack[-1][0] <= begin:
                assert stack[-1][1] < event["ts"], "slices touch"
                stack.pop()
            assert not stack or end <= stack[-1][0], f"{event['name']} overlaps the slice around it"
            assert not stack or until < stack[-1][1]
            stack.append((end, until))
        else:
            assert open_slices[thread], "a flow binds to a slice"
            assert int(event["ts"] * 1000.0) < max(end for end, _ in open_slices[thread])
            flows[event["ph"]][event["id"]] += 1
            assert event["ph"] == "s" or event["bp"] == "e"
    assert flows["s"] == flows["f"]
    assert set(flows["s"].values()) <= {1}


def test_a_simulated_step_keeps_the_rules(simulated: Result) -> None:
    trace = chrome_trace(simulated)
    check(trace)
    assert {event["ph"] for event in trace["traceEvents"]} == set(REQUIRED)


def test_many_devices_are_processes_of_their_own(result: Result) -> None:
    detail = result.detail
    assert detail is not None
    streams = tuple(dataclasses.replace(s, device=number) for number, s in enumerate(detail.program.streams))
    program = dataclasses.replace(detail.program, streams=streams)
    trace = chrome_trace(dataclasses.replace(result, detail=dataclasses.replace(detail, program=program)))
    check(trace)
    assert {event["pid"] for event in trace["traceEvents"] if event["ph"] == "X"} == {1, 2, 3, 4}


def test_slices_add_up_to_the_played_time(simulated: Result) -> None:
    """Every task is there, with its time to the nanosecond; the last one ends when the step does."""
    detail = simulated.detail
    assert detail is not None
    tasks = [e for e in chrome_trace(simulated)["traceEvents"] if e["ph"] == "X" and e["tid"] > 1000]
    tasks = [e for e in tasks if "micro_step" in e["args"]]
    took = (detail.timeline.end_ps - detail.timeline.start_ps) / 1e3
    assert sum(e["dur"] for e in tasks) * 1e3 == pytest.approx(took.sum(), abs=2 * len(took))
    assert max(nanoseconds(e)[1] for e in tasks) == round(detail.timeline.makespan_ps / 1e3) - 1


def test_ops_lie_in_the_tasks_of_the_first_micro_step(simulated: Result) -> None:
    """As many matrix products as the model has: per block four forward and eight backward, and the head's three."""
    ops = [e for e in chrome_trace(simulated)["traceEvents"] if e["ph"] == "X" and "module" in e["args"]]
    products = [e for e in ops if e["cat"] == "matmul"]
    assert len(products) == 3 * (4 + 8) + 3
    detail = simulated.detail
    assert detail is not None
    assert detail.traced is not None
    flops = float(detail.traced.prices.flops.sum())
    assert sum(e["args"]["flops"] for e in ops) == pytest.approx(flops, rel=1e-3)


def test_dependencies_between_streams_have_their_arrows(simulated: Result) -> None:
    detail = simulated.detail
    assert detail is not None
    program, took = detail.program, detail.timeline.end_ps - detail.timeline.start_ps
    expected = 0
    for task in range(len(program)):
        for before in program.depends.row(task).tolist():
            visible = took[task] > 1000 and took[before] > 1000
            expected += bool(visible and program.stream[before] != program.stream[task])
    flows = [e for e in chrome_trace(simulated)["traceEvents"] if e["ph"] == "s" and e["cat"] == "dependency"]
    assert len(flows) == expected > 0


def test_memory_counter_reaches_the_peak(simulated: Result) -> None:
    memory = [e["args"] for e in chrome_trace(simulated)["traceEvents"] if e["name"] == "memory"]
    assert max(sum(held.values()) for held in memory) == pytest.approx(simulated.peak_memory_bytes, abs=8)


def test_links_carry_the_bytes_of_the_collectives(simulated: Result) -> None:
    """A counter's integral over time is what the tasks moved."""
    events = chrome_trace(simulated)["traceEvents"]
    carried = 0.0
    for name in {e["name"] for e in events if e["ph"] == "C"} - {"memory"}:
        counter = [e for e in events if e["name"] == name]
        time = np.array([e["ts"] * 1e-6 for e in counter])
        carried += float((np.diff(time) * [e["args"]["bytes_per_s"] for e in counter][:-1]).sum())
        assert counter[-1]["args"]["bytes_per_s"] == 0
    moved = sum(e["args"].get("link_bytes", 0) for e in events if e["ph"] == "X")
    assert carried == pytest.approx(moved, rel=1e-3)


def test_what_is_not_drawn_is_said(simulated: Result) -> None:
    trace = chrome_trace(simulated)
    assert (trace["otherData"]["micro_steps"], trace["otherData"]["micro_steps_played"]) == (8, 4)
    assert "micro-step 2 happens 5 times" in trace["otherData"]["repeated"]
    happens = {e["args"]["micro_step"] for e in trace["traceEvents"] if "happens" in e.get("args", {})}
    assert happens == {2}


def test_there_are_no_more_events_than_asked_for(simulated: Result) -> None:
    all_events, few = (len(chrome_trace(simulated, most)["traceEvents"]) for most in (50_000, 0))
    assert few < all_events
    assert not any("module" in e.get("args", {}) for e in chrome_trace(simulated, 0)["traceEvents"])


def test_times_survive_a_reader_that_truncates() -> None:
    assert int(1.001 * 1000.0) == 1000, "why this is needed"
    sample = [*range(5000), *np.random.default_rng(1).integers(0, 10**14, 5000).tolist()]
    assert all(int(microseconds(n) * 1000.0) == n for n in sample)


@pytest.mark.parametrize("name", ["step.json", "step.json.gz"])
def test_the_file_is_the_trace(simulated: Result, tmp_path: Path, name: str) -> None:
    write_perfetto(simulated, tmp_path / name)
    data = (tmp_path / name).read_bytes()
    assert json.loads(gzip.decompress(data) if name.endswith(".gz") else data) == chrome_trace(simulated)


def test_a_result_without_detail_writes_nothing(simulated: Result, tmp_path: Path) -> None:
    with pytest.raises(cosim.InputError, match="no timeline"):
        write_perfetto(dataclasses.replace(simulated, detail=None), tmp_path / "step.json")
    assert list(tmp_path.iterdir()) == []


def test_hostile_names_stay_text(hostile: Result) -> None:
    check(json.loads(json.dumps(chrome_trace(hostile), allow_nan=False)))
