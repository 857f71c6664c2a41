"""Which constants of matrix products are fitted on which published kernels.

Rows of chips with the same cores (an A100 on PCIe) are priced on their own file with the constants under test. Where
sources of one constant disagree, it is fitted to each and the mean is taken, every source counting the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import sqrt

from cosim.calibrate.constants import (
    ENVELOPES,
    Chips,
    Constant,
    Line,
    above_floor,
    constant_of,
    line_of,
    mean_held_out,
    predictor,
    with_memory,
)
from cosim.calibrate.fit import Fit, Free, Predict, fit
from cosim.calibrate.rows import Row
from hwmodels.accelerator import Accelerator
from hwmodels.matrix_units.systolic_array import SystolicArray
from hwmodels.matrix_units.tensor_core import TensorCore
from hwmodels.work import Gemm

_EFFICIENCY = Free(0.78, 0.3, 1.0)
_SHAPE = {
    "tile_loss": Free(0.06, 0.0, 0.3),
    "prologue_k": Free(60.0, 5.0, 300.0),
    "last_wave": Free(0.5, 0.0, 1.0),
}
_COMMON = {"efficiency": _EFFICIENCY, "fixed_us": Free(4.0, 0.0, 10.0), "memory": Free(0.85, 0.4, 1.0)}
_LAYOUTS = {"dgrad": Free(1.0, 0.5, 1.5), "wgrad": Free(0.96, 0.5, 1.5)}
_PATHS = {"fixed_us": ("gemm.fixed_time", "us"), "memory": ("memory.gemm", "")}
_FEWEST = 4  # rows of the fitted half for one constant


def with_gemm(chip: Accelerator, values: Mapping[str, float]) -> Accelerator:
    """The chip with some of its GEMM constants (and `memory`, the HBM share of GEMMs; `fixed_us`) replaced."""
    changes = {key: value for key, value in values.items() if key not in ("memory", "fixed_us")}
    if "fixed_us" in values:
        changes["fixed_time_s"] = values["fixed_us"] * 1e-6
    matrix, *others = chip.matrices  # the constants are the first unit's
    if isinstance(matrix, TensorCore):
        matrix = replace(matrix, constants=replace(matrix.constants, **changes))  # type: ignore[arg-type]
    elif isinstance(matrix, SystolicArray):
        matrix = replace(matrix, **changes)  # type: ignore[arg-type]
    chip = replace(chip, matrices=(matrix, *others))
    return with_memory(chip, {"gemm": values["memory"]}) if "memory" in values else chip


def gemm_rows(rows: Sequence[Row], chips: Chips, source: str, formats: tuple[str, ...] = ("fp16", "bf16")) -> list[Row]:
    """Rows of GEMMs from one source that lasted at least 20 us."""
    found = []
    for row in rows:
        work = row.works[0]
        if isinstance(work, Gemm) and work.format in formats and row.op == "gemm" and row.source == source:
            found.append(row)
    return above_floor([row for row in found if row.accelerator in chips], source)


def calibrate_gemm(rows: Sequence[Row], chips: Chips) -> tuple[list[Constant], list[Line], dict[str, float]]:
    """Shape constants on the source with most rows; the efficiency on each source, then their mean."""
    by_source = {source: gemm_rows(rows, chips, source) for source in sorted({r.source for r in rows} - {*ENVELOPES})}
    by_source = {source: found for source, found in by_source.items() if _fitted(found) >= _FEWEST}
    if not by_source:
        return [], [], {}
    main = max(by_source, key=lambda source: len(by_source[source]))

    def model(values: dict[str, float]) -> Predict:
        return predictor(chips, lambda chip: with_gemm(chip, values))

    shape = fit(_free(by_source[main], chips), model, by_source[main])
    values = dict(shape.values)
    if "simumax" in by_source and main != "simumax":
        values |= _layouts(by_source["simumax"], chips, values)
    efficiencies = {main: values["efficiency"]}
    for source in by_source.keys() - {main}:
        one = fit({"efficiency": _EFFICIENCY}, lambda v: model({**values, **v}), by_source[source])
        efficiencies[source] = one.values["efficiency"]
    values["efficiency"] = sum(efficiencies.values()) / len(efficiencies)
    predict = model(values)
    lines = [line_of("gemm 16-bit >= 20 us", source, predict, found) for source, found in by_source.items()]
    return _constants(by_source, main, shape, values, efficiencies, lines), lines, values


def _free(rows: Sequence[Row], chips: Chips) -> dict[str, Free]:
    """What these rows can tell: the efficiency alone if they are few, layouts only where there are others than TN."""
    tensor_cores = isinstance(next(iter(chips.values())).matrix, TensorCore)
    free = {**_COMMON, **(_SHAPE if tensor_cores else {})}
    if {row.works[0].layout for row in rows if isinstance(row.works[0], Gemm)} > {"TN"} and tensor_cores:
        free |= _LAYOUTS
    return free if _fitted(rows) >= _FEWEST * len(free) else {"efficiency": _EFFICIENCY}


def _constants(
    by_source: Mapping[str, Sequence[Row]],
    main: str,
    shape: Fit,
    values: Mapping[str, float],
    efficiencies: Mapping[str, float],
    lines: Sequence[Line],
) -> list[Constant]:
    formats = sorted({row.works[0].format for row in by_source[main] if isinstance(row.works[0], Gemm)})
    basis = f"{main} GEMM {' and '.join(formats)} >= 20 us"
    held = mean_held_out([line.held_out for line in lines])
    constants = [constant_of("gemm.efficiency", values["efficiency"], "", basis, shape, "efficiency")]
    if len(efficiencies) > 1:
        mean = values["efficiency"]
        error = sqrt(sum((one - mean) ** 2 for one in efficiencies.values())) / len(efficiencies)
        each = ", ".join(f"{source} {value:.3f}" for source, value in sorted(efficiencies.items()))
        count = sum(_fitted(rows) for rows in by_source.values())
        text = f"equal weight of {each}"
        constants = [Constant("gemm.efficiency", mean, "", text, count, held, uncertainty=error)]
    for key in shape.values.keys() - {"efficiency"}:
        path, unit = _PATHS.get(key, (f"gemm.{key}", ""))
        constants.append(constant_of(path, values[key], unit, basis, shape, key))
    for key in _LAYOUTS.keys() & values.keys() - shape.values.keys():
        text, n = "simumax, A100 PCIe 80 GB, against its TN rows", len(by_source["simumax"])
        constants.append(Constant(f"gemm.{key}", values[key], "", text, n, held))
    order = ["efficiency", *_SHAPE, "fixed_time", *_LAYOUTS, "gemm"]
    return sorted(constants, key=lambda one: order.index(one.path.split(".")[1]))


def _layouts(rows: list[Row], chips: Chips, values: Mapping[str, float]) -> dict[str, float]:
    """Rates of the layouts NN and NT over TN's, each fitted alone on its rows with the shape constants held."""
    rates = {}
    for layout in ("TN", "NN", "NT"):
        found = [row for row in rows if isinstance(row.works[0], Gemm) and row.works[0].layout == layout]
        same = {**values, "dgrad": 1.0, "wgrad": 1.0}

        def model(free: dict[str, float], same: Mapping[str, float] = same) -> Predict:
            return predictor(chips, lambda chip: with_gemm(chip, {**same, **free}))

        rates[layout] = fit({"efficiency": _EFFICIENCY}, model, found).values["efficiency"]
    return {"dgrad": rates["NN"] / rates["TN"], "wgrad": rates["NT"] / rates["TN"]}


def calibrate_simd(rows: Sequence[Row], chips: Chips, gemm: Mapping[str, float]) -> tuple[list[Constant], list[Line]]:
    """The rate of fp32 GEMMs on the vector lanes."""
    constants, lines = [], []
    for source in sorted({row.source for row in rows}):
        found = gemm_rows(rows, chips, source, ("fp32",))
        if _fitted(found) < _FEWEST or not isinstance(next(iter(chips.values())).matrix, TensorCore):
            continue

        def model(values: dict[str, float]) -> Predict:
            return predictor(chips, lambda chip: with_gemm(chip, {**gemm, **values}))

        key = "simd_efficiency"
        one = fit({key: Free(0.85, 0.3, 1.0)}, model, found)
        lines.append(line_of("gemm fp32 >= 20 us", source, model(one.values), found))
        basis = f"{source} GEMM fp32, {' and '.join(sorted({row.accelerator for row in found}))}"
        constants = [constant_of(f"gemm.{key}", one.values[key], "", basis, one, key)]
    return constants, lines


def _fitted(rows: Sequence[Row]) -> int:
    return sum(row.fitted for row in rows)
