"""BERT: an encoder with norms after the residual sums, and a head on the positions that are masked."""

import torch
from torch import Tensor, nn

from workloads.layers import MLP, Attention, AttentionKind, Positions, activate, drop, initialise, make_norm
from workloads.model import ModelConfig


class PostNormBlock(nn.Module):
    """norm(x + attention(x)), then norm(x + mlp(x)), over x (batch, seq, hidden)."""

    def __init__(self, config: ModelConfig, kind: AttentionKind, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(config, kind, dropout, packed=False, causal=False)
        self.attention_norm = make_norm(config)
        self.mlp = MLP(config)
        self.mlp_norm = make_norm(config)
        self.dropout = dropout

    def forward(self, x: Tensor, positions: tuple[Tensor, ...]) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        x = self.attention_norm(x + drop(self.attention(x, positions), dropout))
        return self.mlp_norm(x + drop(self.mlp(x), dropout))  # type: ignore[no-any-return]


class MaskedHead(nn.Module):
    """x (rows, hidden) -> logits (rows, vocab): dense, activation, norm, and the embedding as decoder with a bias."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.transform = nn.Linear(config.hidden, config.hidden)
        self.norm = make_norm(config)
        self.head = nn.Linear(config.hidden, config.vocab)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(activate(self.transform(x), self.activation)))  # type: ignore[no-any-return]


class Bert(nn.Module):
    """tokens, segments (batch, seq), masked positions (rows,) -> logits (rows, vocab).

    Devlin et al., arXiv 1810.04805, with the masked-word task only: no pooler, no next-sentence head. `masked` numbers
    the positions of all sequences one after the other; None is every position. The head gathers them first, as NVIDIA's
    DeepLearningExamples and the original code (gather_indexes in run_pretraining.py) do.
    """

    def __init__(self, config: ModelConfig, attention: AttentionKind = "flash", dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout, self.masked_positions = dropout, config.masked_positions
        self.embedding = nn.Embedding(config.vocab, config.hidden)
        learned = config.pos_emb == "learned"
        self.position_embedding = nn.Embedding(config.max_positions, config.hidden) if learned else None
        self.segment_embedding = nn.Embedding(config.token_types, config.hidden) if config.token_types else None
        self.embedding_norm = make_norm(config)
        self.positions = Positions(config)
        self.layers = nn.ModuleList(PostNormBlock(config, attention, dropout) for _ in range(config.layers))
        self.masked_head = MaskedHead(config)
        if config.tied_embeddings:
            self.masked_head.head.weight = self.embedding.weight
        initialise(self, config)

    def forward(self, tokens: Tensor, segments: Tensor, masked: Tensor | None = None) -> Tensor:
        x = self.embed(tokens, segments)
        positions = self.positions(tokens.shape[1])
        for layer in self.layers:
            x = layer(x, positions)
        rows = x.flatten(0, 1)
        return self.masked_head(rows if masked is None else rows.index_select(0, masked))  # type: ignore[no-any-return]

    def embed(self, tokens: Tensor, segments: Tensor) -> Tensor:
        """Word, position and segment embeddings, summed, normed and dropped: (batch, seq, hidden)."""
        x: Tensor = self.embedding(tokens)
        if self.position_embedding is not None:
            x = x + self.position_embedding(torch.arange(tokens.shape[1], device=tokens.device))
        if self.segment_embedding is not None:
            x = x + self.segment_embedding(segments)
        return drop(self.embedding_norm(x), self.dropout if self.training else 0.0)

    def example_inputs(self, batch: int, seq_len: int) -> tuple[Tensor, ...]:
        """Inputs of a batch: the masked positions are as many in every sequence."""
        tokens, segments = (torch.zeros((batch, seq_len), dtype=torch.int64) for _ in range(2))
        if not self.masked_positions:
            return tokens, segments
        return tokens, segments, torch.zeros(batch * self.masked_positions, dtype=torch.int64)

    def example_labels(self, batch: int, seq_len: int) -> Tensor:
        """The words at the masked positions."""
        return torch.zeros(batch * (self.masked_positions or seq_len), dtype=torch.int64)
