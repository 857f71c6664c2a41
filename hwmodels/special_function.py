"""Special-function units: exponentials, reciprocal roots, hyperbolic tangents and their like, beside the lanes."""

from dataclasses import dataclass, replace

from hwmodels.parameters import Section


@dataclass(frozen=True, slots=True)
class SpecialFunctionUnit:
    """The special-function units of all cores. Question: how long do these special functions take?

    `per_cycle` functions start every cycle of `clock_hz`.
    """

    per_cycle: float
    clock_hz: float

    @classmethod
    def read(cls, section: Section, clock_hz: float) -> "SpecialFunctionUnit":
        """From `special_function` of an accelerator file; `clock_hz` is the chip's, for a unit that names none."""
        part = cls(
            per_cycle=section.number("per_cycle"),
            clock_hz=section.quantity("clock", "frequency", clock_hz),
        )
        section.close()
        return part

    @property
    def per_s(self) -> float:
        """Special functions per second."""
        return self.per_cycle * self.clock_hz

    def time_s(self, operations: float) -> float:
        """Seconds for `operations` special functions."""
        return operations / self.per_s

    def at_clock(self, ratio: float) -> "SpecialFunctionUnit":
        """The same units with their clock times `ratio`."""
        return replace(self, clock_hz=self.clock_hz * ratio)
