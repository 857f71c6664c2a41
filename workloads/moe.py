"""Mixtures of experts: llama-like blocks whose MLP is routed experts (and shared ones), with latent attention or not.

Routing is assumed to be balanced: every expert gets tokens * experts_per_token / num_experts rows, none is dropped.
With a capacity factor every expert computes that many times as many, those without a token too.
What changes the values but not the work is left out: groups of experts, biases that balance the load, auxiliary losses.
"""

import torch
from torch import Tensor, nn

from workloads import operators
from workloads.layers import (
    MLP,
    Attention,
    AttentionKind,
    Block,
    Positions,
    RMSNorm,
    activate,
    causal_mask,
    drop,
    initialise,
    make_norm,
    rotate,
    unfused_attention,
)
from workloads.model import ModelConfig


def route(experts: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """(rows in the order of their experts, the token of each, rows per expert) of `experts` (tokens, choices).

    A row is a token at one of its experts; rows of one expert follow each other.
    """
    with torch.no_grad():
        ordered, rows = torch.sort(experts.flatten(), stable=True)
        counts = torch.zeros(number, dtype=torch.int64, device=experts.device)
        counts = counts.scatter_add(0, ordered, torch.ones_like(ordered))
        return rows, rows // experts.shape[1], counts


def grouped(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """`operators.grouped_mm` in autocast's format where that is on, as torch.nn.functional.linear runs."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x, weight = (y.to(torch.get_autocast_dtype(kind)) for y in (x, weight))
    product: Tensor = operators.grouped_mm(x, weight, counts)
    return product


class Experts(nn.Module):
    """The MLPs of all experts: rows x (rows, hidden) sorted by expert -> (rows, hidden).

    Weights are (experts, in, out), as torch._grouped_mm takes them; tensor parallelism cuts them as those of an `MLP`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, hidden, ffn = config.num_experts, config.hidden, config.moe_ffn
        self.activation = config.activation
        self.up = nn.Parameter(torch.empty(experts, hidden, ffn))
        self.gate = nn.Parameter(torch.empty(experts, hidden, ffn)) if config.gated_mlp else None
        self.down = nn.Parameter(torch.empty(experts, ffn, hidden))
        self.up_bias = nn.Parameter(torch.zeros(experts, ffn)) if config.biases else None
        self.gate_bias = nn.Parameter(torch.zeros(experts, ffn)) if config.biases and config.gated_mlp else None
        self.down_bias = nn.Parameter(torch.zeros(experts, hidden)) if config.biases else None

    def forward(self, x: Tensor, counts: Tensor, expert: Tensor) -> Tensor:
        """`expert` (rows,) is the expert of each row, for its bias."""
        inner = _biased(grouped(x, self.up, counts), self.up_bias, expert)
        if self.gate is not None:
            gate = _biased(grouped(x, self.gate, counts), self.gate_bias, expert)
            inner = activate(gate, self.activation) * inner
        else:
            inner = activate(inner, self.activation)
        return _biased(grouped(inner, self.down, counts), self.down_bias, expert)


class SparseMLP(nn.Module):
    """x (batch, seq, hidden): each token's best experts_per_token experts, weighted, and the shared experts.

    Shazeer et al., arXiv 1701.06538; DeepSeekMoE, arXiv 2401.06066. The softmax is over all experts in fp32, the
    weights of those chosen are normalised (Mixtral, Qwen3, DeepSeek-V3).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.number, self.chosen = config.num_experts, config.experts_per_token
        self.padded = int(config.experts_per_token * config.capacity_factor)  # rows per token, 0: as many as it has
        self.router = nn.Linear(config.hidden, config.num_experts, bias=config.biases)
        self.experts = Experts(config)
        shared = config.shared_experts * config.moe_ffn
        self.shared = MLP(config, shared) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        scores = torch.softmax(self.router(tokens), dim=-1, dtype=torch.float32)
        weights, experts = torch.topk(scores, self.chosen, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        rows, token_of_row, counts = route(experts, self.number)
        permuted, expert = tokens.index_select(0, token_of_row), experts.flatten().index_select(0, rows)
        out = self.in_buffers(permuted, counts, expert) if self.padded else self.experts(permuted, counts, expert)
        out = out * weights.flatten().index_select(0, rows).unsqueeze(-1).to(out.dtype)
        total = torch.zeros_like(tokens, dtype=out.dtype).index_add(0, token_of_row, out)
        if self.shared is not None:
            total = total + self.shared(tokens)
        return total.view(x.shape)

    def in_buffers(self, x: Tensor, counts: Tensor, expert: Tensor) -> Tensor:
        """The experts on buffers of equal size: rows of x (sorted by expert) beyond an expert's capacity give zeros.

        GShard, arXiv 2006.16668, section 2.2; Megatron-LM's --moe-expert-capacity-factor with padding.
        """
        size = x.shape[0] // self.chosen * self.padded
        capacity = size // self.number
        with torch.no_grad():
            rank = torch.arange(len(expert), device=x.device) - (counts.cumsum(0) - counts).index_select(0, expert)
            kept = (rank < capacity).unsqueeze(-1)
            slot = torch.clamp(expert * capacity + torch.clamp(rank, max=capacity - 1), max=size - 1)
            expert_of_slot = torch.arange(size, device=x.device) // max(capacity, 1)
            full = torch.full_like(counts, capacity)
        buffers = torch.zeros((size, x.shape[1]), dtype=x.dtype, device=x.device).index_add(0, slot, x * kept)
        out: Tensor = self.experts(buffers, full, torch.clamp(expert_of_slot, max=self.number - 1))
        return out.index_select(0, slot) * kept


class LatentAttention(nn.Module):
    """Multi-head latent attention over x (batch, seq, hidden): DeepSeek-V2, arXiv 2405.04434, section 2.1.

    Keys and values pass through a low rank; a rotated part of the key is shared by the heads. In training they are
    expanded to all heads, as Hugging Face, Megatron-LM and torchtitan do.
    """

    def __init__(self, config: ModelConfig, kind: AttentionKind, dropout: float) -> None:
        super().__init__()
        mla = config.latent
        assert mla is not None
        self.kind, self.dropout, self.heads, self.widths = kind, dropout, config.heads, mla
        self.rotary = config.pos_emb == "rope"
        self.scale = config.head_dim**-0.5
        if mla.q_lora:
            self.query_down = nn.Linear(config.hidden, mla.q_lora, bias=False)
            self.query_norm = RMSNorm(mla.q_lora, config.norm_eps)
        self.query = nn.Linear(mla.q_lora or config.hidden, config.heads * config.head_dim, bias=False)
        self.kv_down = nn.Linear(config.hidden, mla.kv_lora + mla.qk_rope, bias=False)
        self.kv_norm = RMSNorm(mla.kv_lora, config.norm_eps)
        self.key_value = nn.Linear(mla.kv_lora, config.heads * (mla.qk_nope + mla.v), bias=False)
        self.output = nn.Linear(config.heads * mla.v, config.hidden, bias=config.biases)

    def project(self, x: Tensor, positions: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """q and k (batch, heads, seq, qk_nope + qk_rope), v (batch, heads, seq, v)."""
        mla = self.widths
        compressed = self.query_norm(self.query_down(x)) if mla.q_lora else x
        q = self.query(compressed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q, q_turned = q.split((mla.qk_nope, mla.qk_rope), dim=-1)
        latent, k_turned = self.kv_down(x).split((mla.kv_lora, mla.qk_rope), dim=-1)
        kv = self.key_value(self.kv_norm(latent)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = kv.split((mla.qk_nope, mla.v), dim=-1)
        k_turned = k_turned.unsqueeze(1)
        if self.rotary:
            q_turned, k_turned = rotate(q_turned, *positions), rotate(k_turned, *positions)
        k_turned = k_turned.expand(-1, self.heads, -1, -1)
        return torch.cat((q, q_turned), dim=-1), torch.cat((k, k_turned), dim=-1), v

    def forward(self, x: Tensor, positions: tuple[Tensor, ...] = (), mask: Tensor | None = None) -> Tensor:
        q, k, v = self.project(x, positions)
        dropout = self.dropout if self.training else 0.0
        if self.kind == "flash":
            out = operators.attention(q, k, v, True, dropout, self.scale)[0]
        else:
            out = unfused_attention(q, k, v, mask, dropout, self.scale)
        return self.output(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class MoE(nn.Module):
    """tokens (batch, seq) int64 -> logits (batch, seq, vocab); the first `dense_layers` layers have no experts.

    Mixtral (arXiv 2401.04088), DeepSeek-V2 and V3 (arXiv 2412.19437), Qwen3 (arXiv 2505.09388) by options.
    """

    def __init__(self, config: ModelConfig, attention: AttentionKind = "flash", dropout: float = 0.0) -> None:
        super().__init__()
        self.unfused, self.dropout = attention == "unfused", dropout
        self.embedding = nn.Embedding(config.vocab, config.hidden)
        learned = config.pos_emb == "learned"
        self.position_embedding = nn.Embedding(config.max_positions, config.hidden) if learned else None
        self.positions = Positions(config)
        self.layers = nn.ModuleList(_block(config, i, attention, dropout) for i in range(config.layers))
        self.norm = make_norm(config)
        self.head = nn.Linear(config.hidden, config.vocab, bias=False)
        if config.tied_embeddings:
            self.head.weight = self.embedding.weight
        initialise(self, config)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if self.position_embedding is not None:
            x = x + self.position_embedding(torch.arange(tokens.shape[1], device=tokens.device))
        x = drop(x, self.dropout if self.training else 0.0)
        positions = self.positions(tokens.shape[1])
        mask = causal_mask(tokens) if self.unfused else None
        for layer in self.layers:
            x = layer(x, positions, mask)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def _block(config: ModelConfig, layer: int, kind: AttentionKind, dropout: float) -> Block:
    attention: nn.Module = (
        LatentAttention(config, kind, dropout) if config.latent else Attention(config, kind, dropout, packed=False)
    )
    mlp = MLP(config) if layer < config.dense_layers else SparseMLP(config)
    return Block(config, kind, dropout, False, attention, mlp)


def _biased(x: Tensor, bias: Tensor | None, expert: Tensor) -> Tensor:
    return x if bias is None else x + bias.index_select(0, expert).to(x.dtype)
