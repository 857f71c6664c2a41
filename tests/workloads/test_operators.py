"""The operators against PyTorch's own functions, and as single nodes under FakeTensor."""

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from workloads import operators


class OperatorNames(TorchDispatchMode):
    """Counts the operators that reach the dispatcher."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[str(func)] += 1
        return func(*args, **(kwargs or {}))


def qkv(heads, kv_heads, seq, seq_k, dtype=torch.float64, head_dim=8):
    generator = torch.Generator().manual_seed(heads * 100 + seq)
    shapes = [(2, heads, seq, head_dim), (2, kv_heads, seq_k, head_dim), (2, kv_heads, seq_k, head_dim)]
    return [torch.randn(s, generator=generator, dtype=dtype, requires_grad=True) for s in shapes]


def gradients(out, inputs):
    direction = torch.sin(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape).to(out.dtype)
    return torch.autograd.grad(out, inputs, direction)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize(("causal", "seq", "seq_k"), [(True, 7, 7), (False, 7, 7), (True, 3, 9), (False, 5, 9)])
def test_attention_and_its_gradients_are_those_of_sdpa(heads, kv_heads, alibi, causal, seq, seq_k):
    q, k, v = qkv(heads, kv_heads, seq, seq_k)
    slopes = torch.tensor(operators.alibi_slopes(heads), dtype=torch.float64) if alibi else None
    distance = (torch.arange(seq)[:, None] + seq_k - seq - torch.arange(seq_k)[None, :]).double()
    bias = -slopes.view(-1, 1, 1) * distance.abs() if alibi else torch.zeros(heads, seq, seq_k, dtype=torch.float64)
    if causal:
        bias = bias.masked_fill(distance < 0, -math.inf)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None], scale=0.3, enable_gqa=True)
    out, lse, _ = operators.attention(q, k, v, causal, 0.0, 0.3, slopes)
    torch.testing.assert_close(out, expected)
    for got, want in zip(gradients(out, (q, k, v)), gradients(expected, (q, k, v)), strict=True):
        torch.testing.assert_close(got, want)
    scores = q @ k.repeat_interleave(heads // kv_heads, 1).transpose(-1, -2) * 0.3 + bias
    torch.testing.assert_close(lse, torch.logsumexp(scores, -1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_attention_in_short_formats_is_as_exact_as_the_format(dtype):
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in qkv(4, 2, 16, 16))
    out = operators.attention(q, k, v, True, 0.0, 0.3)[0]
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*wide, is_causal=True, scale=0.3, enable_gqa=True)
    tolerance = 4 * torch.finfo(dtype).eps
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    for got, want in zip(gradients(out, (q, k, v)), gradients(expected, wide), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=8 * tolerance, atol=8 * tolerance)


def test_dropout_drops_the_same_weights_in_backward_as_in_forward():
    """With v = identity the output is the dropped weight matrix itself, which yields the reference mask."""
    seq = 12
    q, k, _ = qkv(2, 2, seq, seq, head_dim=seq)
    v = torch.eye(seq, dtype=torch.float64).expand(2, 2, seq, seq).clone().requires_grad_()
    out = operators.attention(q, k, v, False, 0.4, 0.3)[0]
    weights = torch.softmax(q @ k.transpose(-1, -2) * 0.3, -1)
    kept = (out != 0).double() / 0.6
    assert 0.4 < (out != 0).double().mean() < 0.8
    expected = (weights * kept) @ v
    torch.testing.assert_close(out, expected)
    for got, want in zip(gradients(out, (q, k, v)), gradients(expected, (q, k, v)), strict=True):
        torch.testing.assert_close(got, want)


def test_dropout_follows_the_global_seed_and_dropping_all_gives_zero():
    q, k, v = qkv(2, 2, 6, 6)
    torch.manual_seed(1)
    first = operators.attention(q, k, v, True, 0.5, 0.3)[0]
    second = operators.attention(q, k, v, True, 0.5, 0.3)[0]
    torch.manual_seed(1)
    assert torch.equal(first, operators.attention(q, k, v, True, 0.5, 0.3)[0])
    assert not torch.equal(first, second)
    assert operators.attention(q, k, v, True, 1.0, 0.3)[0].abs().max() == 0


def test_a_query_before_all_keys_attends_to_nothing():
    q, k, v = qkv(2, 2, 4, 2)
    out = operators.attention(q, k, v, True, 0.0, 0.3)[0]
    assert out[:, :, :2].abs().max() == 0
    assert all(torch.isfinite(g).all() for g in gradients(out, (q, k, v)))


@pytest.mark.parametrize("shape", [(3, 16), (2, 5, 16)])
def test_rms_norm_and_its_gradients_are_those_of_pytorch(shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(16, dtype=torch.float64, requires_grad=True)
    out, rstd = operators.rms_norm(x, weight, 1e-5)
    expected = F.rms_norm(x, (16,), weight, 1e-5)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(rstd.squeeze(-1), (x.square().mean(-1) + 1e-5).rsqrt())
    for got, want in zip(gradients(out, (x, weight)), gradients(expected, (x, weight)), strict=True):
        torch.testing.assert_close(got, want)


def test_alibi_slopes_are_the_papers():
    assert operators.alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    twelve = operators.alibi_slopes(12)
    assert twelve[:8] == operators.alibi_slopes(8)
    assert twelve[8:] == operators.alibi_slopes(16)[0:8:2]


@pytest.mark.parametrize(("dropout", "alibi"), [(0.0, False), (0.0, True), (0.1, False), (0.1, True)])
def test_pytorchs_own_operator_checks_pass(dropout, alibi):
    """Schema, fake shapes and strides, autograd registration; the fake results match the real ones in layout."""
    q, k, v = qkv(4, 2, 6, 6, torch.float32)
    slopes = torch.tensor(operators.alibi_slopes(4)) if alibi else None
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operators.attention, (q, k, v, True, dropout, 0.3, slopes), test_utils=checks)
    out, lse, seed = operators.attention(q, k, v, True, dropout, 0.3, slopes)
    saved = [x.detach() for x in (out, q, k, v, out, lse, seed)]
    torch.library.opcheck(operators.attention_backward, (*saved, True, dropout, 0.3, slopes), test_utils=checks)
    x, weight = torch.randn(2, 3, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    torch.library.opcheck(operators.rms_norm, (x, weight, 1e-5), test_utils=checks)
    rstd = torch.ones(2, 3, 1)
    torch.library.opcheck(
        operators.rms_norm_backward, (x.detach(), x.detach(), weight.detach(), rstd), test_utils=checks
    )


def test_each_operator_is_one_node_forward_and_one_backward_and_merging_heads_copies_nothing():
    with FakeTensorMode(), OperatorNames() as seen:
        q, k, v = (torch.empty(s, requires_grad=True) for s in [(2, 8, 64, 16), (2, 2, 64, 16), (2, 2, 64, 16)])
        weight = torch.empty(128, requires_grad=True)
        out = operators.attention(q, k, v, True, 0.1, 0.25)[0]
        merged = out.transpose(1, 2).flatten(2)
        operators.rms_norm(merged, weight, 1e-5)[0].sum().backward()
    assert {name: n for name, n in seen.count.items() if name.startswith("cosim.")} == {
        "cosim.attention.default": 1,
        "cosim.attention_backward.default": 1,
        "cosim.rms_norm.default": 1,
        "cosim.rms_norm_backward.default": 1,
    }
    assert not {"aten.clone.default", "aten._unsafe_view.default", "aten.zeros_like.default"} & set(seen.count)
    assert q.grad.shape == q.shape
    assert k.grad.shape == k.shape


def test_a_faster_kernel_of_the_same_schema_takes_precedence():
    q, k, v = (x.detach() for x in qkv(2, 2, 4, 4))
    with torch.library._scoped_library("cosim", "IMPL") as native:
        native.impl("attention", lambda q, *rest: (q.clone(), q[..., 0].clone(), torch.zeros(())), "CPU")
        assert torch.equal(operators.attention(q, k, v, True, 0.0, 0.3)[0], q)
    assert not torch.equal(operators.attention(q, k, v, True, 0.0, 0.3)[0], q)
