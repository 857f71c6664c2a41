"""What is drawn of a timeline is what was played."""

from __future__ import annotations

import numpy as np
import pytest

from cosim.report.figures.lanes import Lane, build_lanes, merged
from cosim.result import Result


def _lane(start: list[float], end: list[float], key: list[int]) -> Lane:
    keys = np.array(key)
    return Lane("compute", 0, "compute", np.array(start), np.array(end), keys, keys, np.ones(len(key), dtype=np.int64))


def test_every_task_is_drawn_where_it_ran(result: Result) -> None:
    assert result.detail is not None
    program, timeline = result.detail.program, result.detail.timeline
    lanes = build_lanes(program, timeline)
    assert not lanes.merged
    gathers = next(lane for lane in lanes.lanes if lane.name == "all-gather")
    on_stream = program.stream == 2
    assert gathers.start_s == pytest.approx(timeline.start_ps[on_stream] / 1e12)
    assert gathers.end_s == pytest.approx(timeline.end_ps[on_stream] / 1e12)


def test_idle_share_is_the_part_of_the_step_without_compute(result: Result) -> None:
    assert result.detail is not None
    program, timeline = result.detail.program, result.detail.timeline
    busy = int((timeline.end_ps - timeline.start_ps)[program.stream == 1].sum())
    lanes = build_lanes(program, timeline)
    assert lanes.idle_share == pytest.approx(1 - busy / timeline.makespan_ps)
    compute = next(lane for lane in lanes.lanes if lane.kind == "compute")
    idle = compute.key == lanes.keys.index("idle")
    assert 0 < (compute.end_s - compute.start_s)[idle].sum() <= lanes.idle_share * lanes.end_s
    assert any("compute is idle during all-gather block 0" in lanes.texts[text] for text in compute.text[idle])


def test_merging_keeps_the_number_of_tasks_and_the_time_that_they_cover(result: Result) -> None:
    assert result.detail is not None
    program, timeline = result.detail.program, result.detail.timeline
    lanes = build_lanes(program, timeline, most=300)
    assert lanes.merged
    assert sum(len(lane) for lane in lanes.lanes if lane.kind != "compute") <= 300
    gathers = next(lane for lane in lanes.lanes if lane.name == "all-gather")
    assert gathers.tasks.sum() == (program.stream == 2).sum()
    assert gathers.end_s.max() == pytest.approx(timeline.end_ps[program.stream == 2].max() / 1e12)


def test_only_neighbours_that_are_short_close_and_alike_become_one() -> None:
    lane = _lane([0.0, 1.0, 2.0, 50.0, 60.0, 61.0], [1.0, 2.0, 3.0, 51.0, 70.0, 62.0], [0, 0, 1, 1, 1, 1])
    joined = merged(lane, 5.0)
    assert joined.start_s.tolist() == [0.0, 2.0, 50.0, 60.0, 61.0]
    assert joined.tasks.tolist() == [2, 1, 1, 1, 1]
    assert merged(lane, 5.0, same_key=False).start_s.tolist() == [0.0, 50.0, 60.0, 61.0]
