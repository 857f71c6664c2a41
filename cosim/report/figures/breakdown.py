"""The step as one bar: what its time is spent on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cosim.report.breakdown import time_parts
from cosim.report.figures.palette import color_of, ink_on
from cosim.report.figures.style import axis, harmless, layout
from cosim.report.words import name_of, percent, seconds
from cosim.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go


def breakdown_figure(result: Result) -> go.Figure:
    """One stacked bar of all parts of the step time, in seconds."""
    import plotly.graph_objects as go

    bars = []
    for part in time_parts(result):
        color = color_of(part.key, communication=part.group == "exposed_communication")
        bars.append(
            go.Bar(
                x=[part.amount],
                y=[""],
                orientation="h",
                name=harmless(part.name),
                marker={"color": color},
                text=[f"{harmless(part.name)}<br>{percent(part.share)}"],
                textposition="inside",
                insidetextanchor="middle",
                textangle=0,
                insidetextfont={"color": ink_on(color), "size": 12},
                hovertext=[
                    f"{name_of(part.group)}: {harmless(part.name)}<br>{seconds(part.amount)}, {percent(part.share)}"
                ],
                hoverinfo="text",
                meta={"outline": "surface"},
            )
        )
    return go.Figure(
        bars,
        layout(
            108,
            barmode="stack",
            bargap=0.0,
            showlegend=False,
            uniformtext={"minsize": 12, "mode": "hide"},
            margin={"l": 2, "r": 2, "t": 4, "b": 34},
            xaxis=axis(tickformat="~s", ticksuffix="s", range=[0, result.step_time_s], fixedrange=True, showgrid=False),
            yaxis=axis(visible=False, fixedrange=True),
        ),
    )
