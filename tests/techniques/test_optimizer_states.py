"""Optimizer states against their definitions; what a sharded update keeps and sends; every optimizer runs."""

import functools
from typing import Any

import numpy as np
import pytest

from cosim.graph import OpGraph, Phase
from cosim.simulate import simulate
from cosim.spec import RunSpec
from cosim.techniques.optimizers import NO_TRAFFIC, shard_update, state_bytes, whole_ops
from cosim.trace import TraceOptions, trace
from cosim.trace.vocabulary import kind_flops
from workloads.model import from_dimensions

MODEL = {"family": "llama", "layers": 2, "hidden": 64, "heads": 2, "ffn": 160, "vocab": 300}
OPTIMIZERS = ("adamw", "adam", "sgd", "lion", "lamb", "adafactor", "muon")


@functools.cache
def traced(optimizer: str, **options: Any) -> OpGraph:
    return trace(from_dimensions(MODEL), TraceOptions(optimizer=optimizer, **options))


def shapes(graph: OpGraph) -> dict[str, tuple[int, ...]]:
    return {p.name: graph.shapes[p.spec] for p in graph.parameters}


@pytest.mark.parametrize("recipe", [{}, {"parameter_format": "bf16", "master_format": "fp32"}])
@pytest.mark.parametrize(("optimizer", "expected"), [("adamw", 8), ("adam", 8), ("lamb", 8), ("sgd", 4), ("lion", 4)])
def test_whole_moments_are_fp32_whatever_the_parameters_are(
    optimizer: str, expected: int, recipe: dict[str, str]
) -> None:
    assert state_bytes(traced(optimizer, **recipe)) == expected


def test_adafactor_keeps_a_row_and_a_column_of_each_matrix() -> None:
    """Shazeer and Stern 2018, arXiv 1804.04235: 4 (r + c) per matrix, 4 n per vector."""
    graph = traced("adafactor")
    expected = sum(4 * sum(shape) for shape in shapes(graph).values())
    assert state_bytes(graph) * graph.parameter_count() == pytest.approx(expected, abs=0.5)


def test_muon_keeps_one_moment_of_hidden_matrices_and_two_of_the_rest() -> None:
    graph = traced("muon")
    sizes = {name: np.prod(shape) for name, shape in shapes(graph).items()}
    hidden = sum(size for name, size in sizes.items() if name.startswith("layers.") and "norm" not in name)
    assert state_bytes(graph) * graph.parameter_count() == 4 * hidden + 8 * (sum(sizes.values()) - hidden)


def newton_schulz(graph: OpGraph) -> float:
    kinds = graph.op_kind[graph.op_phase == Phase.OPTIMIZER].tolist()
    return sum(kind_flops(graph, graph.kinds[kind]) for kind in kinds)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_update_that_is_not_sharded_is_as_traced(optimizer: str) -> None:
    for zero, degree in ((0, 8), (3, 1)):
        assert shard_update(traced(optimizer), optimizer, zero, degree) == (traced(optimizer), NO_TRAFFIC)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_muons_matrices_are_dealt_out_whole(zero: int) -> None:
    """14 matrices: two ranks have about half of the products each; of a hundred, the busiest has the largest."""
    graph = traced("muon")
    total = newton_schulz(graph)
    two, many = (shard_update(graph, "muon", zero, ranks)[0] for ranks in (2, 100))
    assert total / 2 <= newton_schulz(two) <= 0.55 * total
    assert newton_schulz(many) == 5 * (4 * 160 * 64**2 + 2 * 64**3)
    assert int((~whole_ops(many)).sum()) == int((~whole_ops(graph)).sum())
    made = many.storage_alloc >= 0
    assert (many.storage_free[made] >= many.storage_alloc[made]).all()
    assert int(many.storage_free.max()) == len(many)


def test_muon_under_zero_3_sends_its_shards_and_gets_updates_in_16_bit() -> None:
    graph = traced("muon")
    hidden = 2 * (4 * 64 * 64 + 3 * 64 * 160)
    _, traffic = shard_update(graph, "muon", 3, 4)
    assert traffic.before == traffic.after == (("all_to_all", 2 * hidden / 4),)
    assert shard_update(graph, "muon", 2, 4)[1] == NO_TRAFFIC


def test_sharded_norms_and_statistics_are_summed_over_ranks() -> None:
    """LAMB: two numbers per tensor; Adafactor: each matrix's column statistics, 4 bytes per column."""
    tensors = shapes(traced("lamb"))
    assert shard_update(traced("lamb"), "lamb", 1, 8)[1].before == (("all_reduce", 4.0 * len(tensors)),) * 2
    columns = sorted(4.0 * shape[1] for shape in tensors.values() if len(shape) == 2)
    assert sorted(size for _, size in shard_update(traced("adafactor"), "adafactor", 3, 8)[1].before) == columns


def test_ranks_agree_on_an_overflow_on_the_device_where_the_optimizer_is_fused() -> None:
    scaled = {"loss_scaling": True, "parameter_format": "fp16", "master_format": "fp32"}
    fused, foreach = (traced("adamw", optimizer_implementation=how, **scaled) for how in ("fused", "foreach"))
    assert shard_update(fused, "adamw", 3, 8)[1].before == (("all_reduce", 4.0),)
    assert shard_update(foreach, "adamw", 3, 8)[1] == NO_TRAFFIC  # summed where the host reads it


def run(optimizer: str, zero: int, precision: str, framework: str = "pytorch") -> Any:
    document = {
        "workload": {"model": MODEL, "seq_len": 128, "global_batch": 16, "micro_batch": 1},
        "system": {"accelerator": "h100-sxm-80gb", "devices": 8},
        "parallel": {"zero": zero},
        "training": {"framework": framework, "optimizer": optimizer, "precision": precision},
    }
    return simulate(RunSpec.from_mapping(document))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_runs_in_every_precision_and_stage(optimizer: str) -> None:
    cases = [(0, "bf16"), (1, "bf16"), (2, "bf16"), (3, "bf16"), (0, "fp16"), (1, "fp16"), (3, "fp16")]
    for zero, precision in [*cases, (0, "fp32"), (3, "tf32")]:
        result = run(optimizer, zero, precision)
        assert result.step_time_s > 0
        assert not result.unknown_ops
        state = state_bytes(traced(optimizer)) * traced(optimizer).parameter_count() / (8 if zero else 1)
        assert result.memory_bytes["optimizer"] == pytest.approx(state, rel=0.01)


@pytest.mark.parametrize("framework", ["composer", "torchtitan"])
@pytest.mark.parametrize("optimizer", ["lion", "adafactor", "muon"])
def test_every_stack_runs_it(optimizer: str, framework: str) -> None:
    assert run(optimizer, 3, "fp16", framework).step_time_s > 0


def test_loss_scaling_makes_the_host_wait_once() -> None:
    """fp16 moves as many bytes as bf16; what it takes more is the loss scale's."""
    more = run("adamw", 3, "fp16").step_time_s - run("adamw", 3, "bf16").step_time_s
    assert 0 < more < 1e-3
    assert run("adamw", 3, "fp16", "torchtitan").step_time_s == pytest.approx(
        run("adamw", 3, "bf16", "torchtitan").step_time_s
    )
