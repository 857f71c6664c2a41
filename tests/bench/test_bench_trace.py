"""What recording costs: microseconds per operator of a traced step, and seconds for Llama-3-70B."""

from typing import Any

import pytest

from cosim.trace import TraceOptions, trace
from workloads.named import load

OPTIONS = TraceOptions(parameter_format="bf16", master_format="fp32", gradient_format="fp32", sequence=8192)


@pytest.mark.parametrize("name", ["gpt2-small", "llama3-8b", "llama3-70b"])
def test_trace(benchmark: Any, capsys: Any, name: str) -> None:
    model = load(name)
    graph = benchmark.pedantic(trace, args=(model, OPTIONS), rounds=1, warmup_rounds=0)
    if benchmark.stats is not None:
        seconds = benchmark.stats.stats.mean
        benchmark.extra_info["us_per_op"] = seconds / len(graph) * 1e6
        with capsys.disabled():
            print(f"\n{name}: {len(graph)} ops in {seconds:.2f} s, {seconds / len(graph) * 1e6:.0f} us per op")
