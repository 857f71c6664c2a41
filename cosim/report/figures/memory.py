"""Memory of the worst rank over the step, by category, under the device's capacity."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cosim.report.figures.palette import ACCENT, color_of
from cosim.report.figures.style import axis, harmless, layout
from cosim.report.words import memory, name_of
from cosim.result import MemoryCurve, Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

_GIB = 2.0**30
_BINS = 900


def memory_figure(result: Result, curve: MemoryCurve) -> go.Figure:
    """Stacked areas in GiB, the capacity as a line, the peak marked."""
    import plotly.graph_objects as go

    points = kept_points(curve)
    time, rows = curve.time_s[points], curve.bytes[:, points] / _GIB
    figure = go.Figure()
    for name, row in zip(curve.categories, rows, strict=True):
        if not row.any():
            continue
        figure.add_scatter(
            x=time,
            y=row,
            name=harmless(name_of(name)),
            stackgroup="memory",
            mode="lines",
            line={"width": 0.5, "shape": "hv", "color": color_of(name)},
            fillcolor=color_of(name),
            hovertemplate="%{y:.2f} GiB",
        )
    peak = result.peak_memory_bytes / _GIB
    figure.add_scatter(
        x=[curve.peak_time_s],
        y=[peak],
        mode="markers",
        name="peak",
        marker={"size": 10, "color": ACCENT, "line": {"width": 2, "color": "white"}},
        showlegend=False,
        hoverinfo="skip",
    )
    middle = 0.5 * (time[0] + time[-1]) if len(time) else 0.0
    figure.add_annotation(
        x=curve.peak_time_s,
        y=peak,
        text=f"<b>peak {memory(result.peak_memory_bytes)}</b><br>{harmless(curve.peak_during)}",
        xanchor="left" if curve.peak_time_s <= middle else "right",
        yanchor="bottom",
        align="left" if curve.peak_time_s <= middle else "right",
        xshift=8 if curve.peak_time_s <= middle else -8,
        yshift=2,
        showarrow=False,
    )
    capacity = result.memory_capacity_bytes / _GIB
    under = "rgba(255,255,255,0.85)" if peak > capacity else "rgba(0,0,0,0)"
    figure.add_hline(
        capacity,
        line={"color": ACCENT, "width": 1.5, "dash": "dash"},
        annotation={
            "text": f"capacity {memory(result.memory_capacity_bytes)}",
            "font": {"color": ACCENT},
            "bgcolor": under,
        },
        annotation_position="top right",
    )
    figure.update_layout(
        layout(
            400,
            hovermode="x unified",
            xaxis=axis("time in the step", tickformat="~s", ticksuffix="s", showgrid=False, hoverformat=".4~s"),
            yaxis=axis("GiB", rangemode="tozero", range=[0, 1.16 * max(capacity, peak)]),
        )
    )
    return figure


def kept_points(curve: MemoryCurve) -> NDArray[np.int64]:
    """At most a few thousand points: the first, the last, and of each stretch of time the highest and lowest total."""
    total = curve.bytes.sum(axis=0)
    count = len(total)
    if count <= 2 * _BINS:
        return np.arange(count)
    edges = np.linspace(0, count, _BINS + 1).astype(np.int64)
    kept = {0, count - 1, int(total.argmax())}
    for low, high in pairwise(edges.tolist()):
        kept |= {int(low + total[low:high].argmax()), int(low + total[low:high].argmin())}
    return np.array(sorted(kept))
