"""An RMSNorm written in elementary operators keeps what autograd keeps of them, in eager and in captured graphs."""

import pytest
import torch
from torch import Tensor, nn

from cosim.graph import OpGraph, Phase
from cosim.trace import TraceOptions, trace
from cosim.trace.export import saved_bytes
from cosim.trace.replacements import cuda_operators
from workloads import layers, operators
from workloads.build import build_module
from workloads.model import ModelConfig
from workloads.training import loss_of_output

BATCH, SEQUENCE = 2, 64


class Llama2Norm(nn.Module):
    """meta-llama/llama, llama/model.py, RMSNorm."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def _norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        output = self._norm(x.float()).type_as(x)
        return output * self.weight


def step(model: ModelConfig, fused: bool, parameter_format: str = "fp32", **options: str) -> OpGraph:
    recipe = TraceOptions(
        rms_norm_fused=fused, parameter_format=parameter_format, batch=BATCH, sequence=SEQUENCE, **options
    )
    return trace(model, recipe)


def saved_for_real(model: ModelConfig) -> int:
    """Bytes of the distinct storages that a real step's autograd saves, parameters, buffers and inputs apart."""
    module = build_module(model).train()
    ids, labels = (torch.randint(0, model.vocab, (BATCH, SEQUENCE)) for _ in range(2))
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers(), ids, labels)}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held = loss_of_output(module(ids), labels)  # noqa: F841  keeps what is saved apart in memory
    return sum(saved.values())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("fused", [True, False])
def test_saved_bytes_are_those_of_pytorch_on_real_tensors(
    llama: ModelConfig, dtype: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = saved_bytes(step(llama, fused, dtype, master_format="fp32"))
    if not fused:
        monkeypatch.setattr(layers, "RMSNorm", Llama2Norm)
    torch.set_default_dtype(torch.float32 if dtype == "fp32" else torch.bfloat16)
    try:
        real = saved_for_real(llama)
    finally:
        torch.set_default_dtype(torch.float32)
    assert expected == pytest.approx(real, rel=2e-3)


def test_each_norm_keeps_its_fp32_copy_and_its_normal_instead_of_its_input(llama: ModelConfig) -> None:
    norms, elements = 2 * llama.layers + 1, BATCH * SEQUENCE * llama.hidden
    for dtype, more in (("fp32", 4), ("bf16", 4 + 2 - 2)):
        fused, elementary = (saved_bytes(step(llama, yes, dtype, master_format="fp32")) for yes in (True, False))
        assert elementary - fused == norms * elements * more


def test_what_a_compiler_saves_does_not_depend_on_how_the_norm_is_written(llama: ModelConfig) -> None:
    fused, elementary = (saved_bytes(step(llama, yes, frontend="compile")) for yes in (True, False))
    assert fused == elementary


def test_the_elementary_norm_is_the_fused_ones_value_and_gradient() -> None:
    values = []
    for fused in (True, False):
        torch.manual_seed(0)
        x, weight = torch.randn(3, 5, 16, requires_grad=True), torch.randn(16, requires_grad=True)
        with cuda_operators(fused):
            out = operators.rms_norm(x, weight, 1e-5)[0]
            out.square().sum().backward()
        values.append((out, x.grad, weight.grad))
    for one, other in zip(*values, strict=True):
        torch.testing.assert_close(one, other)


def test_elementary_norms_are_known_operators_of_their_module(llama: ModelConfig) -> None:
    graph = step(llama, False)
    assert graph.unknown_ops == {}
    assert not [kind for kind in graph.kinds if kind.op_class.startswith("norm")]
    names = [graph.modules[m] for m in graph.op_module[graph.op_phase == Phase.BACKWARD].tolist()]
    assert sum(name == "layers.0.attention_norm" for name in names) > 5
    assert [block.layers for block in graph.blocks] == [tuple(range(llama.layers))]
