"""The pipeline as papers draw it: a row per rank, a box per pass over a micro-batch, grey where a rank waits.

Boxes are lanes as those of the timeline, with one lane per rank; the page's script writes micro-batch numbers into
those that have room for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cosim.engine.program import PICOSECONDS_PER_S, Label, Program, Timeline
from cosim.report.figures.lanes import MOST_RECTANGLES, Lane, Lanes, fewer
from cosim.report.figures.palette import color_of, ink_on, lighter
from cosim.report.figures.style import axis, harmless, layout
from cosim.report.figures.timeline import in_legend_order, lookup_of, outlines
from cosim.report.words import name_of, plain_line

if TYPE_CHECKING:
    import plotly.graph_objects as go

WAITING = "waiting"
PASSES = ("forward", "backward", "input_gradient", "weight_gradient")
_LEAST_DRAWN = 1e-4
"""Shortest wait that is drawn, as a share of the step."""


def ranks_of(program: Program) -> int:
    """How many pipeline ranks a program has."""
    return len({stream.device for stream in program.streams})


def pipeline_lanes(program: Program, timeline: Timeline, most: int = MOST_RECTANGLES) -> Lanes:
    """One lane per rank: its passes, what it computes beside them, and its waits.

    A key is a phase and how many chunks of the rank come before (`forward 1`); consecutive tasks of one pass are one
    box. `idle_share` is of the time until the last rank ends.
    """
    start, end = timeline.start_ps / PICOSECONDS_PER_S, timeline.end_ps / PICOSECONDS_PER_S
    total = float(end.max(initial=0.0))
    keys: dict[str, int] = {}
    texts: dict[str, int] = {}
    lanes, waited = [], 0.0
    for device in sorted({stream.device for stream in program.streams}):
        compute = [n for n, s in enumerate(program.streams) if s.device == device and s.kind == "compute"]
        rows = np.flatnonzero(np.isin(program.stream, compute) & (end > start))
        boxes = _boxes(program, rows, start, end)
        waits = _waits(boxes, total)
        waited += sum(high - low for low, high, _, _ in waits)
        waits = [wait for wait in waits if wait[1] - wait[0] > _LEAST_DRAWN * total]
        drawn = sorted([*boxes, *waits])
        lanes.append(
            Lane(
                f"rank {device}",
                device,
                "compute",
                np.array([box[0] for box in drawn]),
                np.array([box[1] for box in drawn]),
                np.array([keys.setdefault(box[2], len(keys)) for box in drawn], dtype=np.int64),
                np.array([texts.setdefault(box[3], len(texts)) for box in drawn], dtype=np.int64),
                np.ones(len(drawn), dtype=np.int64),
            )
        )
    small, merged = fewer(lanes, total, most)
    share = waited / (total * len(lanes)) if lanes and total else 0.0
    return Lanes(tuple(small), tuple(keys), tuple(texts), total, share, merged)


Box = tuple[float, float, str, str]  # from, until (seconds), key, text


def _boxes(
    program: Program, rows: NDArray[np.int64], start: NDArray[np.float64], end: NDArray[np.float64]
) -> list[Box]:
    """The passes on one rank in order, tasks of one pass that follow each other as one."""
    labels = [program.labels[i] for i in program.label[rows].tolist()]
    chunks = sorted({label.layer for label in labels if label.phase in PASSES and label.kind == "compute"})
    place = {chunk: number for number, chunk in enumerate(chunks)}
    boxes: list[Box] = []
    for row, label in zip(rows.tolist(), labels, strict=True):
        key, text = _said(label, int(program.micro_step[row]), place)
        if boxes and boxes[-1][2:] == (key, text):
            boxes[-1] = (boxes[-1][0], float(end[row]), key, text)
        else:
            boxes.append((float(start[row]), float(end[row]), key, text))
    return boxes


def _said(label: Label, micro_batch: int, place: dict[int, int]) -> tuple[str, str]:
    if label.kind == "compute" and label.phase in PASSES:
        return f"{label.phase} {place[label.layer]}", f"{plain_line(label.name)}, micro-batch {micro_batch}"
    if label.phase == "optimizer":
        return "optimizer", "optimizer"
    return "copy", plain_line(label.name)


def _waits(boxes: list[Box], total: float) -> list[Box]:
    edges = [0.0, *(edge for box in boxes for edge in box[:2]), total]
    gaps = zip(edges[::2], edges[1::2], strict=True)
    return [(low, high, WAITING, "waits for other ranks") for low, high in gaps if high > low]


def pipeline_figure(lanes: Lanes) -> go.Figure:
    """A filled outline per colour, and an empty trace of numbers that the page's script fills."""
    import plotly.graph_objects as go

    figure, named = go.Figure(), set[str]()
    most = max((len(lane) for lane in lanes.lanes), default=0)
    order = in_legend_order(lanes)
    phases = list(dict.fromkeys(lanes.keys[number].split()[0] for number in order))
    for number in sorted(order, key=lambda number: (phases.index(lanes.keys[number].split()[0]), lanes.keys[number])):
        parts = [outlines(lanes, row, number) for row in range(len(lanes.lanes))]
        phase = lanes.keys[number].split()[0]
        figure.add_scatter(
            x=np.concatenate([part[0] for part in parts]),
            y=np.concatenate([part[1] for part in parts]),
            mode="lines",
            fill="toself",
            fillcolor=color(lanes.keys, number),
            line={"width": 0.8 if most < 400 else 0, "color": "rgba(255,255,255,0.75)", "simplify": False},
            name=harmless(name_of(phase)),
            legendgroup=phase,
            showlegend=phase not in named,
            hoverinfo="skip",
            meta={"key": number},
        )
        named.add(phase)
    figure.add_scatter(x=[], y=[], mode="text", hoverinfo="skip", showlegend=False, textfont={"size": 11})
    rows = len(lanes.lanes)
    figure.update_layout(
        layout(
            96 + rows * (34 if rows <= 12 else 22),
            hovermode=False,
            dragmode="zoom",
            xaxis=axis("time in the step", tickformat="~s", ticksuffix="s", range=[0, lanes.end_s or 1.0]),
            yaxis=axis(
                tickvals=list(range(rows)),
                ticktext=[lane.name for lane in lanes.lanes],
                range=[rows - 0.5, -0.5],
                fixedrange=True,
                showgrid=False,
                ticklabelstandoff=6,
            ),
        )
    )
    return figure


def pipeline_lookup(lanes: Lanes) -> dict[str, Any]:
    """What the page needs to name and number the boxes: `ink` is the colour on each key's; numbers end its text."""
    keys = range(len(lanes.keys))
    ink = [ink_on(shade) if (shade := color(lanes.keys, key)).startswith("#") else "" for key in keys]
    return {**lookup_of(lanes), "ink": [ink[key] if " " in lanes.keys[key] else "" for key in keys]}


def color(keys: tuple[str, ...], number: int) -> str:
    """The phase's colour, lighter for later chunks of a rank, as papers on interleaving draw them."""
    phase, _, chunk = keys[number].partition(" ")
    if phase == WAITING:
        return color_of("idle")
    last = max((int(key.partition(" ")[2]) for key in keys if " " in key), default=0)
    return lighter(color_of(phase), 0.5 * int(chunk) / last) if chunk and last else color_of(phase)
