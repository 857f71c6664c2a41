"""The ops against the machine's ceilings: operations per byte across, rate up, both logarithmic."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cosim.report.figures.palette import color_of
from cosim.report.figures.style import axis, harmless, layout
from cosim.report.words import bytes_rate, flops_rate, looked_up, name_of, percent, seconds, shape, significant
from cosim.result import OpRow, Result, Roofline

if TYPE_CHECKING:
    import plotly.graph_objects as go

_POINTS = 300
_LARGEST_POINT, _SMALLEST_POINT = 34.0, 6.0  # pixels across
_LOWEST_RATE = 1e-5
"""Slower ops than this share of the highest rate take no visible time, but would flatten the figure."""
_QUIET = "#8a93a0"


@dataclass(frozen=True, slots=True)
class OpPoint:
    """All ops of one target, shape and phase: seconds, FLOP and bytes summed over modules."""

    target: str
    op_class: str
    phase: str
    shape: str
    limited_by: str
    count: int
    time_s: float
    flops: float
    hbm_bytes: float


def op_points(ops: Iterable[OpRow]) -> list[OpPoint]:
    """One point per op kind, largest time first; ops without arithmetic or traffic have no place here."""
    groups: dict[tuple[str, str, str, str, str], list[OpRow]] = defaultdict(list)
    for row in ops:
        if row.time_s > 0 and row.flops > 0 and row.hbm_bytes > 0:
            groups[row.target, row.op_class, row.phase, row.shape, row.limited_by].append(row)
    points = [
        OpPoint(
            *key,
            count=sum(row.count for row in rows),
            time_s=sum(row.time_s for row in rows),
            flops=sum(row.flops for row in rows),
            hbm_bytes=sum(row.hbm_bytes for row in rows),
        )
        for key, rows in groups.items()
    ]
    return sorted(points, key=lambda point: -point.time_s)[:_POINTS]


def roofline_figure(result: Result, roofline: Roofline, ops: Iterable[OpRow]) -> go.Figure:
    """Ceilings of memory and of each format, and one point per op kind whose area is its time."""
    import plotly.graph_objects as go

    points = op_points(ops)
    across, up = _ranges(roofline, points)
    figure = go.Figure()
    _draw_ceilings(figure, roofline, str(looked_up(result.spec, "training.precision", "")), across)
    most = max((point.time_s for point in points), default=1.0)
    for op_class in dict.fromkeys(point.op_class for point in points):
        members = [point for point in points if point.op_class == op_class]
        figure.add_scatter(
            x=[point.flops / point.hbm_bytes for point in members],
            y=[point.flops / point.time_s for point in members],
            mode="markers",
            name=harmless(name_of(op_class)),
            marker={
                "size": [max(_SMALLEST_POINT, _LARGEST_POINT * math.sqrt(point.time_s / most)) for point in members],
                "color": color_of(op_class),
                "opacity": 0.85,
                "line": {"width": 1},
            },
            hovertext=[_hover(point, result.step_time_s) for point in members],
            hoverinfo="text",
            meta={"outline": "surface"},
        )
    logs = [[math.log10(low), math.log10(high)] for low, high in (across, up)]
    figure.update_layout(
        layout(
            440,
            hovermode="closest",
            xaxis=axis("FLOP per byte of memory traffic", type="log", range=logs[0], **_decades(across)),
            yaxis=axis("FLOP/s", type="log", range=logs[1], dtick=1, tickformat="~s"),
            legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "itemsizing": "constant"},
        )
    )
    return figure


def _ranges(roofline: Roofline, points: list[OpPoint]) -> tuple[tuple[float, float], tuple[float, float]]:
    """What the axes show: all points and the ridges, with some air."""
    bandwidth = roofline.hbm_bytes_per_s
    peaks = [peak for peak in roofline.peak_flops.values() if peak > 0] or [1e12]
    ridges = [peak / bandwidth for peak in peaks] if bandwidth > 0 else [1.0]
    intensities = [point.flops / point.hbm_bytes for point in points] + ridges
    rates = [point.flops / point.time_s for point in points] + peaks
    across = (min(min(intensities) / 3, 1.0), max(intensities) * 40)
    highest = max(rates)
    return across, (max(min(rates) / 4, highest * _LOWEST_RATE), highest * 2.5)


def _decades(across: tuple[float, float]) -> dict[str, list[float] | list[str]]:
    """Ticks at powers of ten, written out: 0.1, 1, 10, 1,000."""
    powers = range(math.ceil(math.log10(across[0])), math.floor(math.log10(across[1])) + 1)
    return {"tickvals": [10.0**n for n in powers], "ticktext": [f"{10.0**n:,.{max(0, -n)}f}" for n in powers]}


def _draw_ceilings(figure: go.Figure, roofline: Roofline, precision: str, across: tuple[float, float]) -> None:
    bandwidth = roofline.hbm_bytes_per_s
    for peak in dict.fromkeys(sorted(roofline.peak_flops.values())):
        names = [name for name, value in roofline.peak_flops.items() if value == peak]
        ridge = peak / bandwidth if bandwidth > 0 else across[0]
        used = precision in names
        figure.add_scatter(
            x=[max(ridge, across[0]), across[1]],
            y=[peak, peak],
            mode="lines",
            line={"color": _QUIET, "width": 2.4 if used else 1.2, "dash": "solid" if used else "dot"},
            showlegend=False,
            hoverinfo="skip",
        )
        figure.add_annotation(
            x=math.log10(across[1]),
            y=math.log10(peak),
            text=f"{'<b>' if used else ''}{harmless(', '.join(names))} {flops_rate(peak)}{'</b>' if used else ''}",
            xanchor="right",
            yanchor="bottom",
            showarrow=False,
            font={"size": 11},
        )
    if bandwidth <= 0 or not roofline.peak_flops:
        return
    highest = max(roofline.peak_flops.values())
    ridge_of_highest = highest / bandwidth
    figure.add_scatter(
        x=[across[0], ridge_of_highest],
        y=[across[0] * bandwidth, highest],
        mode="lines",
        line={"color": _QUIET, "width": 2.4},
        showlegend=False,
        hoverinfo="skip",
    )
    figure.add_annotation(
        x=0.5 * math.log10(across[0] * ridge_of_highest),
        y=0.5 * math.log10(across[0] * ridge_of_highest) + math.log10(bandwidth),
        text=f"<b>memory {bytes_rate(bandwidth)}</b> ",
        xanchor="right",
        yanchor="bottom",
        showarrow=False,
        font={"size": 11},
    )


def _hover(point: OpPoint, step_time_s: float) -> str:
    share = point.time_s / step_time_s if step_time_s > 0 else 0.0
    return "<br>".join(
        [
            f"<b>{harmless(point.target)}</b> {harmless(shape(point.shape))}, {harmless(point.phase)}",
            f"{seconds(point.time_s)} in {point.count:,} ops, {percent(share)} of the step",
            f"{flops_rate(point.flops / point.time_s)}, {bytes_rate(point.hbm_bytes / point.time_s)}",
            f"{significant(point.flops / point.hbm_bytes)} FLOP/byte, limited by {harmless(point.limited_by)}",
        ]
    )
