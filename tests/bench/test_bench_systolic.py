"""How long it takes to count a systolic array's cycles."""

from typing import Any

from hwmodels.matrix_units.systolic_array import SystolicArray


def test_cycles_of_1024_cubed(benchmark: Any, capsys: Any) -> None:
    unit = SystolicArray(32, 32, 1, "output-stationary", 1e9, {"bf16": 1.0}, double_buffering=False)
    assert benchmark(unit.cycles, 1024, 1024, 1024) == 1_112_064
    if benchmark.stats is not None:
        with capsys.disabled():
            print(f"\nsystolic cycles of 1024^3: {benchmark.stats.stats.median * 1e6:.2f} us")
