"""The parts of the page that are not figures, as HTML: cards, tables, notes. Every text is escaped here."""

from __future__ import annotations

import html
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cosim.report import words
from cosim.report.breakdown import Part, grouped, memory_parts, time_parts
from cosim.report.communication import Traffic
from cosim.report.figures.palette import color_of
from cosim.result import OpRow, Result

_OPS_SHOWN = 400


def escaped(text: object) -> str:
    """`text` on one line, safe inside an element or a quoted attribute."""
    return html.escape(words.plain_line(text))


def header(result: Result) -> str:
    """The run in words."""
    facts = "".join(
        f"<div><dt>{escaped(what)}</dt><dd>{escaped(value)}</dd></div>" for what, value in words.facts(result)
    )
    title = f"{escaped(words.model_name(result))} <span>on</span> {escaped(words.machine(result))}"
    return f'<header><p class="over">Simulated training step</p><h1>{title}</h1><dl class="facts">{facts}</dl></header>'


def misfit(result: Result) -> str:
    """That the run does not fit, by how much, and what would make it fit; nothing if it does."""
    if result.feasible:
        return ""
    what, colon, why = words.verdict(result).partition(": ")
    return f'<div class="banner bad"><b>{escaped(what.capitalize())}{colon}</b>{escaped(why)}</div>'


def warnings(result: Result) -> str:
    """The warnings, where they are not overlooked."""
    if not result.warnings:
        return ""
    items = "".join(f"<li>{escaped(text)}</li>" for text in result.warnings)
    return f'<div class="banner warn"><b>Warnings</b><ul>{items}</ul></div>'


def cards(result: Result) -> str:
    """The headline numbers."""
    run = result.run or {}
    interval = ""
    if result.step_time_interval_s is not None:
        low, high = result.step_time_interval_s
        interval = f"{words.seconds(low)} to {words.seconds(high)}"
    if result.anchor_factor is not None:
        interval += f"{'; ' if interval else ''}anchored, factor {result.anchor_factor:.3f}"
    whole = {key: f"run: {say(run[key])}" if run.get(key) is not None else "" for key, say in _RUN_WORDS.items()}
    tokens_per_s = f"{words.rate(result.tokens_per_s)} on all devices"
    return "".join(
        [
            '<div class="cards">',
            _card("Step time", words.seconds(result.step_time_s), interval, whole["time_s"]),
            _card("Tokens/s per device", words.rate(result.tokens_per_s_per_device), tokens_per_s),
            _card("MFU", words.percent(result.mfu), f"HFU {words.percent(result.hfu)}"),
            _memory_card(result),
            _card("Energy per step", words.energy(result.energy_j), whole["energy_j"]),
            _card("Cost per step", words.money(result.cost_usd), whole["cost_usd"]),
            _card("Limited by", result.limited_by, f"clock {words.clock(result.clock_hz)}", style="value words"),
            "</div>",
        ]
    )


_RUN_WORDS: Mapping[str, Any] = {"time_s": words.seconds, "energy_j": words.energy, "cost_usd": words.money}


def _card(what: str, value: str, *notes: str, style: str = "value") -> str:
    lines = "".join(f'<div class="note">{escaped(note)}</div>' for note in notes if note)
    said = f'<div class="what">{what}</div><div class="{style}">{_with_unit(value, style)}</div>'
    return f'<div class="card">{said}{lines}</div>'


def _with_unit(value: str, style: str) -> str:
    number, space, unit = value.partition(" ")
    if style != "value" or not space or not any(char.isdigit() for char in number):
        return escaped(value)
    return f"{escaped(number)} <small>{escaped(unit)}</small>"


def _memory_card(result: Result) -> str:
    peak, capacity = result.peak_memory_bytes, result.memory_capacity_bytes
    share = peak / capacity if capacity > 0 else 1.0
    bad = "" if result.feasible else " over-capacity"
    fits = "fits" if result.feasible else "does not fit"
    return (
        f'<div class="card{bad}"><div class="what">Peak memory</div>'
        f'<div class="value">{_with_unit(words.memory(peak), "value")}</div>'
        f'<div class="gauge"><i style="width:{100 * min(1.0, share):.1f}%"></i></div>'
        f'<div class="note">{fits}: {words.percent(share)} of {escaped(words.memory(capacity))}</div></div>'
    )


def breakdown_table(result: Result) -> str:
    """The parts of the step time with a bar for each share: compute on one side, all else on the other."""
    parts = time_parts(result)
    most = max((part.share for part in parts), default=1.0)
    sides: list[list[str]] = [[], []]
    for group, amount, share, inner in grouped(parts):
        communication = group == "exposed_communication"
        lone = len(inner) == 1 and inner[0].key == group
        name = escaped(words.name_of(group))
        title = f'<th class="name" colspan="2">{name}</th>'
        if lone:
            title = f'<th class="name">{_swatch(color_of(group))}{name}</th>{_bar(inner[0], most)}'
        numbers = "".join(f'<th class="number">{text}</th>' for text in (words.seconds(amount), words.percent(share)))
        head = f"<tr>{title}{numbers}</tr>"
        body = "" if lone else _part_rows(inner, words.seconds, most, communication)
        sides[group != "compute"].append(f'<table class="parts"><thead>{head}</thead><tbody>{body}</tbody></table>')
    return f'<div class="groups">{"".join(f"<div>{chr(10).join(side)}</div>" for side in sides)}</div>'


def _part_rows(parts: Iterable[Part], say: Any, most: float = 0.0, communication: bool = False) -> str:
    """Rows of swatch and name, a bar (where `most`, the share that fills it, is given), amount and share."""
    rows = []
    for part in parts:
        swatch = _swatch(color_of(part.key, communication=communication))
        bar = _bar(part, most, communication) if most else ""
        rows.append(
            f'<tr><td class="name">{swatch}{escaped(part.name)}</td>{bar}'
            f'<td class="number">{say(part.amount)}</td><td class="number">{words.percent(part.share)}</td></tr>'
        )
    return "".join(rows)


def _bar(part: Part, most: float, communication: bool = False) -> str:
    color = color_of(part.key, communication=communication)
    width = 100 * part.share / most if most > 0 else 0.0
    return f'<td class="bar"><i style="width:{width:.1f}%;background:{color}"></i></td>'


def _swatch(color: str) -> str:
    return f'<i class="swatch" style="background:{color}"></i>'


_TRAFFIC_COLUMNS = (
    ("collective", ""),
    ("group", ""),
    ("ranks", "number"),
    ("where", ""),
    ("calls", "number"),
    ("bytes", "number"),
    ("time", "number"),
    ("exposed", "number"),
)


def traffic_table(result: Result, rows: Sequence[Traffic]) -> str:
    """Communication by group and kind, with where it goes and how much of it compute waits for."""
    exposed = result.time_breakdown_s.get("exposed_communication", {})
    body = ""
    for row in rows:
        said = _exposed(row, rows, exposed)
        swatch = _swatch(color_of(row.kind, communication=True))
        body += (
            f'<tr><td class="name">{swatch}{escaped(words.name_of(row.kind))}</td><td>{escaped(row.group)}</td>'
            f'<td class="number">{row.ranks:,}</td><td>{"across nodes" if row.crosses else "inside a node"}</td>'
            f'<td class="number">{words.rate(row.calls)}</td><td class="number">{words.memory(row.bytes)}</td>'
            f'<td class="number">{words.seconds(row.time_s) if row.time_s else "–"}</td>'
            f'<td class="number">{said}</td></tr>'
        )
    heads = "".join(f'<th class="{style}">{name}</th>' for name, style in _TRAFFIC_COLUMNS)
    table = f'<table class="parts traffic"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="wide">{table}</div>'


def _exposed(row: Traffic, rows: Sequence[Traffic], exposed: Mapping[str, float]) -> str:
    """What compute waits for it; at most that, where the breakdown adds up several groups."""
    own = f"{row.group} {row.kind}"
    if own in exposed:
        return words.seconds(exposed[own])
    if not row.time_s:
        return "–"
    together, waited = [other for other in rows if other.kind == row.kind and other.time_s], exposed.get(row.kind, 0.0)
    alone = all(other is row or f"{other.group} {other.kind}" in exposed for other in together)
    return words.seconds(waited) if alone else f"≤ {words.seconds(min(waited, row.time_s))}"


def memory_table(result: Result) -> str:
    """The parts of the peak."""
    return (
        f'<table class="parts"><thead><tr><th colspan="3">At the peak, on rank {result.worst_rank}</th></tr></thead>'
        f"<tbody>{_part_rows(memory_parts(result), words.memory)}</tbody>"
        f'<tfoot><tr><td>peak</td><td class="number">{words.memory(result.peak_memory_bytes)}</td>'
        f'<td class="number">{words.percent(1.0)}</td></tr></tfoot></table>'
    )


def limits_table(ops: Iterable[OpRow]) -> str:
    """What limits the ops, by the time that they take alone."""
    times: dict[str, float] = defaultdict(float)
    for row in ops:
        times[row.limited_by] += row.time_s
    total = sum(times.values()) or 1.0
    rows = "".join(
        f'<tr><td class="name">{escaped(name)}</td><td class="number">{words.seconds(time)}</td>'
        f'<td class="number">{words.percent(time / total)}</td></tr>'
        for name, time in sorted(times.items(), key=lambda item: -item[1])
    )
    return (
        f'<table class="parts"><thead><tr><th colspan="3">Ops limited by</th></tr></thead><tbody>{rows}</tbody></table>'
    )


_COLUMNS = (
    ("module", ""),
    ("op", ""),
    ("phase", ""),
    ("shape", ""),
    ("count", "number"),
    ("time", "number"),
    ("share of step", "number"),
    ("FLOP/s", "number"),
    ("bytes/s", "number"),
    ("limited by", ""),
)


def ops_table(result: Result, ops: Iterable[OpRow]) -> str:
    """The most expensive ops, to be sorted and filtered by the page's script."""
    rows = sorted(ops, key=lambda row: -row.time_s)[:_OPS_SHOWN]
    heads = "".join(
        f'<th class="{style}"{_DESCENDING if name == "time" else ""}><button type="button">{name}</button></th>'
        for name, style in _COLUMNS
    )
    most = max((row.time_s for row in rows), default=1.0) or 1.0
    body = "".join(_op_row(row, result.step_time_s, most) for row in rows)
    return f'<table class="ops"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>'


_DESCENDING = ' aria-sort="descending"'


def _op_row(row: OpRow, step_time_s: float, most_time_s: float) -> str:
    share = row.time_s / step_time_s if step_time_s > 0 else 0.0
    flops = row.flops / row.time_s if row.time_s > 0 else 0.0
    rate = row.hbm_bytes / row.time_s if row.time_s > 0 else 0.0
    module = _breakable(row.module or "(no module)")
    return (
        f'<tr><td class="name">{module}</td><td class="name">{_breakable(row.target)}</td>'
        f'<td>{escaped(row.phase)}</td><td class="shape">{escaped(words.shape(row.shape))}</td>'
        + _number_cell(row.count, f"{row.count:,}")
        + _number_cell(row.time_s, words.seconds(row.time_s))
        + _number_cell(share, words.percent(share), f' style="--part:{row.time_s / most_time_s:.4f}"')
        + _number_cell(flops, words.flops_rate(flops) if flops else "–")
        + _number_cell(rate, words.bytes_rate(rate) if rate else "–")
        + f"<td>{escaped(row.limited_by)}</td></tr>"
    )


def _breakable(name: str) -> str:
    """A dotted name that may be broken after its dots and underscores."""
    return escaped(name).replace(".", ".<wbr>").replace("_", "_<wbr>")


def _number_cell(value: float, text: str, style: str = "") -> str:
    """A cell that is sorted by `value`; with a `style`, one with a bar behind its text."""
    return f'<td class="number{" share" if style else ""}"{style} data-value="{float(value)!r}">{text}</td>'


def details(result: Result) -> str:
    """The run file with its defaults, and what the answer rests on."""
    import yaml

    echoed = yaml.safe_dump(result.to_json()["spec"], sort_keys=False, allow_unicode=True)
    unknown = [f"{op.get('target')}: {op.get('count')} times{_share_of(op)}" for op in result.unknown_ops]
    status = [str(result.calibration["status"])] if result.calibration.get("status") else []
    lists = [
        ("Assumed, because no source says otherwise", list(result.assumed)),
        ("Extrapolated beyond what the model was checked on", list(result.extrapolated)),
        ("Calibration", status),
        ("Ops not in the vocabulary, priced by the bytes that they move", unknown),
        ("Warnings", list(result.warnings)),
    ]
    notes = "".join(
        f"<h3>{title}</h3><ul>{''.join(f'<li>{escaped(text)}</li>' for text in (texts or ['none']))}</ul>"
        for title, texts in lists
    )
    return (
        f'<div class="details"><div><h3>The run file, defaults filled in</h3><pre>{html.escape(echoed)}</pre></div>'
        f'<div class="notes">{notes}</div></div>{_provenance(result.calibration.get("provenance"))}'
    )


def _provenance(provenance: object) -> str:
    """Where the accelerator's numbers come from: entries with a path as a table, others as they are."""
    entries = list(provenance) if isinstance(provenance, list | tuple) else [provenance] if provenance else []
    if not entries:
        return ""
    rows = []
    for entry in entries:
        if isinstance(entry, Mapping):
            kind, text = (escaped(words.name_of(str(entry.get(key, "")))) for key in ("kind", "text"))
            cells = [_breakable(str(entry.get("path", ""))), escaped(entry.get("value", "")), kind, text]
        else:
            cells = ["", "", "", escaped(entry)]
        rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    heads = "".join(f"<th>{name}</th>" for name in ("number", "value", "how known", "where from"))
    table = f'<table class="sources"><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    title = f"Where the accelerator's numbers come from ({len(entries)})"
    return f'<details><summary>{title}</summary><div class="wide">{table}</div></details>'


def _share_of(op: Mapping[str, Any]) -> str:
    share = op.get("share")
    return f", {100 * share:.2g} % of the step" if isinstance(share, int | float) else ""
