"""Makes a CPU trace run the operators that a CUDA device would run.

PyTorch decomposes some operators by device before they reach the recorder: attention with dropout becomes matrix
products on a CPU, dropout four operators, RMSNorm eight. While `cuda_operators` is open those take their one-kernel
form, for fake tensors and for everything else on this process's CPU, so it is open only while a step is recorded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from workloads import operators


@contextmanager
def cuda_operators() -> Iterator[None]:
    """While open: attention, dropout and RMS norm are one operator each."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("scaled_dot_product_attention", _attention, "AutogradCPU")
        library.impl("dropout", _dropout, "AutogradCPU")
        library.impl("rms_norm", _rms_norm, "AutogradCPU")
        yield


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """F.scaled_dot_product_attention as `cosim::attention`; a mask that needs a gradient, or odd ranks, as matrix
    products.
    """
    scale = float(query.shape[-1] ** -0.5 if scale is None else scale)
    out: Tensor
    plain = query.dim() == key.dim() == value.dim() == 4 and query.shape[0] == key.shape[0]
    if attn_mask is None and plain:
        out = operators.attention(query, key, value, is_causal, dropout_p, scale)[0]
        return out
    if attn_mask is not None and plain and not attn_mask.requires_grad and query.shape[1] == key.shape[1]:
        # The dropout mask is made inside the kernel on CUDA, so that leaving it out moves no other bytes.
        out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
        )[0]
        return out
    out = torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]
    return out


def _dropout(x: Tensor, p: float, train: bool) -> Tensor:
    dropped: Tensor = torch.ops.aten.native_dropout(x, p, train)[0] if train and p > 0 else x
    return dropped


def _rms_norm(x: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    if weight is not None and len(normalized_shape) == 1:
        out: Tensor = operators.rms_norm(x, weight, eps)[0]
        return out
    wide = x.to(torch.promote_types(torch.float32, x.dtype))
    dims = list(range(-len(normalized_shape), 0))
    normal = (wide * torch.rsqrt(wide.square().mean(dims, keepdim=True) + eps)).to(x.dtype)
    return normal if weight is None else normal * weight
