"""Which constants of passes over memory are fitted on which published kernels."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from cosim.calibrate.constants import Chips, Constant, Line, above_floor, line_of, predictor, with_memory
from cosim.calibrate.fit import Fit, Free, Predict, fit
from cosim.calibrate.rows import Row
from hwmodels.accelerator import Accelerator
from hwmodels.memory.hbm import KINDS
from hwmodels.work import Pass


def pass_rows(rows: Sequence[Row], chips: Chips, op: str) -> dict[str, list[Row]]:
    """Rows of one op by source, without those that time the host."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.op == op and row.accelerator in chips:
            found.setdefault(row.source, []).append(row)
    return {source: above_floor(rows, source) for source, rows in found.items()}


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
