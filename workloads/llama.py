"""Llama: RMSNorm, rotary positions, separate q, k and v projections, SwiGLU, no biases (by default)."""

from torch import Tensor, nn

from workloads.layers import AttentionKind, Block, Positions, causal_mask, initialise, make_norm
from workloads.model import ModelConfig


class Llama(nn.Module):
    """tokens (batch, seq) int64 -> logits (batch, seq, vocab).

    Touvron et al., arXiv 2302.13971 and 2307.09288; laid out as torchtitan's, with Hugging Face's rotate-half rotary
    form.
    """

    def __init__(self, config: ModelConfig, attention: AttentionKind = "flash", dropout: float = 0.0) -> None:
        super().__init__()
        self.unfused = attention == "unfused"
        self.embedding = nn.Embedding(config.vocab, config.hidden)
        self.embedding_norm = make_norm(config) if config.embedding_norm else nn.Identity()
        self.positions = Positions(config)
        self.layers = nn.ModuleList(Block(config, attention, dropout, packed=False) for _ in range(config.layers))
        self.norm = make_norm(config)
        self.head = nn.Linear(config.hidden, config.vocab, bias=False)
        if config.tied_embeddings:
            self.head.weight = self.embedding.weight
        initialise(self, config)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding_norm(self.embedding(tokens))
        positions = self.positions(tokens.shape[1])
        mask = causal_mask(tokens) if self.unfused else None
        for layer in self.layers:
            x = layer(x, positions, mask)
        return self.head(self.norm(x))  # type: ignore[no-any-return]
