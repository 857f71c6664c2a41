"""What a traced step keeps in memory, against closed forms and against what autograd really saves."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cosim.graph import Category, OpGraph, Phase
from cosim.trace import TraceOptions, trace
from workloads.build import build_module
from workloads.model import ModelConfig, PythonModel, from_dimensions
from workloads.training import loss

Total = Callable[[OpGraph, Category], int]


def test_weights_gradients_and_adam_take_16_bytes_per_parameter_with_fp32_masters(
    llama: ModelConfig, bytes_of: Total
) -> None:
    """ZeRO's count (arXiv 1910.02054): 2 weights + 12 optimizer, and the gradient in the format of backward."""
    options = TraceOptions(parameter_format="bf16", master_format="fp32", gradient_format="fp32")
    graph = trace(llama, options)
    parameters = graph.parameter_count()
    assert parameters == sum(p.numel() for p in build_module(llama).parameters())
    tables = 2 * graph.axes["sequence"] * llama.head_dim * 2  # rotary cos and sin
    assert bytes_of(graph, Category.WEIGHTS) == 2 * parameters + tables
    assert bytes_of(graph, Category.OPTIMIZER) == pytest.approx(12 * parameters, rel=1e-4)  # and the step counts
    assert bytes_of(graph, Category.GRADIENTS) == (2 + 4) * parameters  # as backward makes them, and cast


def test_unfused_attention_saves_what_korthikanti_counts() -> None:
    """s b h (34 + 5 a s / h) bytes per layer, 16-bit with dropout (arXiv 2205.05198, equation 1).

    Eager PyTorch differs in known terms, all counted here: the attention mask's product with the softmax's input is in
    place in Megatron; PyTorch keeps the norms' statistics and Q, K contiguous copies for the batched product.
    """
    model = from_dimensions({"family": "gpt", "layers": 2, "hidden": 256, "heads": 4, "vocab": 64})
    options = TraceOptions(attention="unfused", dropout=0.1, parameter_format="bf16", batch=4, sequence=128)
    graph = trace(model, options)
    made = graph.storage_category == Category.ACTIVATIONS
    layer = np.where(graph.storage_alloc >= 0, graph.op_layer[np.maximum(graph.storage_alloc, 0)], -1)
    per_layer = int(graph.storage_bytes[made & (layer == 1)].sum())
    s, b, h, a = 128, 4, 256, 4
    statistics = 2 * 2 * s * b * 4  # mean and rstd of two norms
    assert per_layer == pytest.approx(s * b * h * (34 + 5 * a * s / h) + statistics, rel=0.06)


def saved_bytes(module: nn.Module, tokens: Tensor) -> int:
    """Bytes of distinct storages that autograd saves in a real step, parameters, buffers and inputs left out."""
    known = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers(), tokens)}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and storage.data_ptr():
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss(module(tokens), tokens)
    result = sum(saved.values())
    del value
    return result


@pytest.mark.parametrize("attention", ["flash", "unfused"])
@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_activations_are_the_tensors_that_autograd_saves(
    family: str, attention: str, request: pytest.FixtureRequest, bytes_of: Total
) -> None:
    model = request.getfixturevalue(family)
    graph = trace(model, TraceOptions(attention=attention, batch=2, sequence=64))
    module = build_module(model, attention=attention, seq_len=64)  # type: ignore[arg-type]
    real = saved_bytes(module, torch.randint(0, model.vocab, (2, 64)))
    assert bytes_of(graph, Category.ACTIVATIONS) == pytest.approx(real, rel=0.01)


def test_weights_of_a_cloned_layer_are_read_where_they_are() -> None:
    """torch.nn.TransformerEncoder and many others copy.deepcopy a layer; a view of its weights is no new memory."""
    graph = trace(PythonModel("workloads.encoder:build", {}), TraceOptions(batch=2, sequence=64))
    weights = {parameter.storage for parameter in graph.parameters}
    transposed = [op for op in range(len(graph)) if graph.kinds[graph.op_kind[op]].target == "aten.t"]
    forward = [op for op in transposed if graph.op_phase[op] == Phase.FORWARD]
    assert len(forward) == 2 * 4 + 1  # in_proj, out_proj, linear1, linear2 of two layers, and the head
    for op in forward:
        assert {int(graph.tensor_storage[tensor]) for tensor in graph.op_outputs.row(op)} <= weights


def test_nothing_outlives_the_step_but_what_was_there_before(llama: ModelConfig) -> None:
    graph = trace(llama, TraceOptions())
    within = graph.storage_alloc >= 0
    assert (graph.storage_free[within] < len(graph)).all()
    assert (graph.storage_free[within] >= graph.storage_alloc[within]).all()
    gradients = graph.storage_category == Category.GRADIENTS
    assert gradients.sum() == len(graph.parameters)
    assert (graph.storage_free[gradients] == len(graph) - 1).all()


def test_no_op_reads_memory_that_is_not_alive(gpt: ModelConfig) -> None:
    for attention in ("flash", "unfused"):
        graph = trace(gpt, TraceOptions(attention=attention, dropout=0.1, autocast_format="bf16"))
        for op in range(len(graph)):
            for tensor in (*graph.op_inputs.row(op).tolist(), *graph.op_outputs.row(op).tolist()):
                storage = graph.tensor_storage[tensor]
                assert graph.storage_alloc[storage] <= op <= graph.storage_free[storage]


def test_phases_come_in_order(gpt: ModelConfig) -> None:
    graph = trace(gpt, TraceOptions())
    assert (np.diff(graph.op_phase) >= 0).all()
    assert set(graph.op_phase.tolist()) == {Phase.FORWARD, Phase.BACKWARD, Phase.OPTIMIZER}
