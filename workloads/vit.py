"""ViT: an encoder over the patches of an image, with a class token and a classifier."""

import torch
from torch import Tensor, nn

from workloads.layers import Attention, AttentionKind, Block, drop, initialise, make_norm
from workloads.model import ModelConfig


class ViT(nn.Module):
    """images (batch, channels, size, size) -> logits (batch, classes).

    Dosovitskiy et al., arXiv 2010.11929; patches are embedded by a convolution whose stride is its width, as in
    torchvision, timm and Hugging Face.
    """

    def __init__(self, config: ModelConfig, attention: AttentionKind = "flash", dropout: float = 0.0) -> None:
        super().__init__()
        self.config, self.dropout = config, dropout
        patch = config.patch_size
        self.patches = nn.Conv2d(config.channels, config.hidden, patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.hidden))
        learned = config.pos_emb == "learned"
        self.position = nn.Parameter(torch.zeros(1, config.image_tokens, config.hidden)) if learned else None
        self.layers = nn.ModuleList(
            Block(config, attention, dropout, False, Attention(config, attention, dropout, packed=False, causal=False))
            for _ in range(config.layers)
        )
        self.norm = make_norm(config)
        self.classifier = nn.Linear(config.hidden, config.classes)
        initialise(self, config)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.class_token.expand(len(images), -1, -1).to(x.dtype), x), dim=1)
        if self.position is not None:
            x = x + self.position
        x = drop(x, self.dropout if self.training else 0.0)
        for layer in self.layers:
            x = layer(x)
        return self.classifier(self.norm(x[:, 0]))  # type: ignore[no-any-return]

    def example_inputs(self, batch: int, seq_len: int) -> tuple[Tensor, ...]:
        """Images of a batch; the sequence length is the model's own."""
        side = self.config.image_size
        return (torch.zeros((batch, self.config.channels, side, side)),)

    def example_labels(self, batch: int, seq_len: int) -> Tensor:
        """A class per image."""
        return torch.zeros(batch, dtype=torch.int64)
