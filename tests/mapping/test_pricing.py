"""Prices of ops and their segments, against the trace's own count of FLOPs and brute force over kernels."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cosim import stacks
from cosim.graph import Phase
from cosim.mapping.pricing import Kernels, price
from cosim.mapping.segments import boundaries, host_times
from cosim.trace.vocabulary import flops
from hwmodels.accelerator import Accelerator

Step = Callable[..., Any]


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_products_are_priced_with_the_flops_that_the_trace_counts(step: Step, name: str, h100: Accelerator) -> None:
    graph = step(name).graph
    prices = price(graph, h100, Kernels("tf32", "flash-2", stacks.load("pytorch")), 1)
    matrix = np.array(
        [kind.op_class in ("matmul", "attention", "attention_backward") for kind in graph.kinds], dtype=np.bool_
    )[graph.op_kind]
    assert prices.flops[matrix] == pytest.approx(np.array(flops(graph))[matrix])
    views = np.array([kind.op_class == "view" for kind in graph.kinds])[graph.op_kind]
    assert ((prices.kernels == 0) == views).all()
    assert (prices.time_s[views] == 0).all()
    assert (prices.time_s[~views] > 0).all()
    assert (prices.energy_j >= 0).all()


def test_a_sharded_update_moves_its_share(step: Step, h100: Accelerator) -> None:
    graph = step("gpt").graph
    stack = stacks.load("pytorch")
    whole, part = (price(graph, h100, Kernels("tf32", "flash-2", stack), shards) for shards in (1, 8))
    update = graph.op_phase == Phase.OPTIMIZER
    assert part.hbm_bytes[update].sum() == pytest.approx(whole.hbm_bytes[update].sum() / 8)
    assert (part.hbm_bytes[~update] == whole.hbm_bytes[~update]).all()


def test_segments_cut_the_step_where_block_or_phase_changes(step: Step) -> None:
    """They follow each other without a gap, hold one phase and block each, and take the time of their kernels."""
    played = step("llama", recomputed="full")
    graph, parts = played.graph, played.segments
    assert [(part.start, part.stop) for part in parts] == boundaries(graph)
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
    assert (parts[0].start, parts[-1].stop) == (0, len(graph))
    views = np.array([kind.op_class == "view" for kind in graph.kinds])[graph.op_kind]
    for part in parts:
        real = np.flatnonzero(~views[part.start : part.stop]) + part.start
        assert {(int(graph.op_phase[op]), int(graph.op_layer[op])) for op in real} == {(part.phase, part.layer)}
        assert part.span_ps >= max(part.work_ps, part.launch_ps)
        assert part.stretch >= 1


def test_a_segments_span_is_that_of_kernels_launched_one_by_one(step: Step, h100: Accelerator) -> None:
    """Brute force: kernel k starts when it has been launched and the one before has ended."""
    played = step("gpt")
    graph, stack = played.graph, played.stack
    prices = price(graph, h100, Kernels("tf32", "flash-2", stack), played.plan.optimizer_shards)
    host = host_times(graph, stack, False)
    for part in played.segments[:6]:
        launched = end = 0.0
        for op in range(part.start, part.stop):
            if prices.kernels[op]:
                launched += prices.kernels[op] * host[op]
                end = max(end, launched) + prices.time_s[op]
        assert part.span_ps == pytest.approx(end * 1e12, abs=2 * (part.stop - part.start))


def test_repeated_blocks_share_one_price(step: Step) -> None:
    parts = step("llama").segments
    forward = [part for part in parts if part.phase == Phase.FORWARD and part.layer >= 0]
    assert len({(part.work_ps, part.span_ps, part.launch_ps) for part in forward}) == 1
