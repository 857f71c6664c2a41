"""Cycles of systolic arrays: SCALE-Sim's closed forms and runs, and an array simulated cell by cell."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hwmodels.matrix_units.systolic_array import SystolicArray

Matrix = NDArray[np.int64]
Value = TypeVar("Value")
OS, WS, IS = "output-stationary", "weight-stationary", "input-stationary"
DATAFLOWS = (OS, WS, IS)


def array(rows: int, columns: int, dataflow: str, double_buffering: bool = False, count: int = 1) -> SystolicArray:
    return SystolicArray(rows, columns, count, dataflow, 1e9, {"bf16": 1.0}, double_buffering)


def scale_sim(unit: SystolicArray, m: int, n: int, k: int) -> int:
    """SCALE-Sim v3's compute cycles on divisible shapes."""
    r, c = unit.rows, unit.columns
    if unit.dataflow == OS:
        return (m // r) * (n // c) * (r + c + k - 2)
    if unit.dataflow == WS:
        return (k // r) * (n // c) * (2 * r + c + m - 2)
    return (k // r) * (m // c) * (2 * r + c + n - 2)


# "Total Cycles" of SCALE-Sim v3's COMPUTE_REPORT.csv, which prints one less than the cycles that pass: calculated
# bandwidth mode, no stalls, (rows, columns), (m, n, k), {dataflow: cycles}.
RUNS = [
    ((32, 32), (1024, 1024, 1024), {OS: 1_112_063, WS: 1_144_831}),
    ((32, 32), (512, 512, 512), {OS: 146_943, WS: 155_135, IS: 155_135}),
    ((32, 32), (128, 128, 128), {OS: 3_039, WS: 3_551, IS: 3_551}),
    ((32, 32), (64, 128, 256), {OS: 2_543, WS: 5_055, IS: 3_551}),
    ((16, 32), (64, 128, 256), {OS: 4_831, WS: 8_063, IS: 6_079}),
]


@pytest.mark.parametrize(("size", "shape", "printed"), RUNS)
def test_equal_to_the_runs_of_scale_sim(
    size: tuple[int, int], shape: tuple[int, int, int], printed: dict[str, int]
) -> None:
    for dataflow, cycles in printed.items():
        assert array(*size, dataflow).cycles(*shape) == cycles + 1, dataflow


@given(
    st.sampled_from(DATAFLOWS),
    *(st.integers(1, 64) for _ in range(2)),
    *(st.integers(1, 20) for _ in range(3)),
)
def test_equal_to_the_closed_forms_of_scale_sim_on_divisible_shapes(
    dataflow: str, rows: int, columns: int, m: int, n: int, k: int
) -> None:
    unit = array(rows, columns, dataflow)
    lengths = {OS: (rows, columns, 1), WS: (1, columns, rows), IS: (columns, 1, rows)}[dataflow]
    shape = (m * lengths[0], n * lengths[1], k * lengths[2])
    assert unit.cycles(*shape) == scale_sim(unit, *shape)


# The array, cell by cell. Registers change at the end of a cycle.


@dataclass
class Fold:
    """One fold: what stays (or, output-stationary, comes from the top), and what streams in from the left."""

    top: Matrix
    left: Matrix
    start: int = 0
    summed: Matrix | None = None  # what the simulated cells summed up

    @property
    def result(self) -> Matrix:
        return self.left @ self.top


class Clash(Exception):
    """Two values at one port, or a sum that is wrong."""


def play_output_stationary(folds: list[Fold], rows: int, columns: int) -> int:
    """The cycle in which the last sum has left. A column hands out one sum per cycle, when its cell is done with it."""
    right: dict[tuple[int, int], tuple[int, int]] = {}  # cell -> (fold, value) that it works on in this cycle
    down: dict[tuple[int, int], tuple[int, int]] = {}
    sums = [np.zeros_like(fold.result) for fold in folds]
    seen = [np.zeros_like(fold.result) for fold in folds]
    left_over = sum(fold.result.size for fold in folds)
    cycle = min(fold.start for fold in folds)
    while left_over:
        right = {(i, j + 1): value for (i, j), value in right.items() if j + 1 < columns}
        down = {(i + 1, j): value for (i, j), value in down.items() if i + 1 < rows}
        for f, fold in enumerate(folds):
            steps = fold.top.shape[0]
            for i in range(fold.left.shape[0]):
                if 0 <= cycle - fold.start - i < steps:
                    _enter(right, (i, 0), (f, int(fold.left[i, cycle - fold.start - i])))
            for j in range(fold.top.shape[1]):
                if 0 <= cycle - fold.start - j < steps:
                    _enter(down, (0, j), (f, int(fold.top[cycle - fold.start - j, j])))
        leaving: set[int] = set()
        for cell in right.keys() & down.keys():
            (f, a), (g, b) = right[cell], down[cell]
            if cell[0] >= folds[f].left.shape[0] or cell[1] >= folds[g].top.shape[1]:
                continue
            if f != g:
                raise Clash
            sums[f][cell] += a * b
            seen[f][cell] += 1
            if seen[f][cell] == folds[f].top.shape[0]:
                if cell[1] in leaving:
                    raise Clash
                leaving.add(cell[1])
                left_over -= 1
        cycle += 1
    _check(folds, sums)
    return cycle


def play_stationary(folds: list[Fold], rows: int, columns: int, shadows: bool) -> int:
    """The cycle in which the last sum has left at the bottom. `fold.start` is when its stream enters.

    Weights shift in from the top and are there just in time; with `shadows` into a second register of each cell, column
    after column and row after row as the stream will come, which becomes the first one when the stream arrives.
    """
    held = np.zeros((rows, columns), np.int64)
    shadow = np.zeros((rows, columns), np.int64)
    right: dict[tuple[int, int], tuple[int, int]] = {}
    down: dict[tuple[int, int], tuple[int, int, int]] = {}  # cell -> (fold, row of the result, sum so far)
    results = [np.zeros_like(fold.result) for fold in folds]
    left_over = sum(fold.result.size for fold in folds)
    cycle: int = min(fold.start - fold.top.shape[0] for fold in folds)
    while left_over:
        right = {(i, j + 1): value for (i, j), value in right.items() if j + 1 < columns}
        for f, fold in enumerate(folds):
            for i in range(fold.top.shape[0]):
                if 0 <= cycle - fold.start - i < fold.left.shape[0]:
                    _enter(right, (i, 0), (f, int(fold.left[cycle - fold.start - i, i])))
            if shadows:
                for i, j in np.ndindex(fold.top.shape):
                    if cycle == fold.start + i + j:
                        held[i, j] = shadow[i, j]
        passed: dict[tuple[int, int], tuple[int, int, int]] = {}
        for f, fold in enumerate(folds):  # a sum starts in row 0 with the first operand of its row
            for j in range(fold.top.shape[1]):
                row = cycle - fold.start - j
                if 0 <= row < fold.left.shape[0]:
                    _enter(down, (0, j), (f, row, 0))
        for (i, j), (f, row, value) in down.items():
            if (i, j) in right:
                g, x = right[i, j]
                if g != f:
                    raise Clash
                value += x * int(held[i, j])
            if i + 1 < rows:
                passed[i + 1, j] = (f, row, value)
            else:
                results[f][row, j] += value
                left_over -= 1
        down = passed
        for fold in folds:  # end of the cycle: weights move down by one row
            deep, wide = fold.top.shape
            register = shadow if shadows else held
            for j in range(wide):
                step = cycle - (fold.start - deep) - (j if shadows else 0)
                if 0 <= step < deep:
                    for i in range(min(step, deep - 1), 0, -1):
                        register[i, j] = register[i - 1, j]
                    register[0, j] = fold.top[deep - 1 - step, j]
        cycle += 1
    _check(folds, results)
    return cycle


def _enter(port: dict[tuple[int, int], Value], cell: tuple[int, int], value: Value) -> None:
    if cell in port:
        raise Clash
    port[cell] = value


def _check(folds: list[Fold], results: list[Matrix]) -> None:
    if not all(np.array_equal(fold.result, found) for fold, found in zip(folds, results, strict=True)):
        raise Clash
    for fold, found in zip(folds, results, strict=True):
        fold.summed = found


def folds_of(unit: SystolicArray, a: Matrix, b: Matrix) -> list[tuple[Fold, tuple[slice, slice]]]:
    """The folds of a @ b, smallest first, and where each one's result is added up."""
    m, n, k = a.shape[0], b.shape[1], a.shape[1]

    def cut(size: int, part: int) -> list[slice]:
        return [slice(start, min(start + part, size)) for start in range(0, size, part)]

    found = []
    if unit.dataflow == OS:
        for i, j in itertools.product(cut(m, unit.rows), cut(n, unit.columns)):
            found.append((Fold(b[:, j], a[i]), (i, j)))
        return sorted(found, key=lambda one: one[0].result.shape)
    wide = n if unit.dataflow == WS else m
    for i, j in itertools.product(cut(k, unit.rows), cut(wide, unit.columns)):
        if unit.dataflow == WS:
            found.append((Fold(b[i, j], a[:, i]), (slice(None), j)))
        else:
            found.append((Fold(a.T[i, j], b.T[:, i]), (slice(None), j)))
    return sorted(found, key=lambda one: one[0].top.shape)


def brute_force(unit: SystolicArray, folds: Iterable[Fold]) -> int:
    """Cycles until all folds are done, each started as soon as the simulation lets it.

    Without double buffering nothing of a fold is in the array before the last one has left. With it, a start is tried
    cycle by cycle until no port clashes and every sum is right.
    """
    stationary = unit.dataflow != OS

    def play(some: list[Fold]) -> int:
        if stationary:
            return play_stationary(some, unit.rows, unit.columns, unit.double_buffering)
        return play_output_stationary(some, unit.rows, unit.columns)

    done: list[Fold] = []
    end = 0
    for fold in folds:
        load = fold.top.shape[0] if stationary else 0
        if not unit.double_buffering or not done:
            fold.start = end + load
            end = play([fold])
        else:
            fold.start = done[-1].start + 1
            while True:
                try:
                    end = max(end, play([*done[-6:], fold]))
                    break
                except Clash:
                    fold.start += 1
        done.append(fold)
    return end


def simulated(unit: SystolicArray, a: Matrix, b: Matrix) -> tuple[int, Matrix]:
    """Cycles, and the product that the cells summed up."""
    folds = folds_of(unit, a, b)
    cycles = brute_force(unit, (fold for fold, _ in folds))
    m, n = a.shape[0], b.shape[1]
    product = np.zeros((n, m) if unit.dataflow == IS else (m, n), np.int64)
    for fold, place in folds:
        assert fold.summed is not None
        product[place] += fold.summed
    return cycles, product.T if unit.dataflow == IS else product


SMALL = st.integers(1, 7)
ARRAYS = st.builds(array, st.integers(1, 4), st.integers(1, 4), st.sampled_from(DATAFLOWS), st.booleans())


@given(ARRAYS, SMALL, SMALL, SMALL)
@settings(max_examples=150, deadline=None)
def test_equal_to_an_array_simulated_cell_by_cell_whose_product_is_right(
    unit: SystolicArray, m: int, n: int, k: int
) -> None:
    random = np.random.default_rng(m + 10 * n + 100 * k)
    a, b = random.integers(1, 1000, (m, k)), random.integers(1, 1000, (k, n))
    cycles, product = simulated(unit, a, b)
    assert unit.cycles(m, n, k) == cycles
    assert np.array_equal(product, a @ b)


@pytest.mark.parametrize("double_buffering", [False, True])
@pytest.mark.parametrize("dataflow", DATAFLOWS)
@pytest.mark.parametrize("shape", [(5, 7, 6), (3, 3, 7), (7, 2, 5), (1, 7, 1), (6, 1, 9), (4, 6, 3)])
def test_products_on_ragged_edges_are_those_of_numpy(
    shape: tuple[int, int, int], dataflow: str, double_buffering: bool
) -> None:
    """3 x 2 cells: m, n and k leave a rest in most folds; what the cells sum up is the product, in that many cycles."""
    m, n, k = shape
    unit = array(3, 2, dataflow, double_buffering)
    random = np.random.default_rng(7)
    a, b = random.integers(-50, 50, (m, k)), random.integers(-50, 50, (k, n))
    cycles, product = simulated(unit, a, b)
    assert np.array_equal(product, a @ b)
    assert unit.cycles(m, n, k) == cycles


@given(ARRAYS, st.integers(2, 4), SMALL, SMALL, SMALL)
@settings(max_examples=50, deadline=None)
def test_several_arrays_are_done_when_the_one_with_the_largest_folds_is(
    unit: SystolicArray, count: int, m: int, n: int, k: int
) -> None:
    random = np.random.default_rng(m + 10 * n + 100 * k)
    a, b = random.integers(1, 1000, (m, k)), random.integers(1, 1000, (k, n))
    folds = [fold for fold, _ in folds_of(unit, a, b)]
    if not unit.double_buffering:  # a fold's time goes with rows + columns
        folds.sort(key=lambda fold: sum(fold.result.shape if unit.dataflow == OS else fold.top.shape))
    dealt = [folds[::-1][i::count][::-1] for i in range(count)]
    slowest = max(brute_force(unit, mine) for mine in dealt if mine)
    assert replace(unit, count=count).cycles(m, n, k) == slowest


def test_double_buffering_hides_loading_and_draining_under_the_stream() -> None:
    """1024^3 on 32 x 32: 1024 folds of 1024 steps; one load, one skew and one drain are left over."""
    assert array(32, 32, WS, True).cycles(1024, 1024, 1024) == 1024 * 1024 + 32 + 32 + 32 - 2
    assert array(32, 32, OS, True).cycles(1024, 1024, 1024) == 1024 * 1024 + 32 + 32 - 2
    # a stream that is shorter than the load: the load is what is left
    assert array(32, 32, WS, True).cycles(1, 1024, 1024) == 1024 * 32 + 1 + 32 + 32 - 2


SIZES = st.integers(1, 3000)
CHIPS = st.builds(
    array, st.integers(1, 256), st.integers(1, 256), st.sampled_from(DATAFLOWS), st.booleans(), st.integers(1, 16)
)


@given(CHIPS, SIZES, SIZES, SIZES, st.integers(1, 8))
@settings(max_examples=200, deadline=None)
def test_never_fewer_cycles_than_multiply_accumulates_over_cells(
    unit: SystolicArray, m: int, n: int, k: int, batch: int
) -> None:
    cycles = unit.cycles(m, n, k, batch)
    assert cycles * unit.rows * unit.columns * unit.count >= batch * m * n * k
    assert replace(unit, double_buffering=True).cycles(m, n, k, batch) <= replace(unit, double_buffering=False).cycles(
        m, n, k, batch
    )


@given(CHIPS, SIZES, SIZES, SIZES, st.integers(0, 2), st.integers(1, 300))
@settings(max_examples=300, deadline=None)
def test_a_larger_product_never_takes_fewer_cycles(
    unit: SystolicArray, m: int, n: int, k: int, which: int, more: int
) -> None:
    larger = [m, n, k]
    larger[which] += more
    assert unit.cycles(*larger) >= unit.cycles(m, n, k)
    assert unit.cycles(m, n, k, 2) >= unit.cycles(m, n, k, 1)


@given(CHIPS, SIZES, SIZES, SIZES)
def test_more_arrays_never_take_more_cycles(unit: SystolicArray, m: int, n: int, k: int) -> None:
    assert replace(unit, count=unit.count + 1).cycles(m, n, k) <= unit.cycles(m, n, k)


@given(CHIPS, SIZES, SIZES, SIZES)
def test_a_cell_with_two_multipliers_halves_k_and_one_that_takes_two_cycles_doubles_the_stream(
    unit: SystolicArray, m: int, n: int, k: int
) -> None:
    assert unit.cycles(m, n, k, rate=2.0) == unit.cycles(m, n, -(-k // 2))
    slow = {OS: (m, n, 2 * k), WS: (2 * m, n, k), IS: (m, 2 * n, k)}[unit.dataflow]
    assert unit.cycles(m, n, k, rate=0.5) == unit.cycles(*slow)
