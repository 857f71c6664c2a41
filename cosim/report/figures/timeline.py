"""What every stream does over the step: a row per stream, one filled outline per colour, so that thousands stay quick.

Plotly draws the shapes and the axes. What lies under the pointer is looked up by the page's script in `lookup_of`,
since a filled outline knows only that it was hit, not in which task.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cosim.report.figures.lanes import Lanes
from cosim.report.figures.palette import color_of
from cosim.report.figures.style import axis, harmless, layout
from cosim.report.words import name_of

if TYPE_CHECKING:
    import plotly.graph_objects as go

_HALF_HEIGHT = 0.40
_LANE_PIXELS = 40
_COMMUNICATION_LANES = ("communication",)


def timeline_figure(lanes: Lanes) -> go.Figure:
    """One scatter trace per colour whose filled segments are the tasks."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for number in in_legend_order(lanes):
        parts = [outlines(lanes, row, number) for row in range(len(lanes.lanes))]
        x = np.concatenate([part[0] for part in parts])
        if not len(x):
            continue
        key = lanes.keys[number]
        figure.add_scatter(
            x=x,
            y=np.concatenate([part[1] for part in parts]),
            mode="lines",
            fill="toself",
            fillcolor=color_of(key, communication=_communicates(lanes, number)),
            line={"width": 0, "simplify": False},
            name=harmless(name_of(key)),
            hoverinfo="skip",
            connectgaps=False,
            meta={"key": number},
        )
    devices = {lane.device for lane in lanes.lanes}
    names = [harmless(f"{lane.name} {lane.device}" if len(devices) > 1 else lane.name) for lane in lanes.lanes]
    rows = max(1, len(lanes.lanes))
    figure.update_layout(
        layout(
            96 + rows * (_LANE_PIXELS if rows <= 12 else 26),
            hovermode=False,
            dragmode="zoom",
            xaxis=axis(
                "time in the step", tickformat="~s", ticksuffix="s", range=[0, lanes.end_s or 1.0], showgrid=True
            ),
            yaxis=axis(
                tickvals=list(range(rows)),
                ticktext=names,
                range=[rows - 0.5, -0.5],
                fixedrange=True,
                showgrid=False,
                ticklabelstandoff=6,
            ),
        )
    )
    return figure


def lookup_of(lanes: Lanes) -> dict[str, Any]:
    """What the page needs to name what is under the pointer: times, colours, texts and task counts of each lane."""
    return {
        "keys": list(lanes.keys),
        "texts": list(lanes.texts),
        "lanes": [
            {
                "start": np.round(lane.start_s, 9).tolist(),
                "end": np.round(lane.end_s, 9).tolist(),
                "key": lane.key.tolist(),
                "text": lane.text.tolist(),
                "tasks": lane.tasks.tolist(),
            }
            for lane in lanes.lanes
        ],
    }


def outlines(lanes: Lanes, row: int, key: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The corners of all rectangles of one colour in one row, with a gap after each."""
    lane = lanes.lanes[row]
    mine = lane.key == key
    start, end = lane.start_s[mine], lane.end_s[mine]
    gap = np.full(len(start), np.nan)
    x = np.stack([start, end, end, start, start, gap], axis=1).ravel()
    low, high = np.full(len(start), row - _HALF_HEIGHT), np.full(len(start), row + _HALF_HEIGHT)
    y = np.stack([low, low, high, high, low, gap], axis=1).ravel()
    return x, y


def in_legend_order(lanes: Lanes) -> list[int]:
    """Colours as they first appear, row by row; idleness last."""
    seen = dict.fromkeys(int(key) for lane in lanes.lanes for key in lane.key)
    return sorted(seen, key=lambda number: lanes.keys[number] in ("idle", "waiting"))


def _communicates(lanes: Lanes, key: int) -> bool:
    return any(lane.kind in _COMMUNICATION_LANES and bool((lane.key == key).any()) for lane in lanes.lanes)
