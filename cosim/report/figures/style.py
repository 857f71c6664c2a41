"""What the figures have in common: no background of their own, quiet axes, text from users made harmless."""

from __future__ import annotations

import html
from typing import Any

from cosim.report.words import plain_line

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_LONGEST = 80


def layout(height: int, **more: Any) -> dict[str, Any]:
    """A plotly layout; the page's script adds the colours of text and grid."""
    base: dict[str, Any] = {
        "height": height,
        "autosize": True,
        "template": "none",
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": FONT, "size": 12},
        "margin": {"l": 64, "r": 40, "t": 12, "b": 44},
        "hoverlabel": {"font": {"family": FONT, "size": 12}, "align": "left"},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
    }
    return base | more


def axis(title: str = "", **more: Any) -> dict[str, Any]:
    """A plotly axis with a quiet grid."""
    base: dict[str, Any] = {
        "title": {"text": title, "standoff": 10},
        "zeroline": False,
        "ticks": "",
        "automargin": True,
    }
    return base | more


def harmless(text: object) -> str:
    """`text` as plotly shows it literally: one line, no markup, not longer than fits."""
    line = plain_line(text)
    return html.escape(line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…", quote=False)
