"""How long it takes to count a systolic array's cycles, and to price a product with its tiling."""

from typing import Any

from hwmodels.accelerator import load
from hwmodels.matrix_units.systolic_array import SystolicArray
from hwmodels.work import Gemm


def test_cycles_of_1024_cubed(benchmark: Any, capsys: Any) -> None:
    unit = SystolicArray(32, 32, 1, "output-stationary", 1e9, {"bf16": 1.0}, double_buffering=False)
    assert benchmark(unit.cycles, 1024, 1024, 1024) == 1_112_064
    if benchmark.stats is not None:
        with capsys.disabled():
            print(f"\nsystolic cycles of 1024^3: {benchmark.stats.stats.median * 1e6:.2f} us")


def test_price_of_a_product(benchmark: Any, capsys: Any) -> None:
    chip = load("tpu-v5p")
    work = Gemm(4096, 28672, 8192)
    benchmark(chip.matrix.gemm, work, chip.memory.sram, chip.memory.hbm, 0.0)
    if benchmark.stats is not None:
        with capsys.disabled():
            print(f"\ntiling and cost of a product on systolic arrays: {benchmark.stats.stats.median * 1e6:.2f} us")
