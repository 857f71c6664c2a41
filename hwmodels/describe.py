"""An accelerator in words: its parts, the peaks that follow from them, and machine balance."""

from hwmodels.accelerator import Accelerator
from hwmodels.interconnect.links import Link
from hwmodels.matrix_units.systolic_array import SystolicArray
from hwmodels.number_formats import FORMATS
from hwmodels.units import format_quantity


def parts(chip: Accelerator) -> dict[str, str]:
    """What each part is, in a line."""
    sram, hbm, links, vector = chip.memory.sram, chip.memory.hbm, chip.links, chip.vector
    found = {
        "matrix": _matrix(chip),
        "vector": f"{vector.lanes:,} lanes at {format_quantity(vector.clock_hz, 'frequency')}, "
        f"{vector.special_function_rate:g} special functions per lane and cycle",
        chip.matrix.shared_level: f"{format_quantity(sram.capacity_bytes, 'data')}, "
        f"{format_quantity(sram.bandwidth_bytes_per_s, 'bandwidth')}",
        "hbm": f"{format_quantity(hbm.capacity_bytes, 'data')} {hbm.technology}, "
        f"{format_quantity(hbm.bandwidth_bytes_per_s, 'bandwidth')}, "
        f"{format_quantity(hbm.rate('stream'), 'bandwidth')} sustained",
    }
    for name, link in (("fabric", links.fabric), ("host", links.host), ("network", links.network)):
        if link is not None:
            found[name] = _link(link)
    limit, idle = (format_quantity(watts, "power") for watts in (chip.power_limit_w, chip.idle_power_w))
    return {**found, "power": f"{limit}, idle {idle}"}


def peaks(chip: Accelerator) -> dict[str, tuple[float, float]]:
    """Format -> dense peak (FLOP/s), and how many FLOP a byte from HBM has to be worth for that."""
    wide_first = sorted(chip.formats, key=lambda name: -FORMATS[name].bits)
    found = {name: chip.peak_flops(name) for name in wide_first}
    return {name: (peak, peak / chip.memory.hbm.bandwidth_bytes_per_s) for name, peak in found.items()}


def lines(chip: Accelerator) -> list[str]:
    """Parts and peaks as lines of text."""
    found = [chip.title, "", *(f"{name:8} {text}" for name, text in parts(chip).items()), ""]
    for name, (peak, balance) in peaks(chip).items():
        found.append(f"{name:8} {format_quantity(peak, 'compute')}, {balance:.3g} FLOP per byte of HBM")
    calibrated = {"calibrated": "constants fitted to kernels", "defaults": "not calibrated, the family's defaults"}
    return [*found, "", f"{calibrated.get(chip.calibration_status, chip.calibration_status)}; the file:", ""]


def _matrix(chip: Accelerator) -> str:
    unit, clock = chip.matrix, format_quantity(chip.matrix.clock_hz, "frequency")
    if isinstance(unit, SystolicArray):
        cells = f"{unit.count} systolic arrays of {unit.rows} x {unit.columns} cells at {clock}"
        return f"{cells}, {unit.dataflow}, {'' if unit.double_buffering else 'not '}double-buffered"
    return f"{unit.cores} cores with tensor cores at {clock}"


def _link(link: Link) -> str:
    wires = f" over {link.links} links" if link.links > 1 else ""
    extent = f", at most {link.domain:,} devices" if link.domain else ""
    rate = format_quantity(link.bandwidth_bytes_per_s, "bandwidth")
    return f"{rate} per direction{wires}, {format_quantity(link.latency_s, 'time')}, {link.topology}{extent}"
