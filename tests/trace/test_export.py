"""A traced step as a graph file: read back it is the same, and its sums are the model's."""

import json
from pathlib import Path

import networkx
import numpy as np
import pytest

from cosim.graph import OpGraph, Phase
from cosim.trace import TraceOptions, trace
from cosim.trace.export import described, is_graph, read_graph, saved_bytes, write_graph
from hwmodels.units import InputError
from workloads.model import ModelConfig, from_dimensions

GPT = {"family": "gpt", "layers": 3, "hidden": 96, "heads": 4, "vocab": 500, "max_positions": 1024}


@pytest.fixture(scope="module")
def graph() -> OpGraph:
    return trace(from_dimensions(GPT), TraceOptions(batch=2, sequence=64))


@pytest.mark.parametrize("name", ["step.json", "step.graphml"])
def test_read_back_it_is_the_same(graph: OpGraph, tmp_path: Path, name: str) -> None:
    write_graph(graph, tmp_path / name)
    read, written = read_graph(tmp_path / name), described(graph)
    assert dict(read.nodes(data=True)) == dict(written.nodes(data=True))
    assert {(a, b): d for a, b, d in read.edges(data=True)} == {(a, b): d for a, b, d in written.edges(data=True)}
    assert read.graph == written.graph
    assert is_graph(tmp_path / name)


def test_networkx_alone_reads_the_files(graph: OpGraph, tmp_path: Path) -> None:
    """Without this project: the formats are networkx's own."""
    write_graph(graph, tmp_path / "step.graphml")
    write_graph(graph, tmp_path / "step.json")
    from_xml = networkx.read_graphml(tmp_path / "step.graphml")
    from_json = networkx.node_link_graph(json.loads((tmp_path / "step.json").read_text()), edges="edges")
    assert len(from_xml) == len(from_json) == len(graph)
    assert networkx.is_directed_acyclic_graph(from_json)
    assert from_xml.number_of_edges() == from_json.number_of_edges()


def test_flops_are_those_of_the_matrices(graph: OpGraph) -> None:
    """Forward: 2 FLOP for each weight of a matrix and token, and causal attention's 2 products over half the pairs."""
    tokens, layers, hidden = 2 * 64, 3, 96
    weights = layers * 12 * hidden**2 + 500 * hidden
    attention = layers * 2 * (2 * 2 * 64 * 64 * hidden) / 2
    forward = [node for _, node in described(graph).nodes(data=True) if node["phase"] == "forward"]
    assert sum(node["flops"] for node in forward) == pytest.approx(2 * weights * tokens + attention)


def test_shapes_and_formats_are_those_of_the_operands(graph: OpGraph) -> None:
    nodes = [node for _, node in described(graph).nodes(data=True) if node["op_class"] == "matmul"]
    head = next(node for node in nodes if node["phase"] == "forward" and "500" in node["input_shapes"])
    assert head["input_shapes"] == "[128,96] [96,500]"
    assert head["output_shapes"] == "[128,500]"
    assert head["input_formats"] == "fp32 fp32"
    assert head["bytes_read"] == 4 * (128 * 96 + 96 * 500)
    assert head["bytes_written"] == 4 * 128 * 500


def test_parameters_and_blocks(graph: OpGraph) -> None:
    said = described(graph).graph
    config = from_dimensions(GPT)
    assert isinstance(config, ModelConfig)
    assert said["parameters"] == said["trainable_parameters"] == config.parameters()
    [block] = json.loads(said["blocks"])
    assert (block["path"], block["layers"]) == ("layers.*", 3)
    assert json.loads(said["unknown_ops"]) == {}


def test_saved_activations_are_what_backward_finds(graph: OpGraph, live_bytes) -> None:  # type: ignore[no-untyped-def]
    """What is alive after forward, less what was there before the step."""
    last = int(np.flatnonzero(graph.op_phase == Phase.FORWARD)[-1])
    before = int(graph.storage_bytes[graph.storage_alloc < 0].sum())
    alive_next = live_bytes(graph)[last + 1] - int(graph.storage_bytes[graph.storage_alloc == last + 1].sum())
    assert saved_bytes(graph) == alive_next - before


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("step.txt", "", "allowed: .graphml, .json"),
        ("step.json", "{", "is not a graph that `cosim trace` wrote"),
        ("step.json", '{"directed": true, "multigraph": false, "graph": {}, "nodes": [], "edges": []}', "has no axes"),
        ("step.json", "[" * 100_000, "is not a graph"),
        ("step.graphml", "<graphml", "is not a graph that `cosim trace` wrote"),
        ("missing.json", None, "cannot be read: No such file"),
    ],
)
def test_other_files_are_refused_in_one_sentence(tmp_path: Path, name: str, content: str, sentence: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=sentence) as refused:
        read_graph(tmp_path / name)
    assert "\n" not in str(refused.value)


def test_a_name_without_a_format_writes_nothing(graph: OpGraph, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the name ends in \.dot"):
        write_graph(graph, tmp_path / "step.dot")
    assert list(tmp_path.iterdir()) == []
