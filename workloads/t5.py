"""T5: an encoder and a decoder with relative positions, whose table all layers share and train."""

import math

import torch
from torch import Tensor, nn

from workloads.layers import MLP, Attention, AttentionKind, causal_mask, drop, initialise, make_norm
from workloads.model import ModelConfig

_FARTHEST = 128  # relative_attention_max_distance of every published T5


class RelativePositions(nn.Module):
    """A trained bias per head and bucket of distance: (1, heads, seq, seq), made once per forward pass.

    Raffel et al., arXiv 1910.10683, section 2.1: half of the buckets are exact, the others logarithmic up to 128.
    """

    def __init__(self, config: ModelConfig, causal: bool) -> None:
        super().__init__()
        self.buckets, self.causal = config.relative_buckets, causal
        self.bias = nn.Embedding(config.relative_buckets, config.heads)

    def forward(self, tokens: Tensor) -> Tensor:
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        bias: Tensor = self.bias(self.bucket(steps[None, :] - steps[:, None]))
        bias = bias.permute(2, 0, 1).unsqueeze(0)
        if self.causal:
            bias = bias.masked_fill(causal_mask(tokens), torch.finfo(bias.dtype).min)
        return bias

    def bucket(self, distance: Tensor) -> Tensor:
        """The bucket of key position minus query position, as Hugging Face's T5 computes it."""
        buckets, start = self.buckets, torch.zeros_like(distance)
        if self.causal:
            distance = -torch.minimum(distance, torch.zeros_like(distance))
        else:
            buckets //= 2
            start = (distance > 0).to(torch.int64) * buckets
            distance = distance.abs()
        exact = max(buckets // 2, 1)
        share = torch.log(distance.float() / exact) / math.log(_FARTHEST / exact)
        far = torch.clamp(exact + (share * (buckets - exact)).to(torch.int64), max=buckets - 1)
        return start + torch.where(distance < exact, distance, far)


class T5Block(nn.Module):
    """Self-attention, in a decoder attention over the encoder's output, and MLP, each normed before and added."""

    def __init__(self, config: ModelConfig, kind: AttentionKind, dropout: float, decoder: bool) -> None:
        super().__init__()
        self.dropout = dropout
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, kind, dropout, packed=False, causal=decoder, scale=_scale(config))
        if decoder:
            self.cross_norm = make_norm(config)
            self.cross = Attention(config, kind, dropout, packed=False, causal=False, scale=_scale(config))
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config, dropout=dropout)

    def forward(self, x: Tensor, mask: Tensor | None, bias: Tensor | None, memory: Tensor | None = None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        x = x + drop(self.attention(self.attention_norm(x), mask=mask, bias=bias), dropout)
        if memory is not None:
            x = x + drop(self.cross(self.cross_norm(x), memory=memory), dropout)
        return x + drop(self.mlp(self.mlp_norm(x)), dropout)


class T5(nn.Module):
    """tokens (batch, seq), decoder_tokens (batch, decoder_seq) -> logits (batch, decoder_seq, vocab).

    Raffel et al., arXiv 1910.10683: no scaling of the scores, RMS norms without biases, a trained bias on the scores of
    self-attention. FlashAttention does not return the gradient of such a bias, so that self-attention is eager
    PyTorch's whatever `attention` says; attention over the encoder's output follows it. With learned positions (as
    Megatron-LM's T5) there is no bias, and the scores are scaled.
    """

    def __init__(self, config: ModelConfig, attention: AttentionKind = "flash", dropout: float = 0.0) -> None:
        super().__init__()
        self.unfused, self.dropout, self.config = attention == "unfused", dropout, config
        self.embedding = nn.Embedding(config.vocab, config.hidden)
        rows = max(config.max_positions, config.decoder_seq_len)
        self.position_embedding = nn.Embedding(rows, config.hidden) if config.pos_emb == "learned" else None
        relative = config.pos_emb == "relative"
        self.encoder_positions = RelativePositions(config, causal=False) if relative else None
        self.encoder_layers = nn.ModuleList(
            T5Block(config, attention, dropout, decoder=False) for _ in range(config.layers)
        )
        self.encoder_norm = make_norm(config)
        self.decoder_positions = RelativePositions(config, causal=True) if relative else None
        self.decoder_layers = nn.ModuleList(
            T5Block(config, attention, dropout, decoder=True) for _ in range(config.decoder_layers)
        )
        self.decoder_norm = make_norm(config)
        self.head = nn.Linear(config.hidden, config.vocab, bias=False)
        if config.tied_embeddings:
            self.head.weight = self.embedding.weight
        initialise(self, config)

    def forward(self, tokens: Tensor, decoder_tokens: Tensor) -> Tensor:
        memory = self.encode(tokens)
        dropout = self.dropout if self.training else 0.0
        x = self.embed(decoder_tokens)
        bias = self.decoder_positions(decoder_tokens) if self.decoder_positions is not None else None
        mask = causal_mask(decoder_tokens) if self.unfused and bias is None else None
        for layer in self.decoder_layers:
            x = layer(x, mask, bias, memory)
        x = drop(self.decoder_norm(x), dropout)
        if self.config.tied_embeddings:
            x = x * self.config.hidden**-0.5
        return self.head(x)  # type: ignore[no-any-return]

    def encode(self, tokens: Tensor) -> Tensor:
        """The encoder's output (batch, seq, hidden)."""
        x = self.embed(tokens)
        bias = self.encoder_positions(tokens) if self.encoder_positions is not None else None
        for layer in self.encoder_layers:
            x = layer(x, None, bias)
        return drop(self.encoder_norm(x), self.dropout if self.training else 0.0)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token (and learned position) embeddings, dropped: (batch, seq, hidden)."""
        x: Tensor = self.embedding(tokens)
        if self.position_embedding is not None:
            x = x + self.position_embedding(torch.arange(tokens.shape[1], device=tokens.device))
        return drop(x, self.dropout if self.training else 0.0)

    def example_inputs(self, batch: int, seq_len: int) -> tuple[Tensor, ...]:
        """Inputs and targets shifted by one."""
        return torch.zeros((batch, seq_len), dtype=torch.int64), self.example_labels(batch, seq_len)

    def example_labels(self, batch: int, seq_len: int) -> Tensor:
        """Targets (batch, decoder_seq)."""
        return torch.zeros((batch, self.config.decoder_seq_len or seq_len), dtype=torch.int64)


def _scale(config: ModelConfig) -> float | None:
    return 1.0 if config.pos_emb == "relative" else None
