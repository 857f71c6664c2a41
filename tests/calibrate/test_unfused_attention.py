"""The kernels that unfused attention's published rows are priced as, against PyTorch's own operators."""

from collections import Counter
from typing import Any

import pytest

from cosim.cost.rows import kernels
from hwmodels.work import Gemm, Pass

# How many kernels each operator starts; views and empty tensors start none, and a stack copies tensor by tensor.
KERNELS = dict.fromkeys(("clone", "_to_copy", "fill", "full", "triu", "add", "mul", "_softmax"), 1)
KERNELS |= {"_softmax_backward_data": 1, "stack": 3}
PRODUCTS = ("bmm", "baddbmm")


def operators(causal: bool, phase: str) -> Counter[str]:
    """How many products and other kernels PyTorch runs for the benchmark's standard attention in fp16."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            ran.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    ran: list[str] = []
    b, s, h, d = 2, 8, 3, 4
    packed = torch.randn(b, s, 3, h, d, dtype=torch.float16, requires_grad=True)

    def forward() -> torch.Tensor:
        q, k, v = packed.unbind(dim=2)
        q, k = q.permute(0, 2, 1, 3).reshape(b * h, s, d), k.permute(0, 2, 3, 1).reshape(b * h, d, s)
        room = torch.empty(b * h, s, s, dtype=packed.dtype)
        scores = torch.baddbmm(room, q, k, beta=0, alpha=d**-0.5).reshape(b, h, s, s)
        if causal:
            mask = torch.triu(torch.full((s, s), -10000.0), 1)
            scores = scores + mask.to(dtype=scores.dtype)
        weights = torch.nn.functional.dropout(torch.softmax(scores, dim=-1), 0.0)
        return torch.einsum("bhts,bshd->bthd", weights, v).to(packed.dtype)

    result = forward()
    with Recorder():  # type: ignore[no-untyped-call]
        forward() if phase == "fwd" else result.backward(torch.randn_like(result))  # type: ignore[no-untyped-call]
    found: Counter[str] = Counter()
    for name in ran:
        found["products"] += name in PRODUCTS
        found["passes"] += KERNELS.get(name, 0)
    return found


@pytest.mark.parametrize("phase", ["fwd", "bwd"])
@pytest.mark.parametrize("causal", [False, True])
def test_standard_attention_is_as_many_kernels_as_pytorch_runs(causal: bool, phase: str) -> None:
    row = {"op": f"attention_{phase}", "dtype": "fp16", "b": 2, "heads": 3, "head_dim": 4, "seq": 8, "causal": causal}
    works = kernels(row, "unfused")
    found = operators(causal, phase)
    assert sum(isinstance(work, Gemm) for work in works) == found["products"]
    assert sum(isinstance(work, Pass) for work in works) == found["passes"]
