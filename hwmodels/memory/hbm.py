"""The memory beside the chip: its capacity, its pins, and what of them each way of walking through it sustains.

A channel's bus carries data unless it waits. What it waits for, as shares of time that multiply:

    refresh      tRFC of every tREFI; where single banks are refreshed, requests in order wait for the bank as long
    turnaround   writes are gathered in a buffer of 64 bursts and then written in one go; each time the bus idles while
                 it turns round, so the loss falls with the batch's time and is none for reads alone
    rows         a row gives `run` bytes before the next is opened: at most four in tFAW and one per bank in tRC

and for latency: no more bytes per second than are in flight, over the latency (Little's law).
"""

from dataclasses import dataclass, field

from hwmodels.memory.technologies import TECHNOLOGIES, Technology
from hwmodels.parameters import Provenance, Section
from hwmodels.units import InputError, format_quantity

KINDS = ("stream", "row", "gather", "transpose", "gemm")
# Bytes in a row before the next one (None: a whole page), and the share of them that is written where the work does not
# say. A gather visits a cache line (128 bytes); a transpose a tile of 32 elements of 16 bits; a product reads 64
# elements of 16 bits of a row for each of two stages of its pipeline.
_WALKS: dict[str, tuple[int | None, float]] = {
    "stream": (None, 1.0 / 3.0),
    "row": (None, 0.5),
    "gather": (128, 0.5),
    "transpose": (64, 0.5),
    "gemm": (256, 0.0),
}
_WRITE_BUFFER = 64  # bursts; gem5's write_buffer_size of its DRAM interfaces
# On the chip, to the memory controller and back: 400 cycles of A100 at 1.41 GHz (PMC10448217, table 3) less the DRAM's.
_PATH_S = 250e-9
_ROUNDED = 1.01  # datasheets round bandwidths
ON_CHIP = "on-chip"


@dataclass(frozen=True, slots=True)
class Hbm:
    """The main memory: DRAM beside the chip, of any technology, or the last on-chip level. Question: how long do these
    bytes take, walked in this way?

    `stacks` units of `technology` (stacks of HBM, chips of GDDR, channels of LPDDR, interfaces of DDR) with `channels`
    in all; `bandwidth_bytes_per_s` is the datasheet's, or that of the pins; `sustained` the fraction of it that was
    measured, by access kind: a kind that it lacks takes what the timings of the technology leave. `in_flight_bytes`
    may be outstanding at once (0: enough); `latency_s` of one of them.
    """

    technology: str
    stacks: int
    capacity_bytes: float
    bandwidth_bytes_per_s: float
    sustained: dict[str, float] = field(default_factory=dict)
    channels: int = 0
    latency_s: float = 0.0
    in_flight_bytes: float = 0.0

    @classmethod
    def read(cls, section: Section, calibration: Section) -> "Hbm":
        """From `memory.hbm` of an accelerator file and its fitted `calibration.memory`.

        Raises InputError: a bandwidth above that of the pins that the file gives.
        """
        technology = section.text("technology", choices=tuple(TECHNOLOGIES))
        unit = TECHNOLOGIES[technology]
        stacks = section.integer("stacks", 1)
        pins = section.integer("bus_width", stacks * unit.pins)
        pin_rate = section.quantity("pin_rate", "bandwidth", unit.pin_bits_per_s / 8.0)
        interface = pins * pin_rate
        bandwidth = section.quantity("bandwidth", "bandwidth", interface)
        fastest = interface if section.has("pin_rate") else pins * unit.fastest_pin_bits_per_s / 8.0
        said = section.has("pin_rate") or section.has("bus_width")  # else the pins are the technology's usual ones
        if said and bandwidth > fastest * _ROUNDED:
            raise InputError(
                f"{section.at('bandwidth')}: {format_quantity(bandwidth, 'bandwidth')} is more than the "
                f"{format_quantity(fastest, 'bandwidth')} of {pins} pins of {technology}"
            )
        if not section.has("bandwidth"):
            text = format_quantity(interface, "bandwidth")
            section.log.append(Provenance("memory.hbm.bandwidth", text, "derived", f"{pins} pins of {technology}"))
        part = cls(
            technology=technology,
            stacks=stacks,
            capacity_bytes=section.quantity("capacity", "data"),
            bandwidth_bytes_per_s=bandwidth,
            sustained={kind: share for kind in KINDS if (share := calibration.number(kind, 0.0, high=1.0))},
            channels=section.integer("channels", max(1, pins * unit.channels // unit.pins)),
            latency_s=section.quantity("latency", "time", unit.latency_s + _PATH_S),
            in_flight_bytes=section.quantity("in_flight", "data", 0.0, zero=True),
        )
        section.close()
        calibration.close()
        return part

    @classmethod
    def on_chip(cls, capacity_bytes: float, bandwidth_bytes_per_s: float) -> "Hbm":
        """On-chip memory as the main memory of a chip that has none beside it: at its bandwidth, whatever the walk."""
        return cls(ON_CHIP, 0, capacity_bytes, bandwidth_bytes_per_s, dict.fromkeys(KINDS, 1.0))

    def rate(self, kind: str, write_share: float | None = None) -> float:
        """Sustained bytes per second for an access kind; `write_share` of them are written (None: as is usual)."""
        fraction = self.sustained.get(kind)
        if fraction is None:
            fraction = self.fraction(kind, write_share)
        rate = self.bandwidth_bytes_per_s * fraction
        return min(rate, self.in_flight_bytes / self.latency_s) if self.in_flight_bytes else rate

    @property
    def pins_bytes_per_s(self) -> float:
        """Bandwidth of its pins at the technology's usual rate; 0 on the chip."""
        return interface_bytes_per_s(self.technology, self.stacks) if self.stacks else 0.0

    def time_s(self, kind: str, read_bytes: float, write_bytes: float) -> float:
        """Seconds of these bytes; the latency of the first is part of a kernel's fixed time."""
        moved = read_bytes + write_bytes
        return moved / self.rate(kind, write_bytes / moved) if moved else 0.0

    def fraction(self, kind: str, write_share: float | None = None) -> float:
        """The share of the pins that the technology's timings leave, by access kind (0 < share <= 1)."""
        unit = TECHNOLOGIES[self.technology]
        run, usual = _WALKS[kind]
        writes = usual if write_share is None else write_share
        channel = self.bandwidth_bytes_per_s / (self.channels or self.stacks * unit.channels)
        rows = rows_share(unit, channel, unit.page_bytes if run is None else run)
        return refresh_share(unit) * rows * turnaround_share(unit, channel * rows, writes)


def refresh_share(unit: Technology) -> float:
    """Time in which a refresh blocks nothing: 1 - tRFC / tREFI."""
    return 1.0 - unit.refresh_s / unit.refresh_interval_s


def turnaround_share(unit: Technology, channel_bytes_per_s: float, write_share: float) -> float:
    """Time in which a channel's bus carries data while batches of the rarer direction interrupt the other."""
    rarer = min(write_share, 1.0 - write_share)
    buffer_s = _WRITE_BUFFER * unit.burst_bytes / channel_bytes_per_s
    return buffer_s / (buffer_s + rarer * unit.turnaround_s)  # a turn after buffer_s / rarer


def rows_share(unit: Technology, channel_bytes_per_s: float, run_bytes: float) -> float:
    """Share of a channel's rate at which rows can be opened that give `run_bytes` each (at least a burst is moved)."""
    per_row = max(run_bytes, 1.0)
    opened = min(4.0 / unit.four_activates_s, unit.banks / unit.row_cycle_s)
    return min(1.0, opened * per_row / channel_bytes_per_s)


def interface_bytes_per_s(technology: str, stacks: int) -> float:
    """Pin bandwidth of `stacks` stacks, chips or channels of a technology at its usual pin rate."""
    unit = TECHNOLOGIES[technology]
    return stacks * unit.pins * unit.pin_bits_per_s / 8.0
