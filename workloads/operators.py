"""The operators that PyTorch lacks or takes apart, each declared once: schema, shapes, gradient, plain implementation.

    cosim::attention           softmax(q k^T * scale + bias) v without the scores in memory, as FlashAttention
    cosim::attention_backward  its gradient: recomputes the scores from q, k and the row statistics
    cosim::rms_norm            x * rstd * weight, one kernel (PyTorch on CUDA has one, on CPU it is eight operators)
    cosim::rms_norm_backward   its gradient
    cosim::cross_entropy       mean cross entropy in one pass over the logits, in their own format
    cosim::cross_entropy_backward  its gradient
    cosim::grouped_mm          rows sorted by group, each multiplied by its group's matrix: experts, one kernel
    cosim::grouped_mm_weight   the gradient of its matrices (that of its rows is grouped_mm with them transposed)

A trace sees each as one node. The plain implementations run on any device in any floating-point format and exist for
correctness; they are registered for every backend, so a faster CPU or CUDA kernel of the same schema simply takes
precedence. Importing this module registers them, once.

Shapes: q (batch, heads, seq, head_dim); k and v (batch, kv_heads, seq_k, head_dim), where kv_heads divides heads.
Results are shaped like q and lie in memory as (batch, seq, heads, head_dim), as FlashAttention's do, so that merging
the heads is a view.
"""

import math
from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("cosim::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    dropout: float,
    scale: float,
    alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of `q` over `k` and `v`: (out like q, lse fp32 (batch, heads, seq), seed int64 ()).

    `lse` is the logarithm of each row's softmax denominator. `dropout` is the probability of dropping an attention
    weight, and `seed` names the mask. A causal mask is aligned to the last key. `alibi_slopes` (heads,) adds
    -slope * |distance| to the scores (Press et al., arXiv 2108.12409).
    FlashAttention-2, arXiv 2307.08691, algorithm 1.
    """
    scores = _scores(q, k, causal, scale, alibi_slopes)
    lse = torch.logsumexp(scores, dim=-1)
    weights = _softmax(scores, lse)
    seed = torch.randint(2**62, (), device=q.device) if dropout else torch.zeros((), dtype=torch.int64, device=q.device)
    if dropout:
        weights = weights * _keep(weights, dropout, seed)
    out = _heads_inside(_ungrouped(_grouped(weights, k) @ v.to(weights.dtype).unsqueeze(2)), q.dtype)
    return out, lse.to(torch.promote_types(torch.float32, lse.dtype)), seed


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_options: object) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, seq, _head_dim = q.shape
    lse = q.new_empty((batch, heads, seq), dtype=torch.promote_types(torch.float32, q.dtype))
    return _empty_heads_inside(q, v.shape[-1]), lse, q.new_empty((), dtype=torch.int64)


@torch.library.custom_op("cosim::attention_backward", mutates_args=())
def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    seed: Tensor,
    causal: bool,
    dropout: float,
    scale: float,
    alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) of `attention`, from what its forward saved. FlashAttention-2, algorithm 2."""
    weights = _softmax(_scores(q, k, causal, scale, alibi_slopes), lse)
    wide = weights.dtype
    grad, keys, values = grad_out.to(wide), k.to(wide).unsqueeze(2), v.to(wide).unsqueeze(2)
    grouped_grad = _grouped(grad, k)
    grad_weights = _ungrouped(grouped_grad @ values.transpose(-1, -2))
    dropped = weights
    if dropout:
        keep = _keep(weights, dropout, seed)
        dropped, grad_weights = weights * keep, grad_weights * keep
    row = (grad * out.to(wide)).sum(-1, keepdim=True)
    grad_scores = _grouped(weights * (grad_weights - row) * scale, k)
    dq = _ungrouped(grad_scores @ keys)
    dk = (grad_scores.transpose(-1, -2) @ _grouped(q.to(wide), k)).sum(2)
    dv = (_grouped(dropped, k).transpose(-1, -2) @ grouped_grad).sum(2)
    return _heads_inside(dq, q.dtype), _heads_inside(dk, k.dtype), _heads_inside(dv, v.dtype)


@attention_backward.register_fake
def _(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_saved_and_options: object) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(_empty_heads_inside(x, x.shape[-1]) for x in (q, k, v))  # type: ignore[return-value]


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, ctx.causal, ctx.dropout, ctx.scale, slopes = inputs
    out, lse, seed = output
    ctx.mark_non_differentiable(lse, seed)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, lse, seed, slopes)


def _attention_gradient(ctx: Any, grad_out: Tensor | None, *_unused: None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 7
    q, k, v, out, lse, seed, slopes = ctx.saved_tensors
    dq, dk, dv = attention_backward(grad_out, q, k, v, out, lse, seed, ctx.causal, ctx.dropout, ctx.scale, slopes)
    return dq, dk, dv, None, None, None, None


attention.register_autograd(_attention_gradient, setup_context=_save_attention)


@torch.library.custom_op("cosim::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Root-mean-square norm over the last dimension: (out like x, rstd fp32 (..., 1)).

    Computed in fp32 at least, as PyTorch's CUDA kernel does. Zhang and Sennrich, arXiv 1910.07467.
    """
    wide = x.to(torch.promote_types(torch.float32, x.dtype))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * rstd * weight).to(x.dtype).contiguous(), rstd


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=torch.promote_types(torch.float32, x.dtype))
    return x.new_empty(x.shape), rstd


@torch.library.custom_op("cosim::rms_norm_backward", mutates_args=())
def rms_norm_backward(grad_out: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients (dx, dweight) of `rms_norm`."""
    grad, normal = grad_out.to(rstd.dtype), x.to(rstd.dtype) * rstd
    dweight = (grad * normal).flatten(0, -2).sum(0)
    scaled = grad * weight
    dx = rstd * (scaled - normal * (scaled * normal).mean(-1, keepdim=True))
    return dx.to(x.dtype).contiguous(), dweight.to(weight.dtype)


@rms_norm_backward.register_fake
def _(grad_out: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save_rms_norm(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], inputs[1], output[1])


def _rms_norm_gradient(ctx: Any, grad_out: Tensor | None, _rstd: None) -> tuple[Tensor | None, Tensor | None, None]:
    if grad_out is None:
        return None, None, None
    dx, dweight = rms_norm_backward(grad_out, *ctx.saved_tensors)
    return dx, dweight, None


rms_norm.register_autograd(_rms_norm_gradient, setup_context=_save_rms_norm)


@torch.library.custom_op("cosim::cross_entropy", mutates_args=())
def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross entropy of logits (tokens, vocab) in their own format: (loss fp32 (), lse fp32 (tokens,)).

    One pass that keeps a number per row instead of the probabilities, as flash_attn.losses.cross_entropy does.
    """
    wide = logits.to(torch.promote_types(torch.float32, logits.dtype))
    lse = torch.logsumexp(wide, dim=-1)
    picked = wide.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return (lse - picked).mean(), lse


@cross_entropy.register_fake
def _(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(torch.float32, logits.dtype)
    return logits.new_empty((), dtype=wide), logits.new_empty(logits.shape[:1], dtype=wide)


@torch.library.custom_op("cosim::cross_entropy_backward", mutates_args=())
def cross_entropy_backward(grad_loss: Tensor, logits: Tensor, labels: Tensor, lse: Tensor) -> Tensor:
    """Gradient of `cross_entropy` with respect to the logits: (softmax - one-hot) / tokens."""
    gradient = torch.exp(logits.to(lse.dtype) - lse.unsqueeze(-1))
    gradient.scatter_add_(-1, labels.unsqueeze(-1), -torch.ones_like(gradient[:, :1]).expand(-1, 1))
    return (gradient * (grad_loss / max(len(labels), 1))).to(logits.dtype)


@cross_entropy_backward.register_fake
def _(grad_loss: Tensor, logits: Tensor, labels: Tensor, lse: Tensor) -> Tensor:
    return logits.new_empty(logits.shape)


def _save_cross_entropy(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, output[1])


def _cross_entropy_gradient(ctx: Any, grad_loss: Tensor | None, _lse: None) -> tuple[Tensor | None, None]:
    if grad_loss is None:
        return None, None
    return cross_entropy_backward(grad_loss, *ctx.saved_tensors), None


cross_entropy.register_autograd(_cross_entropy_gradient, setup_context=_save_cross_entropy)


@torch.library.custom_op("cosim::grouped_mm", mutates_args=())
def grouped_mm(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Rows x (rows, k), the first counts[0] of them times weight[0] (k, n), the next counts[1] times weight[1], ...

    counts int64 (groups,) sums to at most `rows`; rows beyond are zero. Returns (rows, n). The shape does not depend on
    how the rows are spread, as in torch._grouped_mm and in MegaBlocks (arXiv 2211.15841).
    """
    parts = [part @ matrix for part, matrix in zip(_groups(x, counts), weight, strict=True)]
    out = x.new_zeros((x.shape[0], weight.shape[-1]))
    done = sum(len(part) for part in parts)
    if parts and done:
        out[:done] = torch.cat(parts)
    return out


@grouped_mm.register_fake
def _(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[-1]))


@torch.library.custom_op("cosim::grouped_mm_weight", mutates_args=())
def grouped_mm_weight(x: Tensor, grad: Tensor, counts: Tensor, transposed: bool) -> Tensor:
    """Per group the product of its columns of x (k, rows) and its rows of grad (rows, n): (groups, k, n).

    With `transposed` the result lies in memory as (groups, n, k).
    """
    parts = zip(_groups(x.T, counts), _groups(grad, counts), strict=True)
    out = torch.stack([rows.T @ part for rows, part in parts])
    return out.mT.contiguous().mT if transposed else out


@grouped_mm_weight.register_fake
def _(x: Tensor, grad: Tensor, counts: Tensor, transposed: bool) -> Tensor:
    groups, k, n = counts.shape[0], x.shape[0], grad.shape[1]
    return x.new_empty((groups, n, k)).mT if transposed else x.new_empty((groups, k, n))


def _save_grouped_mm(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _grouped_mm_gradient(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None
    x, weight, counts = ctx.saved_tensors
    grad = grad.contiguous()
    dx = grouped_mm(grad, weight.mT, counts) if ctx.needs_input_grad[0] else None
    transposed = weight.stride(-1) > weight.stride(-2)
    dweight = grouped_mm_weight(x.T, grad, counts, transposed) if ctx.needs_input_grad[1] else None
    return dx, dweight, None


grouped_mm.register_autograd(_grouped_mm_gradient, setup_context=_save_grouped_mm)


def alibi_slopes(heads: int) -> list[float]:
    """Each head's slope: 2^(-8 i / n) for n heads, n a power of two, interleaved otherwise (arXiv 2108.12409)."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    between = [2.0 ** (-4.0 * (2 * i + 1) / power) for i in range(heads - power)]
    return slopes + between


def _groups(x: Tensor, counts: Tensor) -> tuple[Tensor, ...]:
    """The rows of each group."""
    sizes = counts.tolist()
    return torch.split(x[: sum(sizes)], sizes)


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float, slopes: Tensor | None) -> Tensor:
    """Masked scores (batch, heads, seq, seq_k) in fp32 at least, as the kernels accumulate."""
    wide = torch.promote_types(torch.float32, q.dtype)
    scores = _ungrouped(_grouped(q.to(wide), k) @ k.to(wide).unsqueeze(2).transpose(-1, -2)) * scale
    seq, seq_k = q.shape[2], k.shape[2]
    rows = torch.arange(seq, device=q.device).unsqueeze(1) + (seq_k - seq)
    distance = rows - torch.arange(seq_k, device=q.device)
    if slopes is not None:
        scores = scores - slopes.to(wide).view(-1, 1, 1) * distance.abs()
    return scores.masked_fill(distance < 0, -math.inf) if causal else scores


def _softmax(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse); a row without any key is all zeros."""
    return torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0).to(scores.dtype).unsqueeze(-1))


def _keep(weights: Tensor, dropout: float, seed: Tensor) -> Tensor:
    """The mask that `seed` names, scaled by 1 / (1 - dropout): the same in forward and backward."""
    if dropout >= 1.0:
        return torch.zeros_like(weights)
    generator = torch.Generator(weights.device).manual_seed(int(seed))
    draws = torch.rand(weights.shape, generator=generator, device=weights.device)
    return (draws >= dropout).to(weights.dtype) / (1.0 - dropout)


def _grouped(x: Tensor, k: Tensor) -> Tensor:
    """(batch, heads, ...) as (batch, kv_heads, heads per kv head, ...)."""
    return x.reshape(x.shape[0], k.shape[1], -1, *x.shape[2:])


def _ungrouped(x: Tensor) -> Tensor:
    return x.flatten(1, 2)


def _heads_inside(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)


def _empty_heads_inside(x: Tensor, head_dim: int) -> Tensor:
    batch, heads, seq, _ = x.shape
    return x.new_empty((batch, seq, heads, head_dim)).transpose(1, 2)
