"""Which constants of passes over memory are fitted on which published kernels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt

from cosim.calibrate.constants import Chips, Constant, Line, above_floor, line_of, mean_held_out, predictor, with_memory
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


_SPECIAL = "instructions_per_special"
_ROW, _ROW_CACHE = "row_instructions_per_byte", "row_cache"
_STREAM_MIN, _MIN = 4, 1  # rows of the fitted half


@dataclass(frozen=True, slots=True)
class Stage:
    """Constants fitted together on rows of `ops`, the first of them kept; one whose standard error is above `spread` is
    not determined.
    """

    key: str
    spread: float
    ops: tuple[str, ...]
    free: Mapping[str, Free]
    starts: tuple[Mapping[str, float], ...] = ()


_INSTRUCTIONS = Free(16.0, 1.0, 40.0)
STAGES = (
    Stage("stream", 0.2, ("elementwise_add",), {"stream": Free(0.8, 0.3, 0.95)}),
    Stage(_SPECIAL, 10.0, ("elementwise_gelu",), {_SPECIAL: Free(25.0, 1.0, 60.0)}),
    # Only softmax has rows on both sides of what the cache holds; there are several valleys.
    Stage(
        _ROW_CACHE,
        0.2,
        ("softmax",),
        {_ROW_CACHE: Free(0.2, 0.02, 1.0), _ROW: _INSTRUCTIONS},
        ({_ROW: 30.0}, {_ROW: 22.0, _ROW_CACHE: 0.45}),
    ),
    Stage(_ROW, 10.0, ("softmax", "layernorm"), {_ROW: _INSTRUCTIONS}, ({_ROW: 30.0},)),
)


def calibrate_passes(rows: Sequence[Row], chips: Chips) -> tuple[list[Constant], list[Line]]:
    """The sustained HBM fraction of streams from add, instructions of a special function from gelu, of a row kernel and
    the cache that its rows fill from softmax and layernorm: each fitted to each source (and op) whose rows determine
    it, then the mean.
    """
    constants: list[Constant] = []
    values: dict[str, float] = {}
    for stage in STAGES:
        fits = _fits(stage, rows, chips, values)
        key = stage.key
        sure = {source: one for source, one in fits.items() if one.uncertainty[key] < stage.spread}
        if sure:
            values[key] = sum(one.values[key] for one in sure.values()) / len(sure)
            constants += _equal_weight(key, values[key], sure, stage.ops)
        if "stream" in values:
            values.setdefault("row", values["stream"])
    predict = predictor(chips, lambda chip: with_passes(chip, values))
    lines = [
        line_of(f"{op} >= 20 us", source, predict, found)
        for op in REPORTED
        for source, found in pass_rows(rows, chips, op).items()
    ]
    return constants, lines


def _fits(stage: Stage, rows: Sequence[Row], chips: Chips, held: Mapping[str, float]) -> dict[str, Fit]:
    """A fit for each source, and each op where there are several."""

    def model(free_values: dict[str, float]) -> Predict:
        return predictor(chips, lambda chip: with_passes(chip, {**held, **free_values}))

    stream = stage.key == "stream"
    fits: dict[str, Fit] = {}
    for op in stage.ops:
        for source, every in pass_rows(rows, chips, op).items():
            found = [row for row in every if not stream or _larger_than_cache(row, chips)]
            if sum(row.fitted for row in found) >= (_STREAM_MIN if stream else _MIN):
                label = source if len(stage.ops) == 1 else f"{source} {op}"
                fits[label] = fit(stage.free, model, found, stage.starts)
    return fits


def _equal_weight(key: str, value: float, fits: Mapping[str, Fit], ops: tuple[str, ...]) -> list[Constant]:
    each = ", ".join(f"{source} {one.values[key]:.3g}" for source, one in sorted(fits.items()))
    basis = (f"equal weight of {each}" if len(fits) > 1 else each) + f" ({', '.join(ops)})"
    held = mean_held_out([one.held_out for one in fits.values()])
    count = sum(one.fitted.rows for one in fits.values())
    single = next(iter(fits.values())).uncertainty[key]
    error = sqrt(sum((one.values[key] - value) ** 2 for one in fits.values())) / len(fits) if len(fits) > 1 else single
    path = f"memory.{key}" if key in KINDS else f"pass.{key}"
    found = [Constant(path, value, "", basis, count, held, uncertainty=error)]
    if key == "stream":
        text = "as stream; row kernels are slower by their instructions"
        found.append(Constant("memory.row", value, "", text, 0, None, kind="derived"))
    return found


def with_passes(chip: Accelerator, values: Mapping[str, float]) -> Accelerator:
    """The chip with other sustained fractions of its HBM and other instruction counts of passes."""
    chip = with_memory(chip, {key: value for key, value in values.items() if key in KINDS})
    return replace(chip, passes=replace(chip.passes, **{key: v for key, v in values.items() if key not in KINDS}))


def _larger_than_cache(row: Row, chips: Chips) -> bool:
    work = row.works[0]
    cache = chips[row.accelerator].memory.sram.capacity_bytes
    return isinstance(work, Pass) and work.read_bytes + work.write_bytes > 1.5 * cache
