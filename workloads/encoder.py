"""A classifier of tokens around torch.nn.TransformerEncoder, as a user's own module would be: `python:` models."""

from torch import Tensor, nn


class Encoder(nn.Module):
    """tokens (batch, seq) int64 -> logits (batch, seq, vocab), by PyTorch's own encoder layers."""

    def __init__(self, layers: int, hidden: int, heads: int, vocab: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, hidden)
        layer = nn.TransformerEncoderLayer(hidden, heads, 4 * hidden, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(hidden, vocab)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens)))  # type: ignore[no-any-return]


def build(layers: int = 2, hidden: int = 64, heads: int = 4, vocab: int = 300) -> nn.Module:
    """The module of a run file's `model: {python: "workloads.encoder:build", arguments: {layers: 12}}`."""
    return Encoder(layers, hidden, heads, vocab)
