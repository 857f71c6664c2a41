"""A buffer of gradients: every micro-step adds to it, the update reads it, and a product may add by itself."""

from collections.abc import Callable
from math import prod

import numpy as np
import pytest

from cosim.graph import Category, OpGraph, Phase
from cosim.mapping.pricing import gemm
from cosim.techniques.gradient_buffer import ACCUMULATES, buffer_bytes, buffer_gradients
from cosim.trace.vocabulary import flops, kind_bytes

Traced = Callable[..., OpGraph]
OPTIONS = {"parameter_format": "bf16", "master_format": "fp32", "gradient_format": "fp32"}


def elements(graph: OpGraph) -> int:
    return sum({p.storage: prod(graph.shapes[p.spec]) for p in graph.parameters}.values())


def targets(graph: OpGraph, phase: Phase) -> list[str]:
    return [graph.kinds[kind].target for kind in graph.op_kind[graph.op_phase == phase].tolist()]


def moved(graph: OpGraph, target: str) -> float:
    """Bytes read and written by the ops of a target."""
    kinds = [graph.kinds[kind] for kind in graph.op_kind.tolist()]
    return float(sum(sum(kind_bytes(graph, kind)) for kind in kinds if kind.target == target))


@pytest.mark.parametrize("name", ["gpt", "llama", "untied"])
@pytest.mark.parametrize(("buffer", "itemsize"), [("fp32", 4), ("bf16", 2)])
def test_the_buffer_holds_every_parameters_gradient_and_backwards_own_are_gone_at_once(
    name: str, buffer: str, itemsize: int, traced: Traced
) -> None:
    plain = traced(name, **OPTIONS)
    graph = buffer_gradients(plain, buffer, fused=False)
    assert buffer_bytes(graph) == itemsize * elements(graph)
    assert buffer_bytes(plain) == 0
    made = (graph.storage_category == Category.GRADIENTS) & (graph.storage_alloc >= 0)
    assert not (graph.op_phase[graph.storage_alloc[made]] == Phase.BACKWARD).any()
    assert sum(flops(graph)) == sum(flops(plain))


def test_adding_reads_what_backward_made_and_the_buffer_and_writes_the_buffer(traced: Traced) -> None:
    graph = buffer_gradients(traced("gpt", **OPTIONS), "fp32", fused=False)
    assert moved(graph, "aten.add_") == (2 + 4 + 4) * elements(graph)
    assert moved(graph, "aten._foreach_zero_") >= 4 * elements(graph)


def test_a_buffer_in_the_optimizers_format_needs_no_cast_and_one_in_backwards_does(traced: Traced) -> None:
    plain = traced("gpt", **OPTIONS)
    casts = targets(plain, Phase.OPTIMIZER).count("aten._to_copy")
    assert casts > 10
    assert targets(buffer_gradients(plain, "fp32", fused=False), Phase.OPTIMIZER).count("aten._to_copy") == 0
    assert targets(buffer_gradients(plain, "bf16", fused=True), Phase.OPTIMIZER).count("aten._to_copy") == casts


def test_products_that_add_by_themselves_leave_vectors_and_embeddings_to_kernels(traced: Traced) -> None:
    """Of the matrices only embeddings, whose gradient no product makes alone (tied: a sum of two)."""
    plain = traced("gpt", **OPTIONS)
    graph = buffer_gradients(plain, "fp32", fused=True)
    kinds = [graph.kinds[kind] for kind in graph.op_kind.tolist()]
    added = [graph.shapes[kind.inputs[0]] for kind in kinds if kind.target == "aten.add_"]
    matrices = {shape for shape in added if len(shape) > 1}
    embeddings = {
        graph.shapes[p.spec] for p in graph.parameters if "embedding" in p.name and len(graph.shapes[p.spec]) > 1
    }
    assert matrices == embeddings
    products = [kind for kind in kinds if kind.attribute(ACCUMULATES)]
    assert len(products) == 4 * 3  # linear layers of three blocks
    for kind in products:
        work = gemm(graph, kind, "fp32")
        assert work.output_format == "fp32"
        assert work.epilogue_bytes == 4.0 * work.m * work.n


def test_a_run_without_16_bit_copies_is_left_alone(traced: Traced) -> None:
    plain = traced("gpt")
    assert buffer_gradients(plain, "fp32", fused=True) is plain
    assert buffer_gradients(traced("gpt", **OPTIONS), None, fused=True) is traced("gpt", **OPTIONS)


def test_ops_stay_in_order_and_nothing_is_read_before_it_is_there(traced: Traced) -> None:
    for fused in (False, True):
        graph = buffer_gradients(traced("llama", **OPTIONS), "fp32", fused)
        assert (np.diff(graph.op_phase == Phase.OPTIMIZER) >= 0).all()
        for op in range(len(graph)):
            for storage in graph.tensor_storage[graph.op_inputs.row(op)].tolist():
                assert graph.storage_alloc[storage] < op or graph.storage_alloc[storage] == -1
                assert graph.storage_free[storage] >= op or graph.storage_alloc[storage] == -1
