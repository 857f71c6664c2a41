"""What is wrong with an accelerator file, all of it, and what in it can hardly be meant."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hwmodels import catalog
from hwmodels.accelerator import Accelerator, build
from hwmodels.describe import is_word
from hwmodels.parameters import PROVENANCE, Section
from hwmodels.units import InputError, format_quantity

# Beyond these a number is not a chip's of any year, but one with a wrong unit. Wide: a chip on a USB stick, a wafer.
_PLAUSIBLE: tuple[tuple[str, str, float, float], ...] = (
    (r"(.*\.)?clock", "frequency", 50e6, 10e9),
    (r"memory\.sram.*\.bandwidth", "bandwidth", 10e9, 50e15),
    (r"memory\.sram.*\.size", "data", 1e3, 200e9),
    (r"memory\.hbm\.capacity", "data", 1e7, 1e14),
    (r"links\.[a-z]+\.bandwidth", "bandwidth", 50e6, 50e12),
    (r"links\.[a-z]+\.latency", "time", 5e-9, 1e-3),
    (r"power\.limit", "power", 0.1, 100e3),
    (r"power\.energy_per_flop\.\w+", "energy", 1e-15, 1e-9),
    (r"power\.energy_per_byte\.\w+", "energy", 1e-15, 10e-9),
    (r"price\.device_hour", "money_rate", 1e-3 / 3600.0, 1e4 / 3600.0),
)
_SLOWEST_PINS = 0.2  # of the usual pin rate: less is a slip of the unit
_ROUNDED = 2e-3  # datasheets round to three digits, or more coarsely: then half of their last digit
_HIGHEST_BALANCE = 20_000.0  # FLOP per byte of memory beside the chip; fp4 of 2025 has 2,000
_HIGHEST_DRAW = 5.0  # peak power over the limit, at which nothing could run near the peak


@dataclass(frozen=True, slots=True)
class Findings:
    """`problems` make a file unusable, `warnings` hardly meant; one sentence each. `accelerator` where it is usable."""

    problems: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    accelerator: Accelerator | None = None


def check(reference: str | Mapping[str, Any], where: str = "accelerator") -> Findings:
    """Everything that is wrong with what `reference` names (as `accelerator.load` takes it)."""
    try:
        written = catalog.resolve(reference, where)
    except InputError as error:
        return Findings((str(error),))
    problems: list[str] = []
    chip = build(Section(written.data, written.label, problems=problems), written)
    if problems:
        return Findings(tuple(dict.fromkeys(problems)))
    found = (*_implausible(chip), *_related(chip), *_published(chip, written.data), *_sourceless(chip))
    return Findings((), tuple(f"{written.label}: {sentence}" for sentence in found), chip)


def _implausible(chip: Accelerator) -> Iterator[str]:
    for entry in chip.provenance:
        for pattern, dimension, low, high in _PLAUSIBLE:
            if re.fullmatch(pattern, entry.path):
                value = catalog.si_value(entry.value, dimension)
                if value is not None and not low <= value <= high and value:
                    allowed = " to ".join(format_quantity(bound, dimension) for bound in (low, high))
                    meant = _meant(value, low, high, dimension)
                    yield f"{entry.path}: {entry.value} is implausible; usual are {allowed}{meant}"
    hbm, pins = chip.memory.hbm, chip.memory.hbm.pins_bytes_per_s
    if hbm.bandwidth_bytes_per_s < _SLOWEST_PINS * pins:
        rate, of_pins = (format_quantity(one, "bandwidth") for one in (hbm.bandwidth_bytes_per_s, pins))
        meant = _meant(hbm.bandwidth_bytes_per_s, _SLOWEST_PINS * pins, 2.0 * pins, "bandwidth")
        yield (
            f"memory.hbm.bandwidth: {rate} is implausible; the pins of {hbm.stacks} x {hbm.technology} give "
            f"{of_pins}{meant}"
        )


def _meant(value: float, low: float, high: float, dimension: str) -> str:
    """The value with a unit a thousand times larger or smaller, where that would be usual."""
    for factor in (1e3, 1e-3, 1e6, 1e-6):
        if low <= value * factor <= high:
            return f"; was {format_quantity(value * factor, dimension)} meant?"
    return ""


def _related(chip: Accelerator) -> Iterator[str]:
    """Parts that do not fit each other."""
    hbm, sram = chip.memory.hbm.bandwidth_bytes_per_s, chip.memory.sram.bandwidth_bytes_per_s
    beside = format_quantity(hbm, "bandwidth")
    if not chip.memory.hbm.stacks:
        size = format_quantity(chip.memory.hbm.capacity_bytes, "data")
        yield f"memory.hbm is left out: the chip has no memory but the {size} on it"
    if sram < hbm:
        rate = format_quantity(sram, "bandwidth")
        yield f"memory.sram.bandwidth: {rate} is less than the {beside} of the memory behind it; it holds that back"
    for name in ("fabric", "host", "network"):
        link = getattr(chip.links, name)
        if link is not None and link.bandwidth_bytes_per_s > hbm:
            rate = format_quantity(link.bandwidth_bytes_per_s, "bandwidth")
            yield f"links.{name}.bandwidth: {rate} per direction is more than the {beside} of memory.hbm that feeds it"
    for format in chip.formats:
        peak = chip.peak_flops(format)
        shown = format_quantity(peak, "compute")
        if peak / hbm > _HIGHEST_BALANCE:
            unit = "matrix" if any(format in one.formats for one in chip.matrices) else "vector"
            yield f"{unit}.formats.{format}: a peak of {shown} is {peak / hbm:,.0f} FLOP per byte of memory.hbm"
        draw = chip.power.energy_j(peak, format, {})
        if draw > _HIGHEST_DRAW * chip.power_limit_w:
            yield (
                f"power.energy_per_flop: {format} at its peak of {shown} draws {draw:,.0f} W, "
                f"{draw / chip.power_limit_w:.0f} times power.limit"
            )


def _published(chip: Accelerator, data: Mapping[str, Any]) -> Iterator[str]:
    """Peaks that the parts do not give as they were published."""
    for name, published in chip.peaks.items():
        if name == "bandwidth":
            dimension, derived, means = "bandwidth", chip.memory.hbm.bandwidth_bytes_per_s, "memory.hbm is given"
        elif name not in chip.formats:
            yield f"peaks.{name}: {format_quantity(published, 'compute')} is published, and no part has the format"
            continue
        else:
            dimension, derived, means = "compute", chip.peak_flops(name), "the parts give"
        if abs(derived - published) > max(_ROUNDED * published, _half_digit(data["peaks"][name], published)):
            given, follows = (format_quantity(one, dimension) for one in (published, derived))
            yield f"peaks.{name}: {given} is published, {means} {follows} ({derived / published - 1:+.1%})"


def _half_digit(written: Any, value: float) -> float:
    """Half of the last digit in which a quantity is written (0 where it is a whole number with trailing zeros)."""
    text = str(written["value"] if isinstance(written, Mapping) else written)
    number = re.match(r"\s*(\d+)(?:\.(\d+))?", text)
    if number is None:
        return 0.0
    scale = value / float(number[0])
    return float(0.5 * scale * 10.0 ** -len(number[2] or ""))


def _sourceless(chip: Accelerator) -> Iterator[str]:
    silent = [entry.path for entry in chip.provenance if entry.kind == "none" and not is_word(entry.path)]
    if silent:
        kinds = ", ".join(PROVENANCE[:4])
        yield f"{len(silent)} values say not where they come from ({kinds}): {', '.join(dict.fromkeys(silent))}"
    for name in dict.fromkeys(entry.text for entry in chip.provenance if entry.kind == "source"):
        if name not in chip.sources:
            paths = [entry.path for entry in chip.provenance if entry.kind == "source" and entry.text == name]
            more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            yield f"{paths[0]}{more}: the source {name!r:.60} is not one of `sources`"
