"""Quantities as people write them ("3.35 TB/s", "80 GiB", "1.98 GHz") become SI numbers, and SI numbers become text.

A table and one regular expression: pint takes half a second to import and reads "400 Gb/s" as gilberts per second. Bits
and bytes are told apart by case (`Gb`, `Gbit` against `GB`), powers of ten by k M G T P E, powers of two by Ki Mi Gi Ti
Pi.
"""

import math
import re


class InputError(ValueError):
    """What the user gave cannot be used; the message is one sentence that names file, key, value and what is
    allowed.
    """


# dimension -> (SI unit, {unit without prefix: factor})
_UNITS: dict[str, tuple[str, dict[str, float]]] = {
    "time": ("s", {"s": 1.0, "min": 60.0, "h": 3600.0}),
    "frequency": ("Hz", {"Hz": 1.0}),
    "data": ("B", {"B": 1.0, "byte": 1.0, "bytes": 1.0, "b": 0.125, "bit": 0.125}),
    "bandwidth": ("B/s", {"B/s": 1.0, "byte/s": 1.0, "b/s": 0.125, "bit/s": 0.125, "bps": 0.125}),
    "power": ("W", {"W": 1.0}),
    "energy": ("J", {"J": 1.0, "Wh": 3600.0}),
    "compute": ("FLOP/s", {"FLOP/s": 1.0, "FLOPS": 1.0, "op/s": 1.0, "OP/s": 1.0}),
    "money": ("USD", {"USD": 1.0, "$": 1.0}),
    "money_rate": ("USD/s", {"USD/h": 1 / 3600.0, "$/h": 1 / 3600.0, "USD/s": 1.0}),
    "money_per_energy": ("USD/J", {"USD/kWh": 1 / 3.6e6, "$/kWh": 1 / 3.6e6, "USD/J": 1.0}),
    "length": ("m", {"m": 1.0}),
    "area": ("mm2", {"mm2": 1.0}),
}
_DECIMAL = {"": 1.0, "f": 1e-15, "p": 1e-12, "n": 1e-9, "u": 1e-6, "µ": 1e-6, "m": 1e-3}
_DECIMAL |= {"k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50}
_QUANTITY = re.compile(r"\s*([-+]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*(\S.*?)?\s*\Z")
_EXAMPLES = {
    "time": "5 us",
    "frequency": "1.98 GHz",
    "data": "80 GiB",
    "bandwidth": "3.35 TB/s or 400 Gb/s",
    "power": "700 W",
    "energy": "1 pJ",
    "compute": "989 TFLOP/s",
    "money": "30000 USD",
    "money_rate": "2 USD/h",
    "money_per_energy": "0.1 USD/kWh",
    "length": "7 nm",
    "area": "814 mm2",
}

# What is no machine's: smallest and largest value of a dimension in SI units, where it is not 0. Wide enough for chips
# that will never be, narrow enough that products of a few of them are finite numbers.
_RANGE = {
    "time": (1e-18, 1e12),
    "frequency": (1e-3, 1e18),
    "data": (0.125, 1e24),
    "bandwidth": (1e-9, 1e24),
    "power": (1e-12, 1e12),
    "energy": (1e-24, 1e15),
    "compute": (1e-3, 1e30),
    "money": (1e-12, 1e18),
    "money_rate": (1e-15, 1e15),
    "money_per_energy": (1e-24, 1e15),
    "length": (1e-15, 1e9),
    "area": (1e-12, 1e15),
}


def parse_quantity(value: object, dimension: str, where: str, positive: bool = False) -> float:
    """The SI number (bytes, bytes/s, seconds, hertz, watts, FLOP/s, ...) that `value` states.

    `value` is text with a unit; a bare number is refused, except 0, because nobody can tell its unit. `where` names the
    file and key in the error; `positive`: 0 is refused too.

    Raises InputError: no number, no unit or one of another dimension, nan, infinite, negative, or beyond what any
    machine has.
    """
    example = _EXAMPLES[dimension]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise InputError(f"{where}: {value!r} is not a {dimension}; write it with its unit, for example '{example}'")
    match = _QUANTITY.match(str(value)[:100])
    if match is None:
        raise InputError(f"{where}: {str(value)[:100]!r} is not a {dimension}; write it like '{example}'")
    number, unit = float(match.group(1).replace("_", "")), match.group(2)
    if not math.isfinite(number) or number < 0 or (positive and number == 0):
        allowed = "finite and positive" if positive else "finite and not negative"
        raise InputError(f"{where}: {value!r} must be {allowed}; write it like '{example}'")
    if unit is None:
        if number == 0:
            return 0.0
        raise InputError(f"{where}: {value!r} has no unit; write it like '{example}'")
    factor = _factor(unit.replace(" ", ""), dimension)
    if factor is None:
        raise InputError(f"{where}: {unit!r} in {value!r} is not a unit of {dimension}; write it like '{example}'")
    low, high = _RANGE[dimension]
    if number and not low <= number * factor <= high:
        unit, zero = _UNITS[dimension][0], "" if positive else "0 and "
        raise InputError(f"{where}: {value!r} is out of range; allowed are {zero}{low:g} to {high:g} {unit}")
    return number * factor


def _factor(unit: str, dimension: str) -> float | None:
    for name, factor in _UNITS[dimension][1].items():
        if not unit.endswith(name):
            continue
        prefix = unit[: len(unit) - len(name)]
        if prefix in _DECIMAL:
            return _DECIMAL[prefix] * factor
        if prefix in _BINARY and dimension in ("data", "bandwidth"):
            return _BINARY[prefix] * factor
    return None


def format_quantity(value: float, dimension: str, digits: int = 4) -> str:
    """`value` (SI) as text that `parse_quantity` reads back to `digits` significant digits; data in binary units."""
    unit = _UNITS[dimension][0]
    if value == 0 or not math.isfinite(value):
        return f"{value:g} {unit}"
    if dimension == "data":
        steps = [("Ti", 2.0**40), ("Gi", 2.0**30), ("Mi", 2.0**20), ("Ki", 2.0**10), ("", 1.0)]
    elif dimension in ("money", "money_rate", "money_per_energy", "area"):
        steps = [("", 1.0)]
    else:
        steps = [("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0)]
        steps += [("m", 1e-3), ("u", 1e-6), ("n", 1e-9), ("p", 1e-12)]
    prefix, scale = next((step for step in steps if abs(value) >= step[1] * (1 - 1e-12)), steps[-1])
    return f"{value / scale:.{digits}g} {prefix}{unit}"
