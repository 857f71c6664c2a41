"""An accelerator in words: its parts, the peaks that follow from them, and machine balance."""

import dataclasses
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from hwmodels.accelerator import Accelerator
from hwmodels.area import Area
from hwmodels.catalog import si_value
from hwmodels.interconnect.links import Link
from hwmodels.matrix_units.systolic_array import SystolicArray
from hwmodels.matrix_units.unit import MatrixUnit
from hwmodels.number_formats import FORMATS
from hwmodels.parameters import NOTES
from hwmodels.units import format_quantity

# What says what a thing is, not how much: it needs no source.
_WORDS = frozenset({"name", "title", "architecture", "process", "matrix.unit"})
_KINDS = {
    "source": "from sources",
    "fitted_on": "fitted",
    "derived": "derived",
    "assumed": "assumed",
    "user": "set by the user",
    "none": "from nowhere",
}
_UNSOURCED = ("derived", "assumed", "user", "none")
_NAMES = ("name", "title", "base", "sources", "peaks")


def is_word(path: str) -> bool:
    """Whether what is at this path of a file says what a thing is, not how much: it needs no source."""
    return re.sub(r"\[\d+\]", "", path) in _WORDS


def parts(chip: Accelerator) -> dict[str, str]:
    """What each part is, in a line."""
    sram, hbm, links = chip.memory.sram, chip.memory.hbm, chip.links
    special = chip.vector.special
    found = {
        "matrix": "; ".join(_matrix(unit) for unit in chip.matrices),
        "vector": "; ".join(
            f"{unit.lanes:,} lanes at {format_quantity(unit.clock_hz, 'frequency')}" for unit in chip.vectors
        ),
        "special": f"{special.per_cycle:,.0f} functions per cycle at {format_quantity(special.clock_hz, 'frequency')}",
        chip.matrix.shared_level: f"{format_quantity(sram.capacity_bytes, 'data')}, "
        f"{format_quantity(sram.bandwidth_bytes_per_s, 'bandwidth')}",
        "hbm": f"{format_quantity(hbm.capacity_bytes, 'data')} {hbm.technology}, "
        f"{format_quantity(hbm.bandwidth_bytes_per_s, 'bandwidth')}, "
        f"{format_quantity(hbm.rate('stream'), 'bandwidth')} sustained",
    }
    for level in chip.memory.behind:
        size, rate = level.capacity_bytes, level.bandwidth_bytes_per_s
        found[level.level] = f"{format_quantity(size, 'data')}, {format_quantity(rate, 'bandwidth')}"
    for name, link in (("fabric", links.fabric), ("host", links.host), ("network", links.network)):
        if link is not None:
            found[name] = _link(link)
    limit, idle = (format_quantity(watts, "power") for watts in (chip.power_limit_w, chip.idle_power_w))
    found["power"] = f"{limit}, idle {idle}"
    if chip.area is not None:
        found["area"] = _area(chip.area)
    return found


def _area(area: Area) -> str:
    """Parts from the largest, the dies, and what the device costs to make; all of it estimated."""
    largest = sorted(area.parts_mm2.items(), key=lambda part: -part[1])
    each = ", ".join(f"{name} {mm2:.0f}" for name, mm2 in largest)
    dies = f"{area.dies} {'die' if area.dies == 1 else 'dies'} of {area.die_mm2:.0f} mm2, {area.die_yield:.0%} good"
    cost = f"{area.device_usd:,.0f} USD to make (dies {area.dies_usd:,.0f}, memory {area.memory_usd:,.0f})"
    return f"estimated {area.total_mm2:.0f} mm2 ({each}); {dies}; {cost}"


def peaks(chip: Accelerator) -> dict[str, tuple[float, float]]:
    """Format -> dense peak (FLOP/s), and how many FLOP a byte from memory has to be worth for that."""
    wide_first = sorted(chip.formats, key=lambda name: -FORMATS[name].bits)
    found = {name: chip.peak_flops(name) for name in wide_first}
    return {name: (peak, peak / chip.memory.hbm.bandwidth_bytes_per_s) for name, peak in found.items()}


def lines(chip: Accelerator) -> list[str]:
    """Parts and peaks as lines of text."""
    found = [chip.title, "", *(f"{name:8} {text}" for name, text in parts(chip).items()), ""]
    for name, (peak, balance) in peaks(chip).items():
        found.append(f"{name:8} {format_quantity(peak, 'compute')}, {balance:.3g} FLOP per byte of memory")
    return [*found, "", f"calibration: {calibration(chip)}", *provenance(chip), ""]


def calibration(chip: Accelerator) -> str:
    """Whether the constants are fitted, and where they were fitted on another chip, what is different here."""
    if chip.calibrated_on is not None:
        base, changed = chip.calibrated_on
        if chip.calibration_status == "calibrated":
            return f"inherited from {base}, changed: {', '.join(changed) or 'nothing that it was fitted on'}"
        if changed:
            return f"not calibrated, the family's defaults; what {base} has is inherited"
    known = {"calibrated": "constants fitted to kernels", "defaults": "not calibrated, the family's defaults"}
    return known.get(chip.calibration_status, chip.calibration_status)


def provenance(chip: Accelerator) -> list[str]:
    """How many numbers come from where, and by name those that no source gives."""
    kinds: dict[str, list[str]] = {}
    for entry in chip.provenance:
        if not is_word(entry.path):
            kinds.setdefault(entry.kind, []).append(entry.path)
    counts = [f"{len(kinds[kind])} {_KINDS[kind]}" for kind in _KINDS if kind in kinds]
    named = [f"{_KINDS[kind]}: {', '.join(dict.fromkeys(kinds[kind]))}" for kind in _UNSOURCED if kind in kinds]
    return [line for text in (f"numbers: {', '.join(counts)}", *named) for line in textwrap.wrap(text, 116)]


def to_json(chip: Accelerator) -> dict[str, Any]:
    """All of this as plain data: SI units, peaks by format with their balance (FLOP per byte of memory)."""
    base, changed = chip.calibrated_on or (None, ())
    return {
        "name": chip.name,
        "title": chip.title,
        "architecture": chip.architecture,
        "parts": parts(chip),
        "clock_hz": chip.clock_hz,
        "power_limit_w": chip.power_limit_w,
        "memory_bytes": chip.memory.hbm.capacity_bytes,
        "memory_bytes_per_s": chip.memory.hbm.bandwidth_bytes_per_s,
        "peaks": {name: {"flops": peak, "flop_per_byte": balance} for name, (peak, balance) in peaks(chip).items()},
        "published": dict(chip.peaks),
        "calibration": {"status": chip.calibration_status, "base": base, "changed": list(changed)},
        "values": [dataclasses.asdict(entry) for entry in chip.provenance],
        "sources": chip.sources,
    }


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[str | None, str | None]]:
    """Path -> the values in which two files (`catalog.load_raw`) differ, None where a file has none; not what names,
    dates or explains them. `3.35 TB/s` and `3350 GB/s` are the same.
    """
    left, right = dict(_leaves(one)), dict(_leaves(other))
    return {
        path: (left.get(path), right.get(path))
        for path in dict.fromkeys([*left, *right])
        if not _same(left.get(path), right.get(path))
    }


def _leaves(node: object, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(node, Mapping) and "value" not in node:
        for key, inner in node.items():
            full = f"{path}.{key}" if path else str(key)
            rows = re.fullmatch(r"matrix(\[\d+\])?\.rows", full)  # elsewhere: of what was fitted on
            if full not in _NAMES and (key not in NOTES or rows):
                yield from _leaves(inner, full)
    elif isinstance(node, list):
        for place, inner in enumerate(node):
            yield from _leaves(inner, f"{path}[{place}]")
    elif node is not None:
        yield path, str(node["value"] if isinstance(node, Mapping) else node)


def _same(one: str | None, other: str | None) -> bool:
    if one == other or one is None or other is None:
        return one == other
    for dimension in ("bandwidth", "data", "frequency", "time", "power", "energy", "compute", "money_rate"):
        value = si_value(one, dimension)
        if value is not None:
            return value == si_value(other, dimension)
    try:
        return float(one) == float(other)
    except ValueError:
        return False


def _matrix(unit: MatrixUnit) -> str:
    clock = format_quantity(unit.clock_hz, "frequency")
    if isinstance(unit, SystolicArray):
        cells = f"{unit.count} systolic arrays of {unit.rows} x {unit.columns} cells at {clock}"
        return f"{cells}, {unit.dataflow}, {'' if unit.double_buffering else 'not '}double-buffered"
    return f"{unit.cores} cores with tensor cores at {clock}"


def _link(link: Link) -> str:
    wires = f" over {link.links} links" if link.links > 1 else ""
    extent = f", at most {link.domain:,} devices" if link.domain else ""
    rate = format_quantity(link.bandwidth_bytes_per_s, "bandwidth")
    return f"{rate} per direction{wires}, {format_quantity(link.latency_s, 'time')}, {link.topology}{extent}"
