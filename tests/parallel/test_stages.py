"""Pipeline stages of a divided step: they hold and compute what the step does, once."""

import functools
from typing import Any

import numpy as np
import pytest

from cosim.graph import OpGraph, Phase
from cosim.parallel.layout import Sharding
from cosim.parallel.sharding import shard
from cosim.parallel.stages import block_order, cut, even_layers
from cosim.trace import TraceOptions, trace
from cosim.trace.vocabulary import kind_flops
from workloads.model import from_dimensions

_SMALL = {"layers": 4, "hidden": 96, "heads": 4, "vocab": 512}
MODELS: dict[str, dict[str, Any]] = {
    "tied": {"family": "gpt", **_SMALL, "max_positions": 1024},
    "untied": {"family": "llama", **_SMALL, "kv_heads": 2, "ffn": 224},
    "bert": {"family": "bert", **_SMALL, "max_positions": 1024},
    "t5": {"family": "t5", **_SMALL, "head_dim": 32, "ffn": 224},
    "moe": {"family": "moe", **_SMALL, "num_experts": 8, "experts_per_token": 2, "moe_ffn": 64, "ffn": 224},
}
SHARDINGS = [Sharding(), Sharding(tensor=2, sequence=True)]


@functools.cache
def whole(name: str) -> OpGraph:
    return trace(from_dimensions(MODELS[name]), TraceOptions(batch=1, sequence=64))


def flops(graph: OpGraph, phase: Phase) -> float:
    of_kind = [kind_flops(graph, kind) for kind in graph.kinds]
    return float(sum(of_kind[kind] for kind in graph.op_kind[graph.op_phase == phase].tolist()))


@pytest.mark.parametrize("chunks", [2, 4])
@pytest.mark.parametrize("how", SHARDINGS)
@pytest.mark.parametrize("name", MODELS)
def test_stages_add_up_to_the_step(name: str, how: Sharding, chunks: int) -> None:
    """Two ranks with one chunk each or two in turn: every op once, every parameter once but those that are tied."""
    step = shard(whole(name), how)
    layers = even_layers(len(block_order(step)), chunks)
    found = cut(step, layers, [chunk % 2 for chunk in range(chunks)])
    for phase in (Phase.FORWARD, Phase.BACKWARD):
        assert sum(flops(part.graph, phase) for part in found.ranks) == flops(step, phase)
        ops = np.concatenate([part.source[part.graph.op_phase == phase] for part in found.ranks])
        assert sorted(ops.tolist()) == np.flatnonzero(step.op_phase == phase).tolist()
    held = sum(part.graph.parameter_count() for part in found.ranks)
    assert held == step.parameter_count() + found.tied_elements


@pytest.mark.parametrize("how", SHARDINGS)
@pytest.mark.parametrize("name", MODELS)
def test_what_a_stage_reads_is_in_its_memory(name: str, how: Sharding) -> None:
    step = shard(whole(name), how)
    for part in cut(step, even_layers(len(block_order(step)), 2), [0, 1]).ranks:
        graph = part.graph
        alloc, free = graph.storage_alloc, graph.storage_free
        assert (alloc <= free)[(free >= 0)].all()
        ops = np.repeat(np.arange(len(graph)), np.diff(graph.op_inputs.indptr))
        storages = graph.tensor_storage[graph.op_inputs.indices]
        kept = (alloc[storages] < 0) & (free[storages] < 0)
        assert ((alloc[storages] <= ops) & (ops <= free[storages]) | kept).all()


def test_a_tied_embedding_is_on_the_first_and_the_last_rank() -> None:
    found = cut(shard(whole("tied"), Sharding(tensor=2)), (2, 2), [0, 1])
    assert found.tied_elements == 512 // 2 * 96
    names = [{p.name for p in part.graph.parameters} for part in found.ranks]
    assert len(names[0] & names[1]) == 1
    assert names[0] & names[1] <= {"embedding.weight", "head.weight"}


def test_boundaries_carry_the_residual_stream_or_a_ranks_slice_of_it() -> None:
    """b*s*h each way (arXiv 2104.04473, section 2.2), of which sequence parallelism leaves a rank 1/t."""
    full, sliced = (cut(shard(whole("untied"), how), (2, 2), [0, 1]).boundaries[0] for how in SHARDINGS)
    assert (full.forward_bytes, full.backward_bytes) == (64 * 96 * 4, 64 * 96 * 4)
    assert (sliced.forward_bytes, sliced.backward_bytes) == (64 * 96 * 4 // 2, 64 * 96 * 4 // 2)
