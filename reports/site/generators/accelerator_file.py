"""The accelerator file's reference: every key that is read when the library is loaded, with its unit and default.

The keys, units, bounds and defaults are noted while the files are read; only the meanings are written here.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from generators.accelerator_meanings import DEFAULTS, MEANINGS
from generators.markdown import code, table
from hwmodels import accelerator
from hwmodels.catalog import load_raw, names
from hwmodels.matrix_units.attention import ALGORITHMS
from hwmodels.number_formats import FORMATS
from hwmodels.parameters import NOTES, Section
from hwmodels.power import LEVELS
from hwmodels.units import _EXAMPLES, format_quantity

_PLACEHOLDERS = ((frozenset(FORMATS), "FORMAT"), (frozenset(LEVELS), "LEVEL"), (frozenset(ALGORITHMS), "ALGORITHM"))


@dataclass(frozen=True, slots=True)
class Key:
    """One key of the file: what it holds, and what holds where it is left out (None: it has to be there)."""

    holds: str
    default: str


def found() -> dict[str, Key]:
    """Every key that the readers ask for while the library is loaded; names of formats and algorithms are general."""
    keys: dict[str, Key] = {}
    with _noting(keys):
        for name in names():
            accelerator.load(name)
    return keys


def keys() -> str:
    """A table for each part of the file."""
    parts: dict[str, list[list[str]]] = {}
    for path, key in found().items():
        part, _, name = path.rpartition(".")
        parts.setdefault(part, []).append(
            [code(name), MEANINGS.get(path, ""), key.holds, DEFAULTS.get(path, key.default)]
        )
    titles = {part: part or "the top level" for part in sorted(parts, key=_order)}
    header = ("key", "meaning", "holds", "default")
    return "\n\n".join(f"### {title}\n\n{table(header, parts[part])}" for part, title in titles.items())


def calibrated() -> str:
    """For each chip of the library, its fitted constants: how many, on which measurements, with which error."""
    rows = []
    for name in names():
        basis: dict[str, list[Mapping[str, Any]]] = {}
        for leaf in _leaves(load_raw(name).get("calibration") or {}):
            basis.setdefault(str(leaf["fitted_on"]), []).append(leaf)
        if not basis:
            rows.append([code(name), "nothing: its family's defaults, and the result says so", "", "", ""])
        for text, fitted in basis.items():
            held_out = [leaf["error_held_out"] for leaf in fitted if "error_held_out" in leaf]
            error = f"{100 * float(held_out[0]):.1f} %" if held_out else "—"
            rows.append([code(name), text, str(fitted[0].get("rows", "—")), str(len(fitted)), error])
    return table(("accelerator", "fitted on", "rows", "constants", "held-out error"), rows)


def _leaves(tree: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if "fitted_on" in tree and "value" in tree:
        yield tree
    for value in tree.values():
        if isinstance(value, Mapping):
            yield from _leaves(value)


def _order(part: str) -> tuple[int, str]:
    order = ("", "matrix", "vector", "special_function", "memory", "links", "power", "price", "peaks", "calibration")
    top = part.partition(".")[0]
    return (order.index(top) if top in order else len(order) - 1, part)


def _general(path: str) -> str:
    words = re.sub(r"\[\d+\]", "", path).split(".")  # one of several levels or units is explained once
    for number, word in enumerate(words):
        for known, placeholder in _PLACEHOLDERS:
            parent = words[number - 1] if number else ""
            fits = parent in ("formats", "block_scaled", "peaks", "energy_per_flop", "energy_per_byte", "attention")
            if fits and word in known:
                words[number] = placeholder
            elif parent == "links":
                words[number] = "TIER"
    return ".".join(words)


@contextmanager
def _noting(keys: dict[str, Key]) -> Iterator[None]:
    """While open, whatever is read from a section is noted in `keys`."""

    def note(section: Section, key: str, holds: str, default: object, shown: str = "") -> None:
        path = _general(section.at(key).rpartition(": ")[2])
        if path == "matrix.rows" or path.rpartition(".")[2] not in NOTES:  # `rows` elsewhere: how many were fitted on
            keys.setdefault(path, Key(holds, shown or ("**required**" if default is None else code(default))))

    read_quantity, read_number, read_integer = Section.quantity, Section.number, Section.integer
    read_text, read_table, read_flag = Section.text, Section.table, Section.flag

    def quantity(self: Section, key: str, dimension: str, default: float | None = None, zero: bool = False) -> float:
        shown = "" if default is None else code(format_quantity(default, dimension))
        note(self, key, f"{dimension.replace('_', ' ')}, `{_EXAMPLES[dimension]}`", default, shown)
        return read_quantity(self, key, dimension, default, zero)

    def number(self: Section, key: str, default: float | None = None, **bounds: Any) -> float:
        note(self, key, _between("number", bounds), default)
        return read_number(self, key, default, **bounds)

    def integer(self: Section, key: str, default: int | None = None, **bounds: Any) -> int:
        note(self, key, _between("whole number", bounds), default)
        return read_integer(self, key, default, **bounds)

    def text(self: Section, key: str, default: str | None = None, choices: tuple[str, ...] = ()) -> str:
        note(self, key, " ".join(map(code, choices)) or "text", default, "—" if default == "" else "")
        return read_text(self, key, default, choices)

    def flag(self: Section, key: str, default: bool) -> bool:
        note(self, key, "true or false", default, code(str(default).lower()))
        return read_flag(self, key, default)

    def formats(self: Section, key: str, allowed: tuple[str, ...], required: bool = False) -> dict[str, float]:
        note(self, key, "number by format", None if required else "", "" if required else "none")
        return read_table(self, key, allowed, required)

    with (
        patch.object(Section, "quantity", quantity),
        patch.object(Section, "number", number),
        patch.object(Section, "integer", integer),
        patch.object(Section, "text", text),
        patch.object(Section, "flag", flag),
        patch.object(Section, "table", formats),
    ):
        yield


def _between(kind: str, bounds: Mapping[str, Any]) -> str:
    high = bounds.get("high")
    return f"{kind} ≤ {high:g}" if high else kind
