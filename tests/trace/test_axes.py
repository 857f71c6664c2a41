"""Dimensions have the names that the field gives them, and their products are the traced sizes."""

import pytest

from cosim.graph import Dim, OpGraph, Parameter
from cosim.trace import TraceOptions, trace
from cosim.trace.axes import Unifier
from workloads.model import HuggingFaceModel, ModelConfig, from_dimensions


def dims_of(graph: OpGraph, ending: str) -> tuple[Dim, ...]:
    found: Parameter = next(p for p in graph.parameters if p.name.endswith(ending))
    return graph.specs[found.spec].dims


@pytest.mark.parametrize("attention", ["flash", "unfused"])
def test_a_llama_is_named_as_its_configuration_is(llama: ModelConfig, attention: str) -> None:
    graph = trace(llama, TraceOptions(attention=attention))
    heads = ("heads",) if attention == "flash" else ("kv_heads", "groups")
    assert dims_of(graph, "embedding.weight") == (("vocabulary",), ("hidden",))
    assert dims_of(graph, "head.weight") == (("vocabulary",), ("hidden",))
    assert dims_of(graph, "1.attention.query.weight") == ((*heads, "head_dim"), ("hidden",))
    assert dims_of(graph, "1.attention.value.weight") == (("kv_heads", "head_dim"), ("hidden",))
    assert dims_of(graph, "1.attention.output.weight") == (("hidden",), (*heads, "head_dim"))
    assert dims_of(graph, "2.mlp.gate.weight") == dims_of(graph, "2.mlp.up.weight") == (("ffn",), ("hidden",))
    assert dims_of(graph, "2.mlp.down.weight") == (("hidden",), ("ffn",))
    for axis in ("hidden", "ffn", "kv_heads", "head_dim"):
        assert graph.axes[axis] == getattr(llama, axis)
    assert graph.axes["vocabulary"] == llama.vocab


def test_a_packed_projection_is_a_product_of_axes(gpt: ModelConfig) -> None:
    graph = trace(gpt, TraceOptions())
    assert dims_of(graph, "0.attention.qkv.weight") == (("heads", "size_3", "head_dim"), ("hidden",))
    assert dims_of(graph, "position_embedding.weight") == (("positions",), ("hidden",))


def test_equal_sizes_of_different_meaning_are_different_axes() -> None:
    """hidden = heads * head_dim = ffn = 4 * vocabulary, and yet nothing is confused."""
    model = from_dimensions({"family": "llama", "layers": 2, "hidden": 64, "heads": 8, "ffn": 64, "vocab": 64})
    graph = trace(model, TraceOptions())
    assert dims_of(graph, "0.mlp.up.weight") == (("ffn",), ("hidden",))
    assert dims_of(graph, "0.attention.query.weight") == (("heads", "head_dim"), ("hidden",))
    assert dims_of(graph, "head.weight") == (("vocabulary",), ("hidden",))


def test_a_hugging_face_model_is_named_too() -> None:
    pytest.importorskip("transformers")
    graph = trace(HuggingFaceModel("GPT2LMHeadModel", {"n_layer": 2, "n_embd": 96, "n_head": 4}), TraceOptions())
    assert dims_of(graph, "0.mlp.c_fc.weight") == (("hidden",), ("ffn",))  # GPT-2's Conv1D keeps weights transposed
    assert dims_of(graph, "0.attn.c_attn.weight") == (("hidden",), ("size_3", "heads", "head_dim"))
    assert dims_of(graph, "0.attn.c_proj.weight") == (("heads", "head_dim"), ("hidden",))


def test_parameters_of_every_layer_and_their_moments_are_named_alike(llama: ModelConfig) -> None:
    graph = trace(llama, TraceOptions())
    by_name: dict[str, set[tuple[Dim, ...]]] = {}
    for parameter in graph.parameters:
        by_name.setdefault(parameter.name.replace(f".{parameter.layer}.", ".*."), set()).add(
            graph.specs[parameter.spec].dims
        )
    assert all(len(dims) == 1 for dims in by_name.values())
    matrices = {graph.specs[p.spec].dims for p in graph.parameters}
    states = {graph.specs[graph.storage_spec[s]].dims for s in (graph.storage_category == 2).nonzero()[0]}
    gradients = {graph.specs[graph.storage_spec[s]].dims for s in (graph.storage_category == 1).nonzero()[0]}
    assert states - {()} == gradients == matrices


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lion", "lamb", "adafactor", "muon"])
@pytest.mark.parametrize("implementation", ["foreach", "single"])
def test_no_update_confuses_axes_of_different_tensors(gpt: ModelConfig, optimizer: str, implementation: str) -> None:
    """Loss scaling, clipping and updates work on lists of tensors, of which only those at the same place are alike."""
    options = TraceOptions(
        optimizer=optimizer,
        optimizer_implementation=implementation,
        parameter_format="fp16",
        master_format="fp32",
        loss_scaling=True,
        gradient_clipping=True,
    )
    graph = trace(gpt, options)
    assert dims_of(graph, "0.attention_norm.weight") == (("hidden",),)
    assert dims_of(graph, "0.attention.output.weight") == (("hidden",), ("heads", "head_dim"))
    assert dims_of(graph, "0.mlp.down.weight") == (("hidden",), ("ffn",))


def test_sizes_split_where_operators_split_them() -> None:
    unifier = Unifier()
    hidden, heads, head_dim = unifier.new(4096), unifier.new(32), unifier.new(128)
    unifier.unite([hidden], [heads, head_dim])
    assert unifier.leaves([hidden]) == unifier.leaves([heads, head_dim])
    packed, groups = unifier.new(12288), unifier.new(3)
    unifier.unite([packed], [groups, hidden])
    assert [unifier.sizes[leaf] for leaf in unifier.leaves([packed])] == [3, 32, 128]
    unifier.unite([unifier.new(6)], [unifier.new(4)])  # nothing in common: left alone
