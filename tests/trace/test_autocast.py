"""Autocast that a module opens itself, for the device that it was written for, against the recipe's."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cosim.graph import OpGraph, Phase
from cosim.trace import TraceOptions, trace
from cosim.trace.rehearsal import rehearse

SIZES = {"batch": 2, "sequence": 16}


class Casting(nn.Module):
    """Logits of tokens: embedding, norm, an MLP and a head, under what the test opens."""

    def __init__(self, opened: Callable[[], torch.autocast] | None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 32)
        self.norm = nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)
        self.head = nn.Linear(32, 100)
        self.opened = opened

    def logits(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embedding(tokens))
        return self.head(self.down(self.up(x).softmax(-1)))  # type: ignore[no-any-return]

    def forward(self, tokens: Tensor) -> Tensor:
        if self.opened is None:
            return self.logits(tokens)
        with self.opened():
            return self.logits(tokens)


def steps(graph: OpGraph) -> list[tuple[str, int, tuple[str, ...]]]:
    """Each op of forward and backward with the formats that it reads and writes."""
    found = []
    for op, kind in enumerate(graph.op_kind.tolist()):
        operands = (*graph.kinds[kind].inputs, *graph.kinds[kind].outputs)
        formats = tuple(graph.specs[spec].dtype for spec in operands)
        if graph.op_phase[op] != Phase.OPTIMIZER:
            found.append((graph.kinds[kind].target, int(graph.op_phase[op]), formats))
    return found


OPENED = {
    "bf16": lambda: torch.autocast("cuda", torch.bfloat16),
    "fp16": lambda: torch.autocast(device_type="cuda"),  # CUDA's default format
}


@pytest.mark.parametrize("format_name", list(OPENED))
def test_autocast_of_cuda_in_a_module_is_the_recipes(format_name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PyTorch's own is that it disables autocast
        own = trace(lambda: Casting(OPENED[format_name]), TraceOptions(**SIZES))
    options = TraceOptions(autocast_format=format_name, loss_in_fp32=True, **SIZES)
    assert steps(own) == steps(trace(lambda: Casting(None), options))
    products = {formats[:2] for target, _, formats in steps(own) if target in ("aten.mm", "aten.addmm")}
    assert products == {(format_name, format_name)}


def test_a_module_may_close_the_recipes_autocast() -> None:
    closed = trace(
        lambda: Casting(lambda: torch.autocast("cuda", enabled=False)), TraceOptions(autocast_format="bf16", **SIZES)
    )
    assert {formats[:2] for target, _, formats in steps(closed) if target == "aten.mm"} == {("fp32", "fp32")}


def test_autocast_of_cuda_casts_in_a_rehearsal_and_is_as_before_after_it() -> None:
    class Reading(Casting):
        def forward(self, tokens: Tensor) -> Tensor:
            logits = super().forward(tokens)
            return logits * 2 if (logits.dtype.itemsize * torch.ones(1)).item() == 2 else logits

    before = torch.autocast.__init__
    values = rehearse(lambda: Reading(OPENED["bf16"]), TraceOptions(**SIZES))
    assert [read.value for read in values.first] == [2.0]
    assert torch.autocast.__init__ is before
