"""The parts of a step's time, and the parts of its peak memory, as lists whose shares sum to 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cosim.report.words import name_of, plain_line
from cosim.result import Result

_ORDER = ("compute", "optimizer", "exposed_communication", "host", "bubble")
_UNNOTICEABLE = 1e-3
"""A remainder of the step time below this share is rounding."""


@dataclass(frozen=True, slots=True)
class Part:
    """One part: seconds or bytes, and its share of the whole; `key` is the part's own name in the result."""

    group: str
    key: str
    amount: float
    share: float

    @property
    def name(self) -> str:
        return plain_line(name_of(self.key))


def time_parts(result: Result) -> tuple[Part, ...]:
    """Parts of the step time in seconds, groups in a fixed order, largest first within; shares sum to 1."""
    breakdown = result.time_breakdown_s
    rows: list[tuple[str, str, float]] = []
    for group in [*_ORDER, *(key for key in breakdown if key not in _ORDER)]:
        value = breakdown.get(group, 0.0)
        parts = value if isinstance(value, Mapping) else {group: value}
        rows += [
            (group, str(key), float(s)) for key, s in sorted(parts.items(), key=lambda item: -float(item[1])) if s > 0
        ]
    rest = result.step_time_s - sum(amount for _, _, amount in rows)
    if rest > _UNNOTICEABLE * result.step_time_s:
        rows.append(("other", "other", rest))
    return _with_shares(rows)


def memory_parts(result: Result) -> tuple[Part, ...]:
    """Parts of the worst rank's peak memory in bytes, in the order of the result; shares sum to 1."""
    return _with_shares([("memory", str(key), float(size)) for key, size in result.memory_bytes.items() if size > 0])


def grouped(parts: tuple[Part, ...]) -> list[tuple[str, float, float, tuple[Part, ...]]]:
    """(group, amount, share, its parts), in order."""
    names = list(dict.fromkeys(part.group for part in parts))
    groups = [(name, tuple(part for part in parts if part.group == name)) for name in names]
    return [(name, sum(p.amount for p in inner), sum(p.share for p in inner), inner) for name, inner in groups]


def _with_shares(rows: list[tuple[str, str, float]]) -> tuple[Part, ...]:
    total = sum(amount for _, _, amount in rows)
    return tuple(Part(group, key, amount, amount / total) for group, key, amount in rows)
