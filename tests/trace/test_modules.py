"""Any nn.Module traces: the library's models, Hugging Face's, and a user's own with nothing repeated."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cosim.graph import Category, OpGraph, Phase
from cosim.trace import TraceOptions, cached_trace, trace
from cosim.trace.vocabulary import OP_CLASSES, kind_bytes, lookup
from hwmodels.units import InputError
from workloads.model import HuggingFaceModel, ModelConfig, PythonModel, from_dimensions


def ops_of(graph: OpGraph, op_class: str) -> list[int]:
    return [op for op, kind in enumerate(graph.op_kind.tolist()) if graph.kinds[kind].op_class == op_class]


class Tiny(nn.Module):
    """Embedding, whatever the test gives, and a head."""

    def __init__(self, body: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 32)
        self.first = nn.Linear(32, 48)
        self.second = nn.Linear(48, 32)
        self.head = nn.Linear(32, 100)
        self.body = body or (lambda x: x)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(self.body(self.second(F.gelu(self.first(x)))))


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_every_layer_is_found_in_both_phases(family: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(family)
    graph = trace(model, TraceOptions())
    assert [block.layers for block in graph.blocks] == [tuple(range(model.layers))]
    (block,) = graph.blocks
    for layer in block.layers:
        for phase, count in ((Phase.FORWARD, block.forward_ops), (Phase.BACKWARD, block.backward_ops)):
            ops = np.flatnonzero((graph.op_layer == layer) & (graph.op_phase == phase))
            assert len(ops) == count
            assert ops[-1] - ops[0] == count - 1, "a layer's ops are contiguous"
            kinds = graph.op_kind[ops]
            first = np.flatnonzero((graph.op_layer == 0) & (graph.op_phase == phase))
            np.testing.assert_array_equal(kinds, graph.op_kind[first])
    per_layer = [p.layer for p in graph.parameters]
    assert all(per_layer.count(layer) == per_layer.count(0) for layer in block.layers)


@pytest.mark.parametrize(
    ("name", "config", "container"),
    [
        ("GPT2LMHeadModel", {"n_layer": 3, "n_embd": 96, "n_head": 4, "vocab_size": 300}, "transformer.h.*"),
        (
            "LlamaForCausalLM",
            {
                "num_hidden_layers": 3,
                "hidden_size": 96,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "intermediate_size": 160,
                "vocab_size": 300,
            },
            "model.layers.*",
        ),
    ],
)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_hugging_face_model_has_one_attention_op_per_layer(
    name: str, config: dict[str, object], container: str, dropout: float
) -> None:
    pytest.importorskip("transformers")
    graph = trace(HuggingFaceModel(name, config), TraceOptions(dropout=dropout, batch=2, sequence=64))
    assert len(ops_of(graph, "attention")) == len(ops_of(graph, "attention_backward")) == 3
    assert [block.path for block in graph.blocks] == [container]
    assert len(graph.blocks[0].layers) == 3
    assert graph.provenance["fixed"] == {}
    assert not graph.unknown_ops


def test_tied_embeddings_are_one_parameter() -> None:
    dimensions = {"family": "gpt", "layers": 2, "hidden": 64, "heads": 2, "vocab": 300}
    tied, untied = (
        trace(from_dimensions({**dimensions, "tied_embeddings": yes}), TraceOptions()) for yes in (True, False)
    )
    assert untied.parameter_count() - tied.parameter_count() == 300 * 64
    assert len({p.storage for p in tied.parameters}) == len(tied.parameters)


def test_a_module_without_repetition_has_no_blocks() -> None:
    graph = trace(Tiny, TraceOptions())
    assert graph.blocks == ()
    assert (graph.op_layer == -1).all()
    assert all(p.layer == -1 for p in graph.parameters)


def test_plain_sdpa_with_dropout_and_grouped_queries_is_one_op() -> None:
    def body(x: Tensor) -> Tensor:
        q = x.unflatten(-1, (4, 8)).transpose(1, 2)
        k = q[:, :2]
        out = F.scaled_dot_product_attention(q, k, k, is_causal=True, dropout_p=0.1, enable_gqa=True)
        return F.dropout(F.rms_norm(out.transpose(1, 2).flatten(2), (32,), torch.ones(32)), 0.1)

    graph = trace(lambda: Tiny(body), TraceOptions())
    targets = [graph.kinds[kind].target for kind in graph.op_kind.tolist()]
    for target in ("cosim.attention", "cosim.attention_backward", "aten.native_dropout", "cosim.rms_norm"):
        assert targets.count(target) == 1


def test_an_operator_outside_the_vocabulary_costs_its_bytes_and_is_listed() -> None:
    graph = trace(lambda: Tiny(lambda x: x + torch.special.i0e(x.detach())), TraceOptions(batch=2, sequence=8))
    assert graph.unknown_ops == {"aten.special_i0e": 1}
    (op,) = ops_of(graph, "unknown")
    size = 2 * 8 * 32 * 4
    assert kind_bytes(graph, graph.kinds[graph.op_kind[op]]) == (size, size)


def test_a_failing_forward_names_its_exception() -> None:
    def body(x: Tensor) -> Tensor:
        return x.view(3, 5)

    with pytest.raises(InputError, match=r"^model: the training step raised RuntimeError: .*shape") as raised:
        trace(lambda: Tiny(body), TraceOptions(batch=2, sequence=8))
    assert "\n" not in str(raised.value)


def test_a_module_without_parameters_cannot_be_trained() -> None:
    with pytest.raises(InputError, match="no trainable parameters"):
        trace(lambda: nn.Identity(), TraceOptions())


def test_frozen_parameters_have_no_gradient_and_no_moments() -> None:
    class Frozen(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.first.requires_grad_(False)

    graph = trace(Frozen, TraceOptions(batch=2))
    trainable = graph.parameter_count(trainable_only=True)
    assert graph.parameter_count() - trainable == 32 * 48 + 48
    assert int(graph.storage_bytes[graph.storage_category == Category.GRADIENTS].sum()) == 4 * trainable


def test_a_module_with_a_fixed_sequence_length_is_traced_at_it() -> None:
    table = 64

    def body(x: Tensor) -> Tensor:
        return x + torch.ones(table, 32)

    graph = trace(lambda: Tiny(body), TraceOptions(batch=2, sequence=table))
    assert graph.provenance["fixed"] == {"sequence": table}
    assert graph.axes["batch"] == 2
    assert "sequence" not in graph.axes


def test_a_modules_own_checkpointing_is_a_phase_of_its_own() -> None:
    def body(x: Tensor) -> Tensor:
        return checkpoint(lambda y: F.gelu(y) * y, x, use_reentrant=False)

    graph = trace(lambda: Tiny(body), TraceOptions(batch=2))
    again = [graph.kinds[graph.op_kind[op]].target for op in np.flatnonzero(graph.op_phase == Phase.RECOMPUTE)]
    assert again.count("aten.gelu") == 1


def test_a_label_shift_counts_as_the_sequence() -> None:
    class Shifted(Tiny):
        def forward(self, tokens: Tensor) -> Tensor:
            logits = super().forward(tokens)
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    graph = trace(Shifted, TraceOptions(batch=2, sequence=16))
    assert graph.provenance["shifted_sequence"] is True
    assert {"batch", "sequence"} <= set(graph.axes)


def test_a_user_module_may_bring_its_inputs_and_its_loss() -> None:
    class Own(Tiny):
        def example_inputs(self, batch: int, seq_len: int) -> dict[str, Tensor]:
            return {"tokens": torch.zeros((batch, seq_len), dtype=torch.int64), "weight": torch.ones(batch)}

        def forward(self, tokens: Tensor, weight: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            return {"loss": (super().forward(tokens).logsumexp(-1).mean(1) * weight).sum()}

    graph = trace(Own, TraceOptions(batch=3, sequence=16))
    assert not ops_of(graph, "loss")
    assert graph.axes["batch"] == 3


def test_backward_ops_belong_to_the_module_whose_gradient_they_compute() -> None:
    graph = trace(Tiny, TraceOptions())
    found = {
        graph.modules[graph.op_module[op]] for op in ops_of(graph, "matmul") if graph.op_phase[op] == Phase.BACKWARD
    }
    assert found == {"first", "second", "head"}


@pytest.mark.parametrize("implementation", ["fused", "foreach", "single"])
@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "adagrad", "rmsprop", "adafactor"])
def test_every_optimizer_traces_in_its_steady_state(optimizer: str, implementation: str) -> None:
    graph = trace(Tiny, TraceOptions(optimizer=optimizer, optimizer_implementation=implementation))
    states = (graph.storage_category == 2) & (graph.storage_alloc < 0)
    assert states.any()
    assert not ((graph.storage_category == 2) & (graph.storage_alloc >= 0)).any()
    if implementation == "fused" and optimizer == "adamw":
        assert len(ops_of(graph, "optimizer")) == 1


def test_autocast_casts_each_weight_once(gpt: ModelConfig) -> None:
    graph = trace(gpt, TraceOptions(autocast_format="bf16", optimizer_implementation="foreach"))
    weights = {p.storage for p in graph.parameters}
    casts = [
        int(graph.tensor_storage[graph.op_inputs.row(op)[0]])
        for op, kind in enumerate(graph.op_kind.tolist())
        if graph.kinds[kind].target == "aten._to_copy" and graph.op_phase[op] == Phase.FORWARD
    ]
    cast_weights = [storage for storage in casts if storage in weights]
    assert cast_weights
    assert len(cast_weights) == len(set(cast_weights))
    products = {graph.specs[k.inputs[-1]].dtype for k in graph.kinds if k.op_class == "matmul"}
    assert products == {"bf16"}


@pytest.mark.parametrize("format_name", ["bf16", "fp16"])
@pytest.mark.parametrize("wide", [True, False])
def test_norms_and_softmax_under_autocast_run_in_the_formats_of_a_cuda_device(
    gpt: ModelConfig, wide: bool, format_name: str
) -> None:
    """aten/src/ATen/autocast_mode.h lists layer_norm and softmax among the operators that CUDA runs in fp32."""
    options = TraceOptions(autocast_format=format_name, attention="unfused", autocast_norms_in_fp32=wide)
    graph = trace(gpt, options)

    def formats(target: str, outputs: bool = False) -> set[str]:
        kinds = [kind for kind in graph.kinds if kind.target == target]
        return {graph.specs[spec].dtype for k in kinds for spec in (k.outputs if outputs else k.inputs)}

    assert formats("aten.native_layer_norm") == {"fp32" if wide else format_name}
    assert formats("aten._softmax") == {format_name}
    assert formats("aten._softmax", outputs=True) == {"fp32"}
    assert formats("aten._softmax_backward_data") == {"fp32"}
    assert formats("aten.bmm") == {format_name}


def test_a_users_file_is_traced_and_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COSIM_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def build(width):\n"
        "    block = lambda: nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))\n"
        "    return nn.Sequential(nn.Embedding(50, width), *(block() for _ in range(4)), nn.Linear(width, 50))\n"
    )
    graph = cached_trace(PythonModel("mine:build", {"width": 16}, tmp_path), TraceOptions(batch=2, sequence=8))
    assert [len(block.layers) for block in graph.blocks if len(block.layers) > 1] == [4]
    assert graph.provenance["fixed"] == {}
    assert not (tmp_path / "cache").exists()


def test_a_module_that_is_moved_as_it_is_built_is_the_same_module() -> None:
    def moved() -> nn.Module:
        return Tiny().to("cpu").to(torch.float64).to(torch.float32)

    graph = trace(moved, TraceOptions(batch=2, sequence=8))
    assert len(graph) == len(trace(Tiny, TraceOptions(batch=2, sequence=8)))
    assert graph.parameter_count() == sum(p.numel() for p in Tiny().parameters())


@pytest.mark.parametrize("format_name", ["float64", "bfloat16", "float16"])
def test_parameters_in_a_format_of_the_modules_own_are_refused(format_name: str) -> None:
    """A run's precision decides what its parameters weigh; weights in another format would be counted wrongly."""
    with pytest.raises(InputError, match=rf"of its [\d,]+ parameters are {format_name}, .* allowed: .* here fp32"):
        trace(lambda: Tiny().to(getattr(torch, format_name)), TraceOptions(batch=2, sequence=8))


def test_a_few_parameters_may_have_another_format() -> None:
    def routed() -> nn.Module:
        module = Tiny()
        module.register_parameter("scale", nn.Parameter(torch.ones(3, dtype=torch.float64)))
        return module

    assert trace(routed, TraceOptions(batch=2, sequence=8)).parameter_count() > 0


def test_a_module_that_refuses_other_sizes_than_its_own_is_traced_in_silence() -> None:
    """PyTorch logs a traceback for every operator that refuses its shapes."""
    logged: list[logging.LogRecord] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = logged.append  # type: ignore[method-assign]
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.addHandler(handler)
    try:
        graph = trace(lambda: Tiny(lambda x: x + torch.ones(16, 32)), TraceOptions(batch=2, sequence=16))
    finally:
        logger.removeHandler(handler)
    assert graph.provenance["fixed"] == {"sequence": 16}
    assert logged == []


def test_only_fully_known_operators_make_up_the_models_of_this_project(gpt: ModelConfig, llama: ModelConfig) -> None:
    for model in (gpt, llama):
        for attention in ("flash", "unfused"):
            graph = trace(model, TraceOptions(attention=attention, dropout=0.1))
            assert graph.unknown_ops == {}
            assert {kind.op_class for kind in graph.kinds} <= set(OP_CLASSES)


@pytest.mark.parametrize(
    ("target", "op_class"),
    [
        ("aten.add_", "pointwise"),
        ("aten._foreach_mul_", "pointwise"),
        ("aten._foreach_norm", "reduction"),
        ("aten._foreach_copy_", "copy"),
        ("aten.t", "view"),
        ("aten.no_such_operator", "unknown"),
    ],
)
def test_an_operator_in_place_or_over_many_tensors_is_still_that_operator(target: str, op_class: str) -> None:
    assert lookup(target).op_class == op_class
