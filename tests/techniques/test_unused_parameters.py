"""Trainable parameters that forward does not use, against PyTorch: no gradient, no state; what DDP makes of them."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cosim.graph import Category, OpGraph
from cosim.parallel.data_parallel import DataParallelPlan, plan
from cosim.parallel.groups import group
from cosim.techniques.optimizers import state_bytes
from cosim.techniques.precision import StepFormats
from cosim.trace import TraceOptions, trace

UNUSED = 48 * 48 + 48


class Partly(nn.Module):
    """A classifier of tokens with a layer that it does not use, a result that it drops and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 32)
        self.unused = nn.Linear(48, 48)
        self.dropped = nn.Linear(32, 32)
        self.frozen = nn.Linear(32, 32).requires_grad_(False)
        self.head = nn.Linear(32, 64)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.frozen(self.embedding(tokens))
        self.dropped(x)
        return self.head(x)  # type: ignore[no-any-return]


REAL: dict[str, Any] = {
    "adamw": torch.optim.AdamW,
    "sgd": lambda parameters: torch.optim.SGD(parameters, momentum=0.9),
    "adafactor": torch.optim.Adafactor,
}


def traced(optimizer: str = "adamw", **options: Any) -> OpGraph:
    return trace(Partly, TraceOptions(optimizer=optimizer, batch=2, sequence=8, **options))


def held(graph: OpGraph, category: Category) -> int:
    return int(graph.storage_bytes[graph.storage_category == category].sum())


def stepped(module: nn.Module, optimizer: Any) -> None:
    nn.functional.cross_entropy(
        module(torch.zeros(2, 8, dtype=torch.int64)).flatten(0, 1), torch.zeros(16).long()
    ).backward()
    optimizer.step()


@pytest.mark.parametrize("optimizer", list(REAL))
def test_the_state_is_what_pytorchs_optimizer_makes(optimizer: str) -> None:
    module = Partly()
    real = REAL[optimizer](module.parameters())
    stepped(module, real)
    state = sum(value.nbytes for one in real.state.values() for value in one.values() if isinstance(value, Tensor))
    graph = traced(optimizer)
    assert held(graph, Category.OPTIMIZER) == state
    assert {p.name for p in graph.parameters if p.trained} == {
        name for name, parameter in module.named_parameters() if parameter.grad is not None
    }
    assert held(graph, Category.GRADIENTS) == sum(p.grad.nbytes for p in module.parameters() if p.grad is not None)
    assert held(graph, Category.WEIGHTS) == sum(p.nbytes for p in module.parameters())


def test_their_masters_stay() -> None:
    graph = traced(parameter_format="bf16", master_format="fp32")
    trained = sum(p.numel() for p in (*nn.Embedding(64, 32).parameters(), *nn.Linear(32, 64).parameters()))
    unused = UNUSED + 32 * 32 + 32
    steps = 3 * 4  # numbers of the embedding, the head's weight and bias
    assert held(graph, Category.OPTIMIZER) == 12 * trained + 4 * unused + steps
    assert state_bytes(graph) == 8


def planned(zero: int) -> DataParallelPlan:
    return plan(
        traced(),
        group=group(8, 1, 8, 8),
        zero=zero,
        formats=StepFormats(4, 4, 4, 4, 4, 8),
        overlap_gradients=True,
        overlap_parameters=True,
        bucket_bytes=25 * 2**20,
        first_bucket_bytes=2**20,
    )


def test_ddp_reduces_zeros_for_them_and_they_have_no_state() -> None:
    """With find_unused_parameters, without which DDP refuses them; real buckets of one process, by its hook."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    sizes: list[int] = []

    def hook(_state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        sizes.append(bucket.buffer().numel())
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    try:
        module = Partly()
        parallel = nn.parallel.DistributedDataParallel(module, find_unused_parameters=True)
        parallel.register_comm_hook(None, hook)  # type: ignore[no-untyped-call]
        optimizer = torch.optim.AdamW(module.parameters())
        stepped(parallel, optimizer)
    finally:
        dist.destroy_process_group()
    assert sum(bucket.elements for bucket in planned(zero=0).buckets) == sum(sizes)
    assert planned(zero=0).trainable == sum(p.numel() for p in optimizer.state)


def test_sharded_they_are_gathered_with_their_unit_and_not_reduced() -> None:
    ours, module = planned(zero=3), Partly()
    assert ours.elements == sum(p.numel() for p in module.parameters())
    assert ours.elements - ours.trainable == UNUSED + 2 * (32 * 32 + 32)
    assert ours.resident_bytes()[Category.OPTIMIZER] == ours.trainable * 8 // 8
