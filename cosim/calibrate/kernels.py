"""Which constants of a GPU are fitted on which published kernels: GEMM, attention by algorithm, passes.

Rows of chips with the same cores (an A100 on PCIe) are priced on their own file with the constants under test. Where
sources of one constant disagree, it is fitted to each and the mean is taken, every source counting the same.

The half that is held out guards the constants' values. It does not guard what was chosen with all rows in view: which
mechanisms there are, which rows say something about the device, and the few counts that are defaults in `hwmodels`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

from cosim.calibrate.fit import Errors, Fit, Free, Predict, errors, fit, price
from cosim.calibrate.rows import Row
from hwmodels.accelerator import Accelerator, load
from hwmodels.matrix_units.attention import AttentionConstants
from hwmodels.matrix_units.tensor_core import TensorCore
from hwmodels.memory.hbm import KINDS
from hwmodels.units import InputError
from hwmodels.work import Gemm, Pass

SHORT_S = 20e-6  # below it, vidur's resolution of 1 us and the launch are what one sees
# Chips whose rows speak about this chip's cores.
RELATIVES: dict[str, tuple[str, ...]] = {
    "a100-sxm-80gb": ("a100-pcie-80gb", "a100-pcie-40gb"),
    "h100-sxm-80gb": (),
    "b200-sxm": (),
    "v100-sxm2-16gb": ("v100-pcie-32gb",),
}
# Sources that time a kernel from the host: rows below this many times the source's floor say nothing about the device.
HOST_FLOOR = {"llmcompass": 5.0}


@dataclass(frozen=True, slots=True)
class Constant:
    """One calibrated value at its path below `calibration:`, and what it rests on."""

    path: str
    value: float
    unit: str
    basis: str
    rows: int
    held_out: float
    note: str = ""
    kind: str = "fitted_on"  # or derived, assumed


@dataclass(frozen=True, slots=True)
class Line:
    """Errors of one op class and source on both halves."""

    op: str
    source: str
    fitted: Errors
    held_out: Errors


Chips = Mapping[str, Accelerator]


def chips_for(name: str) -> dict[str, Accelerator]:
    """The accelerator and its relatives, by name. Raises InputError: one that has no rule here."""
    if name not in RELATIVES:
        raise InputError(f"--hw: {name!r} has no calibration rule; there are rules for {', '.join(RELATIVES)}")
    return {chip: load(chip) for chip in (name, *RELATIVES[name])}


def predictor(chips: Chips, change: Callable[[Accelerator], Accelerator]) -> Predict:
    """A function that prices a row on its chip after `change`."""
    changed = {name: change(chip) for name, chip in chips.items()}
    return lambda row: price(changed[row.accelerator], row)


def with_gemm(chip: Accelerator, values: Mapping[str, float]) -> Accelerator:
    """The chip with some of its GEMM constants (and `memory`, the HBM share of GEMMs; `fixed_us`) replaced."""
    plain = {key: value for key, value in values.items() if key not in ("memory", "fixed_us")}
    if not isinstance(chip.matrix, TensorCore):
        raise InputError(f"--hw: {chip.name} has no tensor cores, whose constants these are")
    constants = replace(chip.matrix.constants, **plain)  # type: ignore[arg-type]
    if "fixed_us" in values:
        constants = replace(constants, fixed_time_s=values["fixed_us"] * 1e-6)
    chip = replace(chip, matrix=replace(chip.matrix, constants=constants))
    return with_memory(chip, {"gemm": values["memory"]}) if "memory" in values else chip


def with_memory(chip: Accelerator, values: Mapping[str, float]) -> Accelerator:
    """The chip with other sustained fractions of its HBM."""
    hbm = replace(chip.memory.hbm, sustained={**chip.memory.hbm.sustained, **values})
    return replace(chip, memory=replace(chip.memory, hbm=hbm))


def gemm_rows(rows: Sequence[Row], chips: Chips, source: str, formats: tuple[str, ...] = ("fp16", "bf16")) -> list[Row]:
    """Rows of GEMMs from one source that lasted at least 20 us (best shapes found by search are left out)."""
    found = []
    for row in rows:
        work = row.works[0]
        if isinstance(work, Gemm) and work.format in formats and row.op == "gemm" and row.source == source:
            found.append(row)
    return _above_floor([row for row in found if row.accelerator in chips], source)


def _above_floor(rows: Sequence[Row], source: str) -> list[Row]:
    """Rows of at least 20 us and, where a source times from the host, of five times its shortest."""
    floor = max(SHORT_S, HOST_FLOOR.get(source, 0.0) * min((row.time_s for row in rows), default=0.0))
    return [row for row in rows if row.time_s >= floor]


def calibrate_gemm(rows: Sequence[Row], chips: Chips) -> tuple[list[Constant], list[Line], dict[str, float]]:
    """Shape constants on the source with most rows; the efficiency on each source, then their mean."""
    by_source = {s: gemm_rows(rows, chips, s) for s in ("vidur", "simumax", "llmcompass", "deepbench")}
    by_source = {source: found for source, found in by_source.items() if found}
    if not by_source:
        return [], [], {}
    main = max(by_source, key=lambda source: len(by_source[source]))
    free = {
        "efficiency": Free(0.78, 0.3, 1.0),
        "tile_loss": Free(0.06, 0.0, 0.3),
        "prologue_k": Free(60.0, 5.0, 300.0),
        "last_wave": Free(0.5, 0.0, 1.0),
        "fixed_us": Free(4.0, 0.0, 10.0),
        "memory": Free(0.85, 0.4, 1.0),
    }
    if main in ("simumax", "deepbench"):  # it has all layouts
        free |= {"dgrad": Free(1.0, 0.5, 1.5), "wgrad": Free(0.96, 0.5, 1.5)}

    def model(values: dict[str, float]) -> Predict:
        return predictor(chips, lambda chip: with_gemm(chip, values))

    shape = fit(free, model, by_source[main])
    values = dict(shape.values)
    if "simumax" in by_source and main != "simumax":
        values |= _layouts(by_source["simumax"], chips, values)
    efficiencies = {main: values["efficiency"]}
    for source in by_source.keys() - {main}:
        one = fit({"efficiency": free["efficiency"]}, lambda v: model({**values, **v}), by_source[source])
        efficiencies[source] = one.values["efficiency"]
    values["efficiency"] = sum(efficiencies.values()) / len(efficiencies)
    predict = model(values)
    lines = [line_of("gemm 16-bit >= 20 us", source, predict, found) for source, found in by_source.items()]
    basis = f"{main} GEMM {'bf16' if main == 'simumax' else 'fp16'} >= 20 us"
    each = ", ".join(f"{source} {value:.3f}" for source, value in sorted(efficiencies.items()))
    held = sum(line.held_out.mean for line in lines) / len(lines)
    constants = [
        Constant(
            "gemm.efficiency",
            values["efficiency"],
            "",
            f"equal weight of {each}" if len(efficiencies) > 1 else basis,
            _fitted(by_source),
            held,
        )
    ]
    paths = {"tile_loss": "", "prologue_k": "", "last_wave": "", "fixed_us": "us"}
    for key, unit in paths.items():
        path = "gemm.fixed_time" if key == "fixed_us" else f"gemm.{key}"
        constants.append(constant_of(path, values[key], unit, basis, shape, key))
    constants.append(constant_of("memory.gemm", values["memory"], "", basis, shape, "memory"))
    for key in ("dgrad", "wgrad"):
        if key in shape.values:
            constants.append(constant_of(f"gemm.{key}", values[key], "", basis, shape, key))
        elif key in values:
            text, n = "simumax, A100 PCIe 80 GB, against its TN rows", len(by_source["simumax"])
            constants.append(Constant(f"gemm.{key}", values[key], "", text, n, held))
    return constants, lines, values


def _layouts(rows: list[Row], chips: Chips, values: Mapping[str, float]) -> dict[str, float]:
    """Rates of the layouts NN and NT over TN's, each fitted alone on its rows with the shape constants held."""
    rates = {}
    for layout in ("TN", "NN", "NT"):
        found = [row for row in rows if isinstance(row.works[0], Gemm) and row.works[0].layout == layout]
        same = {**values, "dgrad": 1.0, "wgrad": 1.0}

        def model(free: dict[str, float], same: Mapping[str, float] = same) -> Predict:
            return predictor(chips, lambda chip: with_gemm(chip, {**same, **free}))

        rates[layout] = fit({"efficiency": Free(0.78, 0.3, 1.0)}, model, found).values["efficiency"]
    return {"dgrad": rates["NN"] / rates["TN"], "wgrad": rates["NT"] / rates["TN"]}


def calibrate_simd(rows: Sequence[Row], chips: Chips, gemm: Mapping[str, float]) -> tuple[list[Constant], list[Line]]:
    """The rate of fp32 GEMMs on the vector lanes."""
    found = gemm_rows(rows, chips, "neusight", ("fp32",))
    if not found:
        return [], []

    def model(values: dict[str, float]) -> Predict:
        return predictor(chips, lambda chip: with_gemm(chip, {**gemm, **values}))

    one = fit({"simd_efficiency": Free(0.85, 0.3, 1.0)}, model, found)
    lines = [line_of("gemm fp32 >= 20 us", "neusight", model(one.values), found)]
    basis = f"neusight GEMM fp32, {' and '.join(sorted({row.accelerator for row in found}))}"
    return [
        constant_of("gemm.simd_efficiency", one.values["simd_efficiency"], "", basis, one, "simd_efficiency")
    ], lines


def calibrate_attention(rows: Sequence[Row], chips: Chips, hopper: Accelerator) -> tuple[list[Constant], list[Line]]:
    """The constants of every algorithm with rows; `hopper` gives backward over forward where only their sum was
    measured.
    """
    constants: list[Constant] = []
    lines: list[Line] = []
    for algorithm in ("flash-1", "flash-2", "flash-3", "flash-triton", "cudnn"):
        found = [row for row in rows if row.label == algorithm and row.accelerator in chips]
        if found:
            one, line = _algorithm(algorithm, found, chips, hopper.attention.get("flash-2"))
            constants += one
            lines += line
    return constants, lines


def _algorithm(
    algorithm: str, rows: list[Row], chips: Chips, split: AttentionConstants | None
) -> tuple[list[Constant], list[Line]]:
    ops = {row.op for row in rows}
    free = {"forward": Free(0.5, 0.05, 1.0), "causal": Free(0.92, 0.5, 1.0), "row_overhead": Free(150.0, 0.0, 600.0)}
    if algorithm in ("flash-1", "flash-triton"):  # large heads spill registers; the overlap cannot be told from it
        free["head_128"] = Free(0.9, 0.3, 1.5)
    else:
        free["overlap"] = Free(0.5, 0.0, 1.0)
    if any("head_dim" in f"{row.works}" and getattr(row.works[0], "head_dim", 0) > 128 for row in rows):
        free["head_256"] = Free(0.9, 0.3, 1.5)
    if len(ops) == 2:
        free["ratio"] = Free(0.85, 0.4, 1.2)
        free["backward_row_overhead"] = Free(300.0, 0.0, 900.0)
    ratio = split.backward / split.forward if split else 0.8
    rows_ratio = split.backward_row_overhead / max(1.0, split.row_overhead) if split else 2.5

    def constants(values: Mapping[str, float]) -> AttentionConstants:
        full = dict(values)
        full["backward"] = min(1.0, full["forward"] * full.pop("ratio", ratio))
        full.setdefault("backward_row_overhead", full["row_overhead"] * rows_ratio)
        return AttentionConstants(**full)

    def model(values: dict[str, float]) -> Predict:
        return predictor(chips, lambda chip: replace(chip, attention={algorithm: constants(values)}))

    one = fit(free, model, rows)
    final = constants(one.values)
    predict = model(one.values)
    basis = f"flash_attention charts, {' and '.join(sorted(ops))}"
    found = []
    for key in fields(AttentionConstants):
        path, value = f"attention.{algorithm}.{key.name}", getattr(final, key.name)
        if key.name in free or (key.name == "backward" and "ratio" in free):
            found.append(constant_of(path, value, "", basis, one, key.name))
        elif key.name.startswith("backward"):
            text = "backward over forward as flash-2 on H100, the only one measured apart"
            found.append(Constant(path, value, "", text, 0, 0.0, kind="derived"))
    return found, [
        line_of(f"{op} {algorithm}", "flash_attention", predict, [r for r in rows if r.op == op]) for op in sorted(ops)
    ]


def pass_rows(rows: Sequence[Row], chips: Chips, op: str) -> dict[str, list[Row]]:
    """Rows of one op by source, without those that time the host."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.op == op and row.accelerator in chips:
            found.setdefault(row.source, []).append(row)
    return {source: _above_floor(rows, source) for source, rows in found.items()}


REPORTED = (
    *("elementwise_add", "elementwise_gelu", "elementwise_tanh", "elementwise_relu", "elementwise_silu_mul"),
    *("softmax", "layernorm", "rmsnorm", "embedding"),
)


def calibrate_passes(rows: Sequence[Row], chips: Chips) -> tuple[list[Constant], list[Line]]:
    """The sustained HBM fraction of streams from add, instructions of a special function from gelu and of a row
    kernel from softmax and layernorm: each fitted to each source (and op) whose rows determine it, then the mean.
    """
    stages = (
        ("memory.stream", "stream", Free(0.8, 0.3, 0.95), 0.2, ("elementwise_add",)),
        (
            "pass.instructions_per_special",
            "instructions_per_special",
            Free(25.0, 1.0, 60.0),
            10.0,
            ("elementwise_gelu",),
        ),
        (
            "pass.row_instructions_per_byte",
            "row_instructions_per_byte",
            Free(16.0, 1.0, 40.0),
            10.0,
            ("softmax", "layernorm"),
        ),
    )
    constants: list[Constant] = []
    values: dict[str, float] = {}
    for path, key, free, spread, ops in stages:
        fits: dict[str, Fit] = {}
        by_source: dict[str, list[Row]] = {}
        for op in ops:
            for source, found in pass_rows(rows, chips, op).items():
                label = source if len(ops) == 1 else f"{source} {op}"
                by_source[label] = [row for row in found if key != "stream" or _larger_than_cache(row, chips)]
        for source, found in by_source.items():
            if sum(row.fitted for row in found) >= (4 if key == "stream" else 1):

                def model(free_values: dict[str, float], held: Mapping[str, float] = values) -> Predict:
                    return predictor(chips, lambda chip: with_passes(chip, {**held, **free_values}))

                one = fit({key: free}, model, found)
                if one.uncertainty[key] < spread:
                    fits[source] = one
        if fits:
            values = {**values, key: sum(one.values[key] for one in fits.values()) / len(fits)}
            if key == "stream":
                values["row"] = values["stream"]
            constants += _equal_weight(path, key, values[key], fits, ops)
    predict = predictor(chips, lambda chip: with_passes(chip, values))
    lines = [
        line_of(f"{op} >= 20 us", source, predict, found)
        for op in REPORTED
        for source, found in pass_rows(rows, chips, op).items()
    ]
    return constants, lines


def _equal_weight(path: str, key: str, value: float, fits: Mapping[str, Fit], ops: tuple[str, ...]) -> list[Constant]:
    each = ", ".join(f"{source} {one.values[key]:.3g}" for source, one in sorted(fits.items()))
    basis = (f"equal weight of {each}" if len(fits) > 1 else each) + f" ({', '.join(ops)})"
    held = sum(one.held_out.mean for one in fits.values()) / len(fits)
    found = [Constant(path, value, "", basis, sum(one.fitted.rows for one in fits.values()), held)]
    if key == "stream":
        found.append(
            Constant(
                "memory.row",
                value,
                "",
                "as stream; row kernels are slower by their instructions",
                0,
                0.0,
                kind="derived",
            )
        )
    return found


def with_passes(chip: Accelerator, values: Mapping[str, float]) -> Accelerator:
    """The chip with other sustained fractions of its HBM and other instruction counts of passes."""
    chip = with_memory(chip, {key: value for key, value in values.items() if key in KINDS})
    return replace(chip, passes=replace(chip.passes, **{key: v for key, v in values.items() if key not in KINDS}))


def _larger_than_cache(row: Row, chips: Chips) -> bool:
    work = row.works[0]
    cache = chips[row.accelerator].memory.sram.capacity_bytes
    return isinstance(work, Pass) and work.read_bytes + work.write_bytes > 1.5 * cache


def line_of(op: str, source: str, predict: Predict, rows: Sequence[Row]) -> Line:
    """The errors of `rows` on both halves."""
    halves = [row for row in rows if row.fitted], [row for row in rows if not row.fitted]
    return Line(op, source, errors(predict, halves[0]), errors(predict, halves[1]))


def constant_of(path: str, value: float, unit: str, basis: str, one: Fit, key: str, note: str = "") -> Constant:
    """One fitted value, with what its fit said about it."""
    if key in one.at_bound:
        note = note or "ended on its bound"
    elif one.uncertainty.get(key, 0.0) > abs(value):
        note = note or "hardly determined by these rows"
    return Constant(path, value, unit, basis, one.fitted.rows, one.held_out.mean, note)


def _fitted(by_source: Mapping[str, Sequence[Row]]) -> int:
    return sum(row.fitted for rows in by_source.values() for row in rows)
