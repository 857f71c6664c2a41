"""The rectangles of the timeline: what each stream does when, where compute waits, with tasks too small to see merged.

Times are seconds from the beginning of the step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cosim.engine.program import PICOSECONDS_PER_S, Label, Program, Stream, Timeline
from cosim.report.words import name_of, plain_line, seconds

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
MOST_RECTANGLES = 20_000
_FINEST = 5e-6
"""Tasks and gaps shorter than this share of the step are merged first: a hundredth of a pixel on a wide screen."""
_ORDER = {"compute": 0, "communication": 1, "copy-in": 2, "copy-out": 3, "host": 9}
_IDLE_DRAWN_FROM = 1e-3
"""Shortest stretch without compute that is drawn, as a share of the step."""


@dataclass(frozen=True, slots=True)
class Lane:
    """One stream's rectangles in order of time; `key` and `text` index those of `Lanes`; `tasks` share a rectangle."""

    name: str
    device: int
    kind: str
    start_s: Floats
    end_s: Floats
    key: Indices
    text: Indices
    tasks: Indices

    def __len__(self) -> int:
        return len(self.start_s)


@dataclass(frozen=True, slots=True)
class Lanes:
    """All lanes; `keys` decide colours, `texts` say what a task is; `idle_share` is of compute streams, 0 to 1."""

    lanes: tuple[Lane, ...]
    keys: tuple[str, ...]
    texts: tuple[str, ...]
    end_s: float
    idle_share: float
    merged: bool


def build_lanes(program: Program, timeline: Timeline, most: int = MOST_RECTANGLES, device: int | None = None) -> Lanes:
    """What is drawn of a played program, or of one device of it; at most about `most` rectangles."""
    start, end = timeline.start_ps / PICOSECONDS_PER_S, timeline.end_ps / PICOSECONDS_PER_S
    total = float(end.max(initial=0.0))
    keys, texts = _Numbers(), _Numbers()
    label_key = np.array([keys.of(_key(label)) for label in program.labels], dtype=np.int64)
    label_text = np.array([texts.of(_text(label)) for label in program.labels], dtype=np.int64)
    raw: list[Lane] = []
    for number, stream in _ordered(program, device):
        mine = np.flatnonzero((program.stream == number) & (end > start))
        if len(mine):
            label = program.label[mine]
            raw.append(
                _lane(
                    stream.name, stream.device, stream.kind, start[mine], end[mine], label_key[label], label_text[label]
                )
            )
        issued = np.flatnonzero((program.host == number) & (program.launch_ps > 0))
        if len(issued):
            begin = timeline.issue_ps[issued] / PICOSECONDS_PER_S
            until = begin + program.launch_ps[issued] / PICOSECONDS_PER_S
            launch = np.full(len(issued), keys.of("launch"))
            raw.append(
                _lane(stream.name, stream.device, "host", begin, until, launch, label_text[program.label[issued]])
            )
    lanes, merged = fewer(raw, total, most)
    idle: list[float] = []
    final = []
    for lane, whole in zip(lanes, raw, strict=True):
        if lane.kind == "compute":
            others = [other for other in raw if other.device == lane.device and other.kind == "communication"]
            lane, waited = _with_idle(lane, whole, others, total, keys, texts)
            idle.append(waited)
        final.append(lane)
    share = float(np.mean(idle)) / total if idle and total > 0 else 0.0
    return Lanes(tuple(final), keys.names, texts.names, total, share, merged)


class _Numbers:
    """Names numbered in the order in which they are first asked for."""

    def __init__(self) -> None:
        self._number: dict[str, int] = {}

    def of(self, name: str) -> int:
        return self._number.setdefault(name, len(self._number))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._number)


def _key(label: Label) -> str:
    """What decides a task's colour: its kind, or the phase where the kind only says that it computes."""
    return label.phase if label.kind == "compute" and label.phase else label.kind


def _text(label: Label) -> str:
    """The label's name, with kind, phase and layer where the name does not say them."""
    said = plain_line(label.name)[:120]
    kind = "" if label.kind == "compute" else plain_line(name_of(label.kind))
    layer = f"layer {label.layer}" if label.layer >= 0 and str(label.layer) not in said else ""
    return ", ".join([said, *(word for word in (kind, plain_line(label.phase), layer) if word and word not in said)])


def _ordered(program: Program, device: int | None) -> list[tuple[int, Stream]]:
    numbered = [(n, stream) for n, stream in enumerate(program.streams) if device in (None, stream.device)]
    return sorted(numbered, key=lambda item: (item[1].device, _ORDER.get(item[1].kind, 5), item[0]))


def _lane(name: str, device: int, kind: str, start: Floats, end: Floats, key: Indices, text: Indices) -> Lane:
    order = np.argsort(start, kind="stable")
    ones = np.ones(len(start), dtype=np.int64)
    return Lane(plain_line(name), device, kind, start[order], end[order], key[order], text[order], ones)


def fewer(lanes: list[Lane], total: float, most: int) -> tuple[list[Lane], bool]:
    """Lanes with neighbours merged that are too short to see, coarser until there are few enough; whether any were."""
    share, same_key = _FINEST, True
    before = sum(map(len, lanes))
    while sum(map(len, lanes)) > most and share < 1:
        lanes = [merged(lane, share * total, same_key) for lane in lanes]
        share *= 2
        same_key = share < 1e-3
    return lanes, sum(map(len, lanes)) < before


def merged(lane: Lane, resolution_s: float, same_key: bool = True) -> Lane:
    """`lane` with runs of rectangles shorter and closer together than `resolution_s` as one, named by the longest."""
    if len(lane) < 2:
        return lane
    tiny = lane.end_s - lane.start_s < resolution_s
    joins = tiny[1:] & tiny[:-1] & (lane.start_s[1:] - lane.end_s[:-1] < resolution_s)
    if same_key:
        joins &= lane.key[1:] == lane.key[:-1]
    first = np.flatnonzero(np.concatenate([[True], ~joins]))
    last = np.concatenate([first[1:], [len(lane)]]) - 1
    run = np.repeat(np.arange(len(first)), last - first + 1)
    by_length = np.lexsort((-(lane.end_s - lane.start_s), run))
    longest = by_length[first]
    tasks = np.add.reduceat(lane.tasks, first)
    end = np.maximum.reduceat(lane.end_s, first)
    return Lane(
        lane.name, lane.device, lane.kind, lane.start_s[first], end, lane.key[longest], lane.text[longest], tasks
    )


def _with_idle(
    lane: Lane, whole: Lane, others: list[Lane], total: float, keys: _Numbers, texts: _Numbers
) -> tuple[Lane, float]:
    """`lane` with a rectangle where nothing computes, named by the communication under way; and the idle seconds."""
    begin = np.concatenate([[0.0], np.maximum.accumulate(whole.end_s)])
    until = np.concatenate([whole.start_s, [total]])
    gaps = until - begin
    seen = np.flatnonzero(gaps > _IDLE_DRAWN_FROM * total)
    names = [texts.of(_idle_text(float(begin[i]), float(until[i]), others, texts.names)) for i in seen]
    idle = _lane(
        lane.name,
        lane.device,
        lane.kind,
        np.concatenate([lane.start_s, begin[seen]]),
        np.concatenate([lane.end_s, until[seen]]),
        np.concatenate([lane.key, np.full(len(seen), keys.of("idle"))]),
        np.concatenate([lane.text, np.array(names, dtype=np.int64)]),
    )
    tasks = np.concatenate([lane.tasks, np.ones(len(seen), dtype=np.int64)])
    order = np.argsort(np.concatenate([lane.start_s, begin[seen]]), kind="stable")
    waited = float(gaps[gaps > 0].sum())
    return Lane(idle.name, idle.device, idle.kind, idle.start_s, idle.end_s, idle.key, idle.text, tasks[order]), waited


def _idle_text(begin: float, until: float, others: list[Lane], texts: tuple[str, ...]) -> str:
    """What is under way for the longest part of a gap in compute."""
    best, name = 0.0, ""
    for lane in others:
        low = max(0, int(np.searchsorted(lane.start_s, begin, side="right")) - 1)
        high = int(np.searchsorted(lane.start_s, until))
        if high <= low:
            continue
        overlap = np.minimum(lane.end_s[low:high], until) - np.maximum(lane.start_s[low:high], begin)
        longest = int(overlap.argmax())
        if overlap[longest] > best:
            best, name = float(overlap[longest]), texts[int(lane.text[low + longest])]
    if best < 0.5 * (until - begin):
        return "compute is idle"
    return f"compute is idle during {name} ({seconds(best)} of it)"
