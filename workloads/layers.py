"""The parts of a Transformer block, written as eager frameworks run them.

How the linear layers are named says how tensor parallelism may cut them:

    by output features (column)   qkv; query, key, value; up, gate
    by input features (row)       output, down
    by vocabulary                 embedding, head
    by expert                     experts.up, experts.gate, experts.down, whose first dimension is the expert
    not at all                    router, query_down, kv_down (low-rank projections)
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workloads import operators
from workloads.model import ModelConfig

AttentionKind = Literal["flash", "unfused"]


class RMSNorm(nn.Module):
    """Root-mean-square norm as one operator, `cosim::rms_norm`."""

    def __init__(self, hidden: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normal: Tensor = operators.rms_norm(x, self.weight, self.eps)[0]
        return normal


def make_norm(config: ModelConfig) -> nn.Module:
    """The configuration's norm over `hidden`."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.hidden, config.norm_eps)
    return nn.LayerNorm(config.hidden, config.norm_eps)


class Positions(nn.Module):
    """What attention must know about positions: made once per forward pass, shared by every layer.

    Rotary tables cos and sin (seq, head_dim) are computed in fp32 at construction and kept in the compute format, as
    Hugging Face keeps them; ALiBi slopes (heads,) are fp32. Frequency scaling for long contexts (Llama 3.1) changes
    values only, no shape and no cost, and is left out.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kind = config.pos_emb
        if config.pos_emb == "rope":
            turned = config.latent.qk_rope if config.latent else config.head_dim
            halves = torch.arange(0, turned, 2, dtype=torch.float32) / turned
            steps = torch.arange(config.max_positions, dtype=torch.float32)
            angles = torch.outer(steps, config.rope_theta**-halves).repeat(1, 2)
            self.register_buffer("cos", angles.cos().to(torch.get_default_dtype()), persistent=False)
            self.register_buffer("sin", angles.sin().to(torch.get_default_dtype()), persistent=False)
        elif config.pos_emb == "alibi":
            slopes = torch.tensor(operators.alibi_slopes(config.heads), dtype=torch.float32)
            self.register_buffer("slopes", slopes, persistent=False)

    def forward(self, seq: int) -> tuple[Tensor, ...]:
        """(cos, sin) for rope, (slopes,) for alibi, () otherwise."""
        if self.kind == "rope":
            return self.cos[:seq], self.sin[:seq]  # type: ignore[index]
        return (self.slopes,) if self.kind == "alibi" else ()  # type: ignore[return-value]


def drop(x: Tensor, dropout: float) -> Tensor:
    """x with a share `dropout` of it zeroed and the rest scaled up, as one kernel with a boolean mask.

    F.dropout is the same on CUDA, but on CPU tensors PyTorch takes it apart into four operators with a floating mask.
    """
    return torch.native_dropout(x, dropout, True)[0] if dropout else x


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (batch, heads, seq, head_dim), halves rotated against each other, in x's own format.

    The eager form of Hugging Face's Llama: x * cos + rotate_half(x) * sin.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x.dtype)


def unfused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: float,
    scale: float,
    slopes: Tensor | None = None,
    bias: Tensor | None = None,
    cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention as eager PyTorch runs it: every (seq, seq) intermediate is a tensor in memory.

    Shapes as in `operators.attention`; `mask` (seq, seq) is true where a query must not look, and `bias` (1, heads,
    seq, seq) is added to the scores, `cap` bounds them to +-cap (Gemma 2), `sinks` (heads,) is a score that every row
    has besides its keys (gpt-oss). The softmax reads and writes the compute format and accumulates in fp32 inside its
    kernel, as Megatron-LM's does.
    """
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = (x.unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(1, 2) for x in (k, v))
    scores = torch.matmul(q, k.transpose(-1, -2))
    scores = scores if scale == 1.0 else scores * scale
    if slopes is not None:
        # slope * j differs from -slope * (i - j) by a constant per row, which the softmax cancels (as BLOOM does it)
        columns = torch.arange(k.shape[2], device=k.device, dtype=slopes.dtype)
        scores = scores + (slopes.view(-1, 1, 1) * columns).to(scores.dtype)
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if mask is not None:
        scores = scores.masked_fill(mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = F.softmax(torch.cat((scores, column), dim=-1), dim=-1)[..., :-1]
    else:
        weights = F.softmax(scores, dim=-1)
    return torch.matmul(drop(weights, dropout), v)


class Attention(nn.Module):
    """Self-attention over x (batch, seq, hidden), or attention of x over `memory` (batch, seq_k, hidden).

    `packed`: one projection to (kv_heads, queries per kv head + 2, head_dim), the order in which Megatron-LM packs it;
    otherwise separate query, key and value projections as torchtitan has them. `causal` attention needs its `mask` only
    where it is unfused. `scale` defaults to 1 / sqrt(head_dim).
    """

    def __init__(
        self,
        config: ModelConfig,
        kind: AttentionKind,
        dropout: float,
        packed: bool,
        causal: bool = True,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.kind, self.dropout, self.packed, self.causal = kind, dropout, packed, causal
        self.kv_heads, self.head_dim = config.kv_heads, config.head_dim
        self.groups = config.heads // config.kv_heads
        self.rotary = config.pos_emb == "rope"
        self.scale = 1.0 / math.sqrt(self.head_dim) if scale is None else scale
        q_features, kv_features = config.heads * config.head_dim, config.kv_heads * config.head_dim
        if packed:
            self.qkv = nn.Linear(config.hidden, q_features + 2 * kv_features, bias=config.qkv_bias)
        else:
            self.query = nn.Linear(config.hidden, q_features, bias=config.qkv_bias)
            self.key = nn.Linear(config.hidden, kv_features, bias=config.qkv_bias)
            self.value = nn.Linear(config.hidden, kv_features, bias=config.qkv_bias)
        self.query_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.output = nn.Linear(q_features, config.hidden, bias=config.biases)

    def project(self, x: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """q (batch, seq, heads, head_dim), k and v (batch, seq_k, kv_heads, head_dim)."""
        if self.packed:
            qkv = self.qkv(x).unflatten(-1, (self.kv_heads, self.groups + 2, self.head_dim))
            q, k, v = qkv.split((self.groups, 1, 1), dim=3)
            return q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3)
        memory = x if memory is None else memory
        q, k, v = self.query(x), self.key(memory), self.value(memory)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in (q, k, v))
        return self.query_norm(q), self.key_norm(k), v

    def forward(
        self,
        x: Tensor,
        positions: tuple[Tensor, ...] = (),
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        memory: Tensor | None = None,
    ) -> Tensor:
        q, k, v = (y.transpose(1, 2) for y in self.project(x, memory))
        if self.rotary:
            q, k = rotate(q, *positions), rotate(k, *positions)
        slopes = positions[0] if positions and not self.rotary else None
        dropout = self.dropout if self.training else 0.0
        if self.kind == "flash" and bias is None:
            out = operators.attention(q, k, v, self.causal, dropout, self.scale, slopes)[0]
        else:
            out = unfused_attention(q, k, v, mask, dropout, self.scale, slopes, bias)
        return self.output(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """down(activation(up(x))), or down(activation(gate(x)) * up(x)) when gated; `dropout` acts before down."""

    def __init__(self, config: ModelConfig, ffn: int | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.activation, self.dropout = config.activation, dropout
        ffn = config.ffn if ffn is None else ffn
        self.up = nn.Linear(config.hidden, ffn, bias=config.biases)
        self.gate = nn.Linear(config.hidden, ffn, bias=config.biases) if config.gated_mlp else None
        self.down = nn.Linear(ffn, config.hidden, bias=config.biases)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is not None:
            inner = activate(self.gate(x), self.activation) * self.up(x)
        else:
            inner = activate(self.up(x), self.activation)
        return self.down(drop(inner, self.dropout if self.training else 0.0))  # type: ignore[no-any-return]


def activate(x: Tensor, activation: str) -> Tensor:
    """The pointwise function inside the MLP; GELU in its tanh form, as GPT-2 and Megatron-LM use it.

    BERT and ViT were trained with the form that uses erf: other values, the same work.
    """
    if activation in ("gelu", "geglu"):
        return F.gelu(x, approximate="tanh")
    if activation in ("silu", "swiglu"):
        return F.silu(x)
    return F.relu(x) if activation == "relu" else F.relu(x).square()


class Block(nn.Module):
    """A pre-norm Transformer block: attention and MLP, each added to the residual stream x (batch, seq, hidden).

    `attention` and `mlp` take the place of the usual ones.
    """

    def __init__(
        self,
        config: ModelConfig,
        kind: AttentionKind,
        dropout: float,
        packed: bool,
        attention: nn.Module | None = None,
        mlp: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = attention or Attention(config, kind, dropout, packed)
        self.mlp_norm = make_norm(config)
        self.mlp = mlp or MLP(config)
        self.dropout = dropout

    def forward(self, x: Tensor, positions: tuple[Tensor, ...] = (), mask: Tensor | None = None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        x = x + drop(self.attention(self.attention_norm(x), positions, mask), dropout)
        return x + drop(self.mlp(self.mlp_norm(x)), dropout)


def causal_mask(tokens: Tensor) -> Tensor:
    """(seq, seq), true above the diagonal: one per forward pass, shared by the layers."""
    seq = tokens.shape[1]
    return torch.ones((seq, seq), dtype=torch.bool, device=tokens.device).triu(1)


def initialise(module: nn.Module, config: ModelConfig) -> None:
    """GPT-2's initialisation: N(0, 0.02), projections into the residual stream smaller by sqrt(2 layers), biases 0."""
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            into_residual = name.endswith(("output.weight", "down.weight"))
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.layers) if into_residual else 0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
