"""Makes a CPU trace run the operators that a CUDA device would run.

PyTorch decomposes some operators by device before they reach the recorder: attention with dropout becomes matrix
products on a CPU, dropout four operators, RMSNorm eight. While `cuda_operators` is open those take their one-kernel
form, for fake tensors and for everything else on this process's CPU, so it is open only while a step is recorded.
`torch.autocast("cuda")`, of the recipe or in a module's own code, is then the CPU's with CUDA's lists.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from workloads import operators


@contextmanager
def cuda_operators(rms_norm_fused: bool = True, norms_in_fp32: bool = True) -> Iterator[None]:
    """While open: attention, dropout, RMS norm and softmax in another format are one operator each; autocast is CUDA's.

    RMS norm is elementary operators where it is not `rms_norm_fused`. Norms under autocast read and write fp32;
    `norms_in_fp32=False` is for programs whose norms cast to autocast's format themselves.
    """
    with (
        torch.library._scoped_library("aten", "IMPL") as library,
        torch.library._scoped_library("cosim", "IMPL") as own,
    ):
        if not rms_norm_fused:
            own.impl("rms_norm", _elementary_rms_norm, "AutogradCPU")
        library.impl("scaled_dot_product_attention", _attention, "AutogradCPU")
        library.impl("dropout", _dropout, "AutogradCPU")
        library.impl("rms_norm", _rms_norm, "AutogradCPU")
        for name in ("softmax", "log_softmax"):
            kernel = getattr(torch.ops.aten, f"_{name}").default
            library.impl(f"{name}.int", _widening(kernel), "AutogradCPU")
        for name in ("_fused_sgd_", "_fused_adagrad_"):  # without these, fake tensors would become real ones
            library.impl(name, _nothing, "Meta")
        _cast_as_cuda(library, own, norms_in_fp32)
        with _autocast_of_cuda():
            yield


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    """An operator that only writes its arguments, for tensors without memory."""


# Operators that CUDA's autocast runs in fp32 and the CPU's leaves alone: aten/src/ATen/autocast_mode.h, AT_FORALL_FP32
# and AT_FORALL_FP32_SET_OPT_DTYPE, as far as Transformers use them.
_IN_FP32 = (
    *("layer_norm", "group_norm", "cumsum", "sum", "sum.dim_IntList"),
    *("exp", "log", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "reciprocal", "rsqrt", "softplus", "logsumexp"),
)
_NORMS = ("layer_norm", "group_norm")


def _cast_as_cuda(library: Any, own: Any, norms_in_fp32: bool) -> None:
    """Registers what CUDA's autocast casts and the CPU's does not."""
    for name in _IN_FP32:
        wide = norms_in_fp32 or name not in _NORMS
        library.impl(name, _casting(_overload(f"aten.{name}"), torch.float32 if wide else None), "AutocastCPU")
    for name in ("softmax", "log_softmax"):
        library.impl(f"{name}.int", _to_fp32(_overload(f"aten.{name}.int")), "AutocastCPU")
    own.impl("attention", _in_autocast_format(torch.ops.cosim.attention.default), "AutocastCPU")
    if not norms_in_fp32:
        own.impl("rms_norm", _casting(torch.ops.cosim.rms_norm.default, None), "AutocastCPU")


@contextmanager
def _autocast_of_cuda() -> Iterator[None]:
    """While open, `torch.autocast("cuda")` is that of this process's tensors, in CUDA's default format."""
    made = torch.autocast.__init__

    @functools.wraps(made)
    def make(self: Any, device_type: str, dtype: torch.dtype | None = None, *args: Any, **kwargs: Any) -> None:
        if device_type == "cuda":
            device_type, dtype = "cpu", torch.get_autocast_dtype("cuda") if dtype is None else dtype
        made(self, device_type, dtype, *args, **kwargs)

    torch.autocast.__init__ = make  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__init__ = made  # type: ignore[method-assign]


def _overload(name: str) -> Any:
    _, packet, overload = f"{name}.default".split(".")[:3]
    return getattr(getattr(torch.ops.aten, packet), overload)


def _casting(operator: Any, dtype: torch.dtype | None) -> Any:
    """The operator on its floating-point operands in `dtype` (None: autocast's), itself outside autocast."""

    def run(*args: Any, **kwargs: Any) -> Any:
        wanted = dtype or torch.get_autocast_dtype("cpu")
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return operator(*(_cast(arg, wanted) for arg in args), **kwargs)

    return run


def _in_autocast_format(attention: Any) -> Any:
    """Attention with q, k and v cast, as autocast's list has scaled_dot_product_attention."""

    def run(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype("cpu")
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return attention(q.to(dtype), k.to(dtype), v.to(dtype), *args, **kwargs)

    return run


def _to_fp32(softmax: Any) -> Any:
    """A softmax that writes fp32 whatever it reads."""

    def run(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return softmax(x, dim, dtype or torch.float32)

    return run


_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
        return value.to(dtype)
    return value


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


def _widening(kernel: Any) -> Any:
    """A softmax whose CUDA kernel reads 16-bit numbers and writes fp32 without a cast in between.

    The CPU has no such kernel for tensors with memory.
    """

    def run(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Any:
        if dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16) and type(x) is not Tensor:
            return kernel(x, dim, True)
        return kernel(x if dtype is None else x.to(dtype), dim, False)

    return run


def _dropout(x: Tensor, p: float, train: bool) -> Tensor:
    dropped: Tensor = torch.ops.aten.native_dropout(x, p, train)[0] if train and p > 0 else x
    return dropped


def _elementary_rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm as LLaMA's own code has it (meta-llama/llama, llama/model.py, RMSNorm), which torchtitan took over.

    Autograd keeps the fp32 copy of x, 1 / rms, and the normal in x's format.
    """
    wide = x.float()
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * rstd).type_as(x) * weight, rstd


def _rms_norm(x: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    if weight is not None and len(normalized_shape) == 1:
        out: Tensor = operators.rms_norm(x, weight, eps)[0]
        return out
    wide = x.to(torch.promote_types(torch.float32, x.dtype))
    dims = list(range(-len(normalized_shape), 0))
    normal = (wide * torch.rsqrt(wide.square().mean(dims, keepdim=True) + eps)).to(x.dtype)
    return normal if weight is None else normal * weight
