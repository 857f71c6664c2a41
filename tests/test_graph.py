"""The graph type by itself: binding, bytes, counting, and the networkx view."""

import dataclasses

import numpy as np
import pytest

from cosim.graph import Category, Csr, OpGraph, OpKind, Parameter, Phase, TensorSpec


@pytest.fixture
def graph() -> OpGraph:
    """y = x W, then the gradient of W: two products, a transpose that costs nothing, and one saved tensor."""
    specs = (
        TensorSpec((("batch", "sequence"), ("hidden",)), "bf16", 2),
        TensorSpec((("hidden",), ("ffn",)), "bf16", 2),
        TensorSpec((("batch", "sequence"), ("ffn",)), "bf16", 2),
        TensorSpec((("batch", "sequence"), ("ffn",)), "bf16", 2, expanded=(0,)),
        TensorSpec((("hidden",), ("batch", "sequence")), "bf16", 2),
    )
    kinds = (
        OpKind("aten.mm", "matmul", (0, 1), (2,), (), (("layout", "TN"),)),
        OpKind("aten.t", "view", (0,), (4,)),
        OpKind("aten.mm", "matmul", (4, 3), (1,), (), (("layout", "NT"),)),
    )
    return OpGraph(
        axes={"batch": 2, "sequence": 8, "hidden": 4, "ffn": 16},
        specs=specs,
        kinds=kinds,
        modules=("", "up"),
        op_kind=np.array([0, 1, 2], dtype=np.int32),
        op_phase=np.array([Phase.FORWARD, Phase.BACKWARD, Phase.BACKWARD], dtype=np.int8),
        op_module=np.array([1, 1, 1], dtype=np.int32),
        op_layer=np.array([-1, -1, -1], dtype=np.int32),
        op_inputs=Csr.of([[0, 1], [0], [4, 3]]),
        op_outputs=Csr.of([[2], [4], [5]]),
        tensor_spec=np.array([0, 1, 2, 3, 4, 1], dtype=np.int32),
        tensor_storage=np.array([0, 1, 2, 3, 0, 4], dtype=np.int32),
        storage_spec=np.array([0, 1, 2, 3, 1], dtype=np.int32),
        storage_category=np.array([Category.INPUTS, Category.WEIGHTS, 4, 4, Category.GRADIENTS], dtype=np.int8),
        storage_alloc=np.array([-1, -1, 0, -1, 2], dtype=np.int32),
        storage_free=np.array([3, 3, 0, 3, 3], dtype=np.int32),
        parameters=(Parameter("up.weight", 1, 1, -1), Parameter("tied.weight", 1, 1, -1)),
        blocks=(),
        unknown_ops={},
        provenance={},
    )


def test_binding_rescales_every_size_and_leaves_the_original_alone(graph: OpGraph) -> None:
    longer = graph.bind(sequence=32, batch=1)
    assert graph.shapes[0] == (16, 4)
    assert longer.shapes[0] == (32, 4)
    assert longer.spec_bytes[2] == 32 * 16 * 2
    assert longer.storage_bytes.tolist() == [256, 128, 1024, 32, 128]


def test_an_unknown_axis_cannot_be_bound(graph: OpGraph) -> None:
    with pytest.raises(KeyError, match="experts"):
        graph.bind(experts=8)


def test_a_dimension_with_stride_zero_occupies_no_memory(graph: OpGraph) -> None:
    assert graph.spec_bytes[3] == 16 * 2


def test_a_tied_parameter_counts_once(graph: OpGraph) -> None:
    assert graph.parameter_count() == 4 * 16


def test_rows_of_different_lengths_come_back_as_they_were() -> None:
    rows = [[3, 1], [], [2], []]
    csr = Csr.of(rows)
    assert len(csr) == 4
    assert [csr.row(i).tolist() for i in range(4)] == rows
    assert len(Csr.of([])) == 0


def test_networkx_has_an_edge_from_each_producer_to_each_reader(graph: OpGraph) -> None:
    view = graph.to_networkx()
    assert view.nodes[2]["phase"] == "backward"
    assert view.nodes[0]["module"] == "up"
    assert list(view.edges) == [(1, 2)]
    assert view.edges[1, 2]["bytes"] == 16 * 4 * 2
    assert view.edges[1, 2]["tensors"] == 1


def test_two_tensors_between_two_ops_are_counted_both(graph: OpGraph) -> None:
    """And one that is read twice (x * x) once."""
    both = dataclasses.replace(graph, op_inputs=Csr.of([[0, 1], [0], [4, 2, 4]]), op_outputs=Csr.of([[], [4, 2], [5]]))
    edge = both.to_networkx().edges[1, 2]
    assert (edge["tensors"], edge["tensor"]) == (2, 4)
    assert edge["bytes"] == 16 * 4 * 2 + 16 * 16 * 2
