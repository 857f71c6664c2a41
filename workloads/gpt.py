"""GPT: packed qkv, dropout on embedding and residual branches; GPT-2, Megatron, MPT, BLOOM and Nemotron by options."""

import torch
from torch import Tensor, nn

from workloads.layers import AttentionKind, Block, Positions, causal_mask, drop, initialise, make_norm
from workloads.model import ModelConfig


class GPT(nn.Module):
    """tokens (batch, seq) int64 -> logits (batch, seq, vocab).

    Radford et al. 2019 (GPT-2); the positions, norm, activation and head counts are the configuration's.
    """

    def __init__(self, config: ModelConfig, attention: AttentionKind = "flash", dropout: float = 0.0) -> None:
        super().__init__()
        self.unfused, self.dropout = attention == "unfused", dropout
        self.embedding = nn.Embedding(config.vocab, config.hidden)
        learned = config.pos_emb == "learned"
        self.position_embedding = nn.Embedding(config.max_positions, config.hidden) if learned else None
        self.embedding_norm = make_norm(config) if config.embedding_norm else None
        self.positions = Positions(config)
        self.layers = nn.ModuleList(Block(config, attention, dropout, packed=True) for _ in range(config.layers))
        self.norm = make_norm(config)
        self.head = nn.Linear(config.hidden, config.vocab, bias=False)
        if config.tied_embeddings:
            self.head.weight = self.embedding.weight
        initialise(self, config)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        positions = self.positions(tokens.shape[1])
        mask = causal_mask(tokens) if self.unfused else None
        for layer in self.layers:
            x = layer(x, positions, mask)
        return self.head(self.norm(x))  # type: ignore[no-any-return]

    def embed(self, tokens: Tensor) -> Tensor:
        """Token and position embeddings, summed, normed and dropped: (batch, seq, hidden)."""
        x: Tensor = self.embedding(tokens)
        if self.position_embedding is not None:
            x = x + self.position_embedding(torch.arange(tokens.shape[1], device=tokens.device))
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        return drop(x, self.dropout if self.training else 0.0)
