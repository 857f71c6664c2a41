"""Colours by meaning: compute is blue to green, communication orange, the rest quiet.

Blue against orange survives every common colour deficiency; within a family lightness tells parts apart. All are
readable on white and on near-black.
"""

from __future__ import annotations

from collections.abc import Mapping

IDLE = "rgba(130,140,155,0.30)"
ACCENT = "#d1495b"

_COLORS: Mapping[str, str] = {
    # compute, by op class
    "matmul": "#2166ac",
    "attention": "#5aa9e6",
    "attention_backward": "#3b8bd0",
    "convolution": "#174a7c",
    "norm": "#59b3a4",
    "norm_backward": "#2f8f80",
    "softmax": "#1b7065",
    "softmax_backward": "#135850",
    "pointwise": "#8fd0c4",
    "reduction": "#a8c3b4",
    "loss": "#6f9c8c",
    "copy": "#9fb3c8",
    "gather": "#7b93ad",
    "scatter": "#647d98",
    "fill": "#b9c7d6",
    "random": "#c5d3c0",
    "unknown": "#8a8f98",
    # compute, by phase
    "forward": "#5aa9e6",
    "backward": "#3fa37c",
    "input_gradient": "#3fa37c",
    "weight_gradient": "#a9c94f",
    "recompute": "#1b7065",
    "compute": "#2166ac",
    "optimizer": "#8c6bb1",
    # communication
    "all_gather": "#f2a33a",
    "reduce_scatter": "#d9691e",
    "all_reduce": "#b84c12",
    "all_to_all": "#f6c667",
    "send_recv": "#93400d",
    "broadcast": "#e58a4e",
    "interference": "#cf9a8b",
    # the rest
    "host": "#7d8590",
    "launch": "#7d8590",
    "bubble": "#c3c9d2",
    "other": "#a7adb7",
    "idle": IDLE,
    # memory
    "weights": "#2166ac",
    "gradients": "#f2a33a",
    "activations": "#59b3a4",
    "temporary": "#9fb3c8",
    "inputs": "#f6c667",
    "framework": "#7d8590",
}
_COMMUNICATION = ("#f2a33a", "#d9691e", "#b84c12", "#f6c667", "#93400d", "#e58a4e")
_COMPUTE = ("#3b8bd0", "#2f8f80", "#7b93ad", "#6f9c8c", "#174a7c", "#a8c3b4")


def color_of(key: str, *, communication: bool = False) -> str:
    """The colour of an op class, phase, collective or memory category; an unknown one gets one of its family's."""
    if key in _COLORS:
        return _COLORS[key]
    family = _COMMUNICATION if communication else _COMPUTE
    return family[sum(map(ord, key)) % len(family)]


def lighter(color: str, share: float) -> str:
    """A "#rrggbb" colour mixed with `share` (0 to 1) of white."""
    channels = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(c + (255 - c) * share):02x}" for c in channels)


def ink_on(color: str) -> str:
    """Dark or white text, whichever contrasts more with a "#rrggbb" colour (contrast ratio as WCAG 2 defines it)."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#ffffff" if 1.05 / (luminance + 0.05) >= (luminance + 0.05) / 0.05 else "#1b2430"
