"""How long the tiling and cost of one product take, new and asked before."""

from collections.abc import Callable
from typing import Any

import pytest

from hwmodels.accelerator import load
from hwmodels.work import Gemm

SHAPES = {
    "square": Gemm(4096, 4096, 4096),
    "wide": Gemm(4096, 28672, 8192),
    "split along k": Gemm(256, 256, 65536),
    "ragged batch": Gemm(1000, 777, 333, 3),
}


def _report(benchmark: Any, capsys: Any, what: str) -> None:
    if benchmark.stats is not None:
        best, median = benchmark.stats.stats.min * 1e6, benchmark.stats.stats.median * 1e6
        with capsys.disabled():
            print(f"\n{what}: {best:.2f} us at best, median {median:.2f}")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["h100-sxm-80gb", "tpu-v5p"])
def test_tiling_and_cost_of_a_new_shape(benchmark: Any, capsys: Any, name: str, shape: str) -> None:
    chip, work = load(name), SHAPES[shape]

    def forget() -> tuple[tuple[Gemm], dict[str, Any]]:
        chip._costs.clear()
        return (work,), {}

    benchmark.pedantic(chip.cost, setup=forget, rounds=3000, warmup_rounds=50)
    _report(benchmark, capsys, f"tiling and cost of a product, {shape}, {name}")


def test_a_shape_that_was_asked_before(benchmark: Any, capsys: Any) -> None:
    chip, work = load("h100-sxm-80gb"), SHAPES["square"]
    price: Callable[[Gemm], Any] = chip.cost
    first = price(work)
    assert benchmark(price, work) is first
    _report(benchmark, capsys, "cost of a product that was asked before")
