"""Power: energy per operation and per byte, idle and active power, and the clock that a power limit leaves."""

from dataclasses import dataclass

from hwmodels.number_formats import COMPUTES_AS, FORMATS
from hwmodels.parameters import Provenance, Section
from hwmodels.units import InputError, format_quantity

LEVELS = ("hbm", "llc", "l2", "sram", "link")
# H100 draws 300 W of 700 in memory-bound decoding (ML.ENERGY benchmark v3 as vLLM's semantic router cites it); 80 are
# idle, 105 are bytes of HBM and L2 at 0.8 of the bandwidth; the rest is what cores draw because they are clocked.
_ACTIVE_SHARE = 0.16


@dataclass(frozen=True, slots=True)
class Power:
    """Question: what energy does work take, and at what clock does its power fit under the limit?

    `energy_per_flop_j` by format, `energy_per_byte_j` by memory level; idle power is drawn all the time and is in no
    work's energy; `active_w` is drawn beside it by clock trees, issue and leakage while a kernel runs, and is in
    kernels' energy. Voltage goes with the clock down to `lowest_voltage` (over the nominal one) and stays there.
    """

    limit_w: float
    idle_w: float
    energy_per_flop_j: dict[str, float]
    energy_per_byte_j: dict[str, float]
    lowest_clock: float
    active_w: float = 0.0
    lowest_voltage: float = 0.7

    @classmethod
    def read(cls, section: Section, derived_flop: dict[str, float], derived_byte: dict[str, float]) -> "Power":
        """From `power` of an accelerator file; energies are written per FLOP and per byte, for example `1.1 pJ`.

        What the file leaves out of a table is `derived_flop`, `derived_byte` (from its process and its memory's
        technology; empty where it names no process). A file that lists its own energies per FLOP has active power in
        them, unless it gives `active`.
        """
        limit = section.quantity("limit", "power")
        flop, byte = section.section("energy_per_flop"), section.section("energy_per_byte")
        listed = {name: flop.quantity(name, "energy") for name in flop.keys() if name in FORMATS}
        moved = {name: byte.quantity(name, "energy") for name in LEVELS if byte.has(name)}
        part = cls(
            limit_w=limit,
            idle_w=section.quantity("idle", "power", 0.13 * limit),
            energy_per_flop_j=listed or derived_flop,
            energy_per_byte_j={**derived_byte, **moved},
            lowest_clock=section.number("lowest_clock", 0.3, high=1.0),
            active_w=section.quantity("active", "power", 0.0 if listed else _ACTIVE_SHARE * limit, zero=True),
            lowest_voltage=section.number("lowest_voltage", 0.7, high=1.0),
        )
        for key, energies, given in (("flop", part.energy_per_flop_j, listed), ("byte", part.energy_per_byte_j, moved)):
            for name in [name for name in energies if name not in given]:
                text = format_quantity(energies[name], "energy")
                section.log.append(Provenance(f"power.energy_per_{key}.{name}", text, "derived", "process, technology"))
        flop.close()
        byte.close()
        section.close()
        if part.idle_w >= part.limit_w:
            raise InputError(
                f"{section.at('idle')}: {part.idle_w:g} W must be less than the limit of {part.limit_w:g} W"
            )
        return part

    def energy_j(self, flops: float, format: str, bytes_per_level: dict[str, float], time_s: float = 0.0) -> float:
        """Dynamic joules of `flops` in `format`, of the bytes of each level and of cores that are active for `time_s`,
        at the nominal clock and voltage.
        """
        per_flop = (
            self.energy_per_flop_j.get(format)
            or self.energy_per_flop_j.get(COMPUTES_AS.get(format, ""))
            or self._scaled(format)
        )
        moved = sum(self.energy_per_byte_j.get(level, 0.0) * amount for level, amount in bytes_per_level.items())
        return flops * per_flop + moved + self.active_w * time_s

    def _scaled(self, format: str) -> float:
        """Energy of a format that the file does not list: a listed one's, scaled by the bits of an operand
        (multipliers grow faster).
        """
        if not self.energy_per_flop_j:
            return 0.0
        known = min(self.energy_per_flop_j, key=lambda name: abs(FORMATS[name].bits - FORMATS[format].bits))
        return self.energy_per_flop_j[known] * FORMATS[format].bits / FORMATS[known].bits

    def voltage(self, clock_share: float) -> float:
        """The voltage at a share of the nominal clock, over the nominal voltage."""
        return max(self.lowest_voltage, clock_share)

    def sustained_clock(self, core_power_w: float, clock_hz: float) -> float:
        """The clock (Hz) at which work keeps to the limit that would draw `core_power_w` above idle at `clock_hz`;
        never above `clock_hz`.

        Core power is f V^2: it goes with the cube of the clock while the voltage follows, and with the clock below
        (piecewise as measured on A40 to H200, arXiv 2607.00819; the model of Schoonhoven et al., arXiv 2211.07260).
        Bounded below by `lowest_clock` times the nominal clock.
        """
        budget = self.limit_w - self.idle_w
        if core_power_w <= budget:
            return clock_hz
        share = budget / core_power_w
        lowest = self.lowest_voltage
        clock = share ** (1.0 / 3.0) if share >= lowest**3 else share / lowest**2
        return float(clock_hz * max(self.lowest_clock, clock))
