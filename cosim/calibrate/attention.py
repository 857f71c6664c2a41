"""Which constants of attention are fitted on which published kernels, each algorithm on its own rows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial

from cosim.calibrate.constants import Chips, Constant, Line, constant_of, line_of, predictor
from cosim.calibrate.fit import Free, Predict, cross_validated, fit
from cosim.calibrate.rows import Row
from hwmodels.accelerator import load
from hwmodels.matrix_units.attention import AttentionConstants
from hwmodels.work import Attention

_REFERENCE = "h100-sxm-80gb"  # the only chip with rows of forward alone and of forward with backward
_LENDER = "a100-sxm-80gb"  # lends the shape constants of an algorithm of which a chip has few rows
_SHAPE = ("row_overhead", "causal", "head_128")
_PLENTY = 3  # rows of the fitted half for a constant; below it, a lent shape is tried
_FEWEST = 6  # rows of the fitted half: as many as there are constants
_ORDER = ("flash-2", "flash-1", "flash-3", "flash-triton", "cudnn")


def calibrate_attention(rows: Sequence[Row], chips: Chips) -> tuple[list[Constant], list[Line]]:
    """The constants of every algorithm with rows; backward over forward is flash-2's on H100 where only their sum, or
    only forward, was measured.
    """
    constants: list[Constant] = []
    lines: list[Line] = []
    split = load(_REFERENCE).attention.get("flash-2")
    for algorithm in _ORDER:
        found = [row for row in rows if row.label == algorithm and row.accelerator in chips]
        if sum(row.fitted for row in found) >= _FEWEST:
            one, line, fitted = _algorithm(algorithm, found, chips, split)
            constants += one
            lines += line
            if algorithm == "flash-2" and _REFERENCE in chips:
                split = fitted
    return constants, lines


Build = Callable[[Mapping[str, float]], AttentionConstants]


def _algorithm(
    algorithm: str, rows: list[Row], chips: Chips, split: AttentionConstants | None
) -> tuple[list[Constant], list[Line], AttentionConstants]:
    free = _free(algorithm, rows)
    build: Build = partial(_constants, split=split)

    def model(build: Build) -> Callable[[dict[str, float]], Predict]:
        def predict(values: dict[str, float]) -> Predict:
            return predictor(chips, lambda chip: replace(chip, attention={algorithm: build(values)}))

        return predict

    note, lent = "", _lent(algorithm, chips)
    if lent is not None and sum(row.fitted for row in rows) < _PLENTY * len(free):
        rate = {"forward": free["forward"]}
        borrowed: Build = partial(_borrowed, shape=lent, split=split)
        parts = min(10, sum(row.fitted for row in rows))
        apart = [cross_validated(f, model(b), rows, parts) for f, b in ((free, build), (rate, borrowed))]
        if apart[1] < apart[0]:
            free, build = rate, borrowed
            note = f"cross-validated {apart[1]:.1%}; {apart[0]:.1%} with a shape of its own"
    one = fit(free, model(build), rows)
    final = build(one.values)
    ops = sorted({row.op for row in rows})
    charts = "flash_attention charts" if {row.source for row in rows} == {"flash_attention"} else "kernels"
    basis = f"{charts}, {' and '.join(ops)}"
    found = []
    for key in fields(AttentionConstants):
        path, value = f"attention.{algorithm}.{key.name}", getattr(final, key.name)
        if key.name in free or (key.name == "backward" and "ratio" in free):
            fitted = "ratio" if key.name == "backward" else key.name
            found.append(constant_of(path, value, "", basis, one, fitted, note))
        elif key.name.startswith("backward"):
            text = "backward over forward as flash-2 on H100, the only one measured apart"
            found.append(Constant(path, value, "", text, 0, None, kind="derived"))
        elif note and key.name in _SHAPE:
            found.append(Constant(path, value, "", f"as {_LENDER}, which has more rows", 0, None, kind="derived"))
    predict = model(build)(one.values)
    lines = [
        line_of(f"{op} {algorithm}", source, predict, [r for r in rows if (r.op, r.source) == (op, source)])
        for op, source in sorted({(row.op, row.source) for row in rows})
    ]
    return found, lines, final


def _free(algorithm: str, rows: Sequence[Row]) -> dict[str, Free]:
    free = {"forward": Free(0.5, 0.05, 1.0), "causal": Free(0.92, 0.5, 1.0), "row_overhead": Free(150.0, 0.0, 600.0)}
    if algorithm in ("flash-1", "flash-triton"):  # large heads spill registers; the overlap cannot be told from it
        free["head_128"] = Free(0.9, 0.3, 1.5)
    else:
        free["overlap"] = Free(0.5, 0.0, 1.0)
    if any(isinstance(work, Attention) and work.head_dim > 128 for row in rows for work in row.works):
        free["head_256"] = Free(0.9, 0.3, 1.5)
    if len({row.op for row in rows}) == 2:
        free["ratio"] = Free(0.85, 0.4, 1.2)
        free["backward_row_overhead"] = Free(300.0, 0.0, 900.0)
    return free


def _constants(values: Mapping[str, float], split: AttentionConstants | None) -> AttentionConstants:
    """All constants; backward's follow forward's as in `split` where they are not among `values`."""
    ratio = split.backward / split.forward if split else 0.8
    rows_ratio = split.backward_row_overhead / max(1.0, split.row_overhead) if split else 2.5
    full = dict(values)
    full["backward"] = min(1.0, full["forward"] * full.pop("ratio", ratio))
    full.setdefault("backward_row_overhead", full["row_overhead"] * rows_ratio)
    return AttentionConstants(**full)


def _borrowed(
    values: Mapping[str, float], shape: AttentionConstants, split: AttentionConstants | None
) -> AttentionConstants:
    return _constants({**{key: getattr(shape, key) for key in _SHAPE}, **values}, split)


def _lent(algorithm: str, chips: Chips) -> AttentionConstants | None:
    """The algorithm's constants on the chip with most rows of it, if that is another one."""
    return None if _LENDER in chips else load(_LENDER).attention.get(algorithm)
