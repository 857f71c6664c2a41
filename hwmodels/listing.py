"""What the library has, a line for each file, read without building any part: `cosim hw list` starts quickly."""

import math
from collections.abc import Mapping
from typing import Any

from hwmodels import catalog
from hwmodels.memory.technologies import TECHNOLOGIES
from hwmodels.units import format_quantity, parse_quantity


def summary(name: str) -> dict[str, str]:
    """What `cosim hw list` prints of one library file."""
    data = catalog.resolve(name).data
    memory = _at(data, "memory", "hbm") or {}
    peak, bandwidth = _peak_flops(data, name), _at(memory, "bandwidth")
    if memory and bandwidth is None:
        unit = TECHNOLOGIES[str(_at(memory, "technology"))]
        pins = int(_at(memory, "stacks") or 1) * unit.pins
        bandwidth = format_quantity(pins * unit.pin_bits_per_s / 8.0, "bandwidth")
    return {
        "name": name,
        "title": str(data.get("title", name)),
        "16-bit": format_quantity(peak, "compute", 3) if peak else "-",
        "memory": f"{_at(memory, 'capacity')} {_at(memory, 'technology')}" if memory else "on chip",
        "bandwidth": str(bandwidth or "-"),
        "power": str(_at(data, "power", "limit")),
        "calibrated": "yes" if (data.get("calibration") or {}).get("gemm") else "no",
    }


def _peak_flops(data: Mapping[str, Any], name: str) -> float:
    """The dense 16-bit peak of the fastest matrix unit; 0 where it multiplies other formats only."""
    units, clock = data.get("matrix"), parse_quantity(_at(data, "clock"), "frequency", name)
    peaks = [0.0]
    for unit in units if isinstance(units, list) else [units]:
        cores = _at(unit, "cores") or math.prod(float(_at(unit, key) or 1) for key in ("rows", "columns", "count"))
        macs = _at(unit, "formats", "bf16") or _at(unit, "formats", "fp16") or 0
        peaks.append(2.0 * float(cores) * float(macs) * clock)
    return max(peaks)


def _at(node: Any, *path: str) -> Any:
    """The value at a path, without its provenance; None where there is none."""
    for key in path:
        node = node.get(key) if isinstance(node, Mapping) else None
    return node["value"] if isinstance(node, Mapping) and "value" in node else node
