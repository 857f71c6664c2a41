"""What a fit of an accelerator's constants is made of: chips, their rows, fitted constants with what they rest on.

The half that is held out guards the constants' values. It does not guard what was chosen with all rows in view: which
rows say something about the device, tiles and waves, and the few counts that are defaults in `hwmodels`. Chosen on the
fitted half alone: rows that are swept again and their share of the cache; a prologue as a latency; whose shape an
algorithm with few rows has. Tried, and left out: on B200, results that are written after the last product of a tile
(cross-validation saw no gain), and a higher clock before the power limit acts (cross-validation saw a gain of a tenth,
the other half none: products below 0.4 ms reach 0.64 of peak in one part of that source's rows and 0.5 in another).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from cosim.calibrate.fit import Errors, Fit, Predict, errors, price
from cosim.calibrate.rows import Row
from hwmodels.accelerator import Accelerator, load

SHORT_S = 20e-6  # below it, vidur's resolution of 1 us and the launch are what one sees
# Chips whose rows speak about this chip's cores.
RELATIVES: dict[str, tuple[str, ...]] = {
    "a100-sxm-80gb": ("a100-pcie-80gb", "a100-pcie-40gb"),
    "h100-sxm-80gb": (),
    "b200-sxm": (),
    "v100-sxm2-16gb": ("v100-pcie-32gb",),
}
# Sources that print the best of a search over shapes, not typical kernels: reported, never fitted on.
ENVELOPES = ("ml_engineering_mamf",)
# Sources that time a kernel from the host: rows below this many times the source's floor say nothing about the device.
HOST_FLOOR = {"llmcompass": 5.0}


@dataclass(frozen=True, slots=True)
class Constant:
    """One calibrated value at its path below `calibration:`, and what it rests on.

    `uncertainty` is its standard error, in its own unit; infinite where no row depends on it. `unidentified`: the rows
    do not determine it (it ended on a bound, nothing depends on it, or its error is as large as itself).
    """

    path: str
    value: float
    unit: str
    basis: str
    rows: int
    held_out: float | None  # None: no row was held out
    note: str = ""
    kind: str = "fitted_on"  # or derived, assumed
    uncertainty: float | None = None
    unidentified: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """Errors of one op class and source on both halves."""

    op: str
    source: str
    fitted: Errors
    held_out: Errors


Chips = Mapping[str, Accelerator]


def chips_for(reference: str) -> dict[str, Accelerator]:
    """The accelerator (a name or a file) and its relatives, by name, itself first. Raises InputError: none such."""
    chip = load(reference, "--hw")
    return {chip.name: chip, **{name: load(name) for name in RELATIVES.get(chip.name, ())}}


def predictor(chips: Chips, change: Callable[[Accelerator], Accelerator]) -> Predict:
    """A function that prices a row on its chip after `change`."""
    changed = {name: change(chip) for name, chip in chips.items()}
    return lambda row: price(changed[row.accelerator], row)


def with_memory(chip: Accelerator, values: Mapping[str, float]) -> Accelerator:
    """The chip with other sustained fractions of its HBM."""
    hbm = replace(chip.memory.hbm, sustained={**chip.memory.hbm.sustained, **values})
    return replace(chip, memory=replace(chip.memory, hbm=hbm))


def above_floor(rows: Sequence[Row], source: str) -> list[Row]:
    """Rows of at least 20 us and, where a source times from the host, of five times its shortest."""
    floor = max(SHORT_S, HOST_FLOOR.get(source, 0.0) * min((row.time_s for row in rows), default=0.0))
    return [row for row in rows if row.time_s >= floor]


def line_of(op: str, source: str, predict: Predict, rows: Sequence[Row]) -> Line:
    """The errors of `rows` on both halves."""
    halves = [row for row in rows if row.fitted], [row for row in rows if not row.fitted]
    return Line(op, source, errors(predict, halves[0]), errors(predict, halves[1]))


def mean_held_out(found: Sequence[Errors]) -> float | None:
    """The mean of those that have rows, each with equal weight; None where none has."""
    means = [one.mean for one in found if one.rows]
    return sum(means) / len(means) if means else None


def constant_of(path: str, value: float, unit: str, basis: str, one: Fit, key: str, note: str = "") -> Constant:
    """One fitted value, with what its fit said about it."""
    error = one.uncertainty.get(key)
    loose = error is not None and error > abs(value)
    said = "ended on its bound" if key in one.at_bound else "hardly determined by these rows" if loose else ""
    held, rows = mean_held_out([one.held_out]), one.fitted.rows
    return Constant(path, value, unit, basis, rows, held, note or said, "fitted_on", error, bool(said))
