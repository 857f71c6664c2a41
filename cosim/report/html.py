"""A result as one page that needs nothing else: headlines, where time and memory go, what the answer rests on."""

from __future__ import annotations

import base64
import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosim.output import whole_file
from cosim.report import tables, words
from cosim.report.communication import traffic
from cosim.report.figures.breakdown import breakdown_figure
from cosim.report.figures.lanes import Lanes, build_lanes
from cosim.report.figures.memory import memory_figure
from cosim.report.figures.pipeline import pipeline_figure, pipeline_lanes, pipeline_lookup, ranks_of
from cosim.report.figures.roofline import roofline_figure
from cosim.report.figures.timeline import lookup_of, timeline_figure
from cosim.report.rank_memory import peaks
from cosim.result import Detail, Result

if TYPE_CHECKING:
    import plotly.graph_objects as go


def write_html(result: Result, path: str | Path) -> None:
    """Writes the report of `result` to `path`: about 5 MB, most of it plotly, which is inside the page.

    Without `result.detail` the figures that need it are left out. The page loads nothing from
    anywhere, and its content security policy lets only its own two scripts run.

    Raises InputError: `path` cannot be written; then nothing is left behind.
    """
    with whole_file(Path(path), "report") as written:
        written.write_text(page(result), encoding="utf-8")


def page(result: Result) -> str:
    """The page as text."""
    from plotly.offline import get_plotlyjs

    figures = {"breakdown": breakdown_figure(result)}
    lookups: dict[str, Any] = {}
    lanes: Lanes | None = None
    if result.detail is not None:
        program, timeline = result.detail.program, result.detail.timeline
        several = ranks_of(program) > 1
        lanes = build_lanes(program, timeline, device=result.worst_rank if several else None)
        lookups["timeline"] = lookup_of(lanes)
        if several:
            passes = pipeline_lanes(program, timeline)
            figures["pipeline"], lookups["pipeline"] = pipeline_figure(passes), pipeline_lookup(passes)
        figures["timeline"] = timeline_figure(lanes)
        figures["memory"] = memory_figure(result, result.detail.memory)
        figures["roofline"] = roofline_figure(result, result.detail.roofline, result.detail.ops)
    plotly, script = get_plotlyjs(), _part("page.js")
    allowed = " ".join(_fingerprint(text) for text in (plotly, script))
    policy = f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"
    title = tables.escaped(f"{words.model_name(result)} on {words.machine(result)}")
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title>",
            f"<style>{_part('page.css')}</style></head><body><main>",
            tables.header(result),
            tables.misfit(result),
            tables.cards(result),
            tables.warnings(result),
            *_sections(result, lanes),
            "<footer>Simulated by cosim; no step of this run was executed.</footer>",
            '</main><div id="tip" hidden></div>',
            f'<script type="application/json" id="figures">{_figures_json(figures)}</script>',
            f'<script type="application/json" id="tasks">{_json(lookups)}</script>',
            f"<script>{plotly}</script>",
            f"<script>{script}</script>",
            "</body></html>",
            "",
        ]
    )


def _sections(result: Result, lanes: Lanes | None) -> list[str]:
    step = words.seconds(result.step_time_s)
    breakdown = _figure("breakdown") + tables.breakdown_table(result)
    sections = [_section("Where the time of a step goes", f"The parts sum to the step time of {step}.", breakdown)]
    detail = result.detail
    if detail is not None and lanes is not None:
        memory = f'<div class="beside">{_figure("memory")}{tables.memory_table(result)}</div>'
        roofline = f'<div class="beside">{_figure("roofline")}{tables.limits_table(detail.ops)}</div>'
        peak = result.peak_memory_bytes / 2**30
        zoom = f'<button class="switch" id="memory-scale" aria-pressed="false" data-peak="{peak:.4f}">'
        zoom += "Scale to peak</button>"
        find = '<input class="filter" type="search" placeholder="Filter: module, op, phase" aria-label="Filter ops">'
        several = ranks_of(detail.program) > 1
        if several:
            sections.append(_section("Pipeline", _pipeline_words(result), _figure("pipeline")))
        rows = traffic(result)
        if rows:
            sections.append(_section("Communication", _TRAFFIC_WORDS, tables.traffic_table(result, rows)))
        streams = f"Streams of rank {result.worst_rank} over time" if several else "Streams over time"
        sections += [
            _section(streams, _timeline_words(detail, lanes), _figure("timeline")),
            _section("Memory over time", _memory_words(result), memory, zoom),
            _section("Roofline", _ROOFLINE_WORDS, roofline),
            _section(
                "Most expensive ops",
                _OPS_WORDS,
                f'<div class="scroll">{tables.ops_table(result, detail.ops)}</div>',
                find,
            ),
        ]
    return [*sections, _section("What this answer rests on", "", tables.details(result))]


_ROOFLINE_WORDS = (
    "A point is all ops of one kind, shape and phase; its area is the time they take. Far below a ceiling: time that "
    "a better kernel or fusion could save."
)
_TRAFFIC_WORDS = (
    "Per step and rank, on average over pipeline ranks. Bytes are full buffers: of an all-gather what all ranks have "
    "after it. Exposed is the part of its time in which compute waits. A gather without a time is part of messages."
)
_OPS_WORDS = "Time of all of them in one step, each alone on the device."


def _pipeline_words(result: Result) -> str:
    bubble = float(result.time_breakdown_s.get("bubble", 0.0))
    share = bubble / result.step_time_s if result.step_time_s > 0 else 0.0
    schedule = words.plain_line(words.looked_up(result.spec, "parallel.schedule", "1f1b"))
    took = f"{words.seconds(bubble)} of a rank, {words.percent(share)} of the step, on average"
    return (
        f"Ranks by time under {schedule}; numbers are micro-batches, and lighter boxes later chunks of a rank. The "
        f"bubble, waiting for what other ranks compute, takes {took}."
    )


def _memory_words(result: Result) -> str:
    held = [words.memory(peak) for peak in peaks(result)]
    others = f" Peaks of ranks 0 to {len(held) - 1}: {', '.join(held)}." if held else ""
    return f"Of rank {result.worst_rank}, which needs the most.{others}"


def _timeline_words(detail: Detail, lanes: Lanes) -> str:
    said = [f"Compute idles {words.percent(lanes.idle_share)} of the time (grey)." if lanes.lanes else "No tasks."]
    if detail.micro_steps_played < detail.micro_steps:
        said.append(
            f"{detail.micro_steps_played} of {detail.micro_steps} micro-steps are drawn; the others repeat them."
        )
    if lanes.merged:
        said.append("Neighbouring tasks too short to see are drawn as one.")
    said.append("Drag to zoom, double-click to see all.")
    return " ".join(said)


def _section(title: str, caption: str, body: str, control: str = "") -> str:
    said = f"<p>{tables.escaped(caption)}</p>" if caption else ""
    return f"<section><header><h2>{title}</h2>{said}{control}</header>{body}</section>"


def _figure(name: str) -> str:
    return f'<div class="figure" id="figure-{name}"></div>'


def _figures_json(figures: dict[str, go.Figure]) -> str:
    inner = ",".join(f"{json.dumps(name)}:{figure.to_json()}" for name, figure in figures.items())
    return _inert("{" + inner + "}")


def _json(value: object) -> str:
    return _inert(json.dumps(value, separators=(",", ":"), allow_nan=False))


def _inert(text: str) -> str:
    """JSON that cannot end the script element that holds it."""
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _part(name: str) -> str:
    return resources.files("cosim.report").joinpath(name).read_text(encoding="utf-8")


def _fingerprint(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
