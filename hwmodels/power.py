"""Power: energy per operation and per byte, idle power, and the clock that a power limit leaves."""

from dataclasses import dataclass

from hwmodels.number_formats import COMPUTES_AS, FORMATS
from hwmodels.parameters import Section
from hwmodels.units import InputError

LEVELS = ("hbm", "l2", "sram", "link")


@dataclass(frozen=True, slots=True)
class Power:
    """Question: what energy does work take, and at what clock does its power fit under the limit?

    `energy_per_flop_j` by format, `energy_per_byte_j` by memory level; idle power is drawn all the time and is in no
    work's energy.
    """

    limit_w: float
    idle_w: float
    energy_per_flop_j: dict[str, float]
    energy_per_byte_j: dict[str, float]
    lowest_clock: float

    @classmethod
    def read(cls, section: Section) -> "Power":
        """From `power` of an accelerator file; energies are written per FLOP and per byte, for example `1.1 pJ`."""
        limit = section.quantity("limit", "power")
        flop, byte = section.section("energy_per_flop"), section.section("energy_per_byte")
        part = cls(
            limit_w=limit,
            idle_w=section.quantity("idle", "power", 0.13 * limit),
            energy_per_flop_j={name: flop.quantity(name, "energy") for name in flop.keys() if name in FORMATS},
            energy_per_byte_j={name: byte.quantity(name, "energy") for name in LEVELS if byte.has(name)},
            lowest_clock=section.number("lowest_clock", 0.3, high=1.0),
        )
        flop.close()
        byte.close()
        section.close()
        if part.idle_w >= part.limit_w:
            raise InputError(
                f"{section.at('idle')}: {part.idle_w:g} W must be less than the limit of {part.limit_w:g} W"
            )
        return part

    def energy_j(self, flops: float, format: str, bytes_per_level: dict[str, float]) -> float:
        """Dynamic joules of `flops` in `format` and of the bytes of each level, at the nominal clock."""
        per_flop = (
            self.energy_per_flop_j.get(format)
            or self.energy_per_flop_j.get(COMPUTES_AS.get(format, ""))
            or self._scaled(format)
        )
        moved = sum(self.energy_per_byte_j.get(level, 0.0) * amount for level, amount in bytes_per_level.items())
        return flops * per_flop + moved

    def _scaled(self, format: str) -> float:
        """Energy of a format that the file does not list: a listed one's, scaled by the bits of an operand
        (multipliers grow faster).
        """
        if not self.energy_per_flop_j:
            return 0.0
        known = min(self.energy_per_flop_j, key=lambda name: abs(FORMATS[name].bits - FORMATS[format].bits))
        return self.energy_per_flop_j[known] * FORMATS[format].bits / FORMATS[known].bits

    def sustained_clock(self, dynamic_power_w: float, clock_hz: float) -> float:
        """The clock (Hz) at which work that would draw `dynamic_power_w` at `clock_hz` keeps to the limit; never
        above `clock_hz`.

        Dynamic power is taken as f V^2 with V proportional to f, so power goes with the cube of the clock and the
        clock with the cube root of the power that is left; bounded below by `lowest_clock` times the nominal clock.
        """
        budget = self.limit_w - self.idle_w
        if dynamic_power_w <= budget:
            return clock_hz
        return float(clock_hz * max(self.lowest_clock, (budget / dynamic_power_w) ** (1.0 / 3.0)))
