"""Parameters and FLOP of the families in closed form, from their dimensions alone.

A matrix product costs 2 FLOP per weight and row forward and twice that backward, so 6 per weight and token; attention
scores 2 * head_dim and their product with the values 2 * value_dim per pair of positions, of which a causal mask leaves
half (Korthikanti et al., arXiv 2205.05198, appendix A, with the causal half that FlashAttention's papers count).
Everything else counts nothing (arXiv 2204.02311, appendix B, which does not halve causal attention).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from workloads.model import ModelConfig


def norm(c: ModelConfig) -> int:
    """Parameters of one norm over the residual stream."""
    return (2 if c.norm == "layernorm" else 1) * c.hidden


def attention_weights(c: ModelConfig) -> int:
    """Weights of one attention's projections."""
    if c.latent is None:
        return c.hidden * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
    mla = c.latent
    query = mla.q_lora * (c.hidden + c.heads * c.head_dim) if mla.q_lora else c.hidden * c.heads * c.head_dim
    shared = c.hidden * (mla.kv_lora + mla.qk_rope)
    return query + shared + mla.kv_lora * c.heads * (mla.qk_nope + mla.v) + c.heads * mla.v * c.hidden


def attention_rest(c: ModelConfig) -> int:
    """Biases and norms inside one attention."""
    output = c.hidden if c.biases else 0
    if c.latent is not None:
        return output + c.latent.q_lora + c.latent.kv_lora
    qkv = (c.heads + 2 * c.kv_heads) * c.head_dim if c.qkv_bias else 0
    return output + qkv + (2 * c.head_dim if c.qk_norm else 0)


def mlp_weights(c: ModelConfig, ffn: int) -> int:
    """Weights of one MLP of width `ffn`."""
    return (3 if c.gated_mlp else 2) * c.hidden * ffn


def mlp_biases(c: ModelConfig, ffn: int) -> int:
    """Biases of one MLP of width `ffn`."""
    return c.hidden + (2 if c.gated_mlp else 1) * ffn if c.biases else 0


def moe_layers(c: ModelConfig) -> int:
    """Layers whose MLP is a set of experts."""
    return c.layers - c.dense_layers if c.num_experts else 0


def expert_weights(c: ModelConfig, experts: int) -> int:
    """Weights of the router, of `experts` experts, and of the shared ones of one layer."""
    return c.hidden * c.num_experts + mlp_weights(c, c.moe_ffn * (experts + c.shared_experts))


def parameters(c: ModelConfig) -> int:
    """All trainable parameters, tied ones once; equal to the module's own count."""
    attention = attention_weights(c) + attention_rest(c)
    dense = attention + mlp_weights(c, c.ffn) + mlp_biases(c, c.ffn) + 2 * norm(c)
    positions = c.max_positions * c.hidden if c.pos_emb == "learned" else 0
    if c.family == "vit":
        return (
            _patches(c) + c.layers * dense + (c.image_tokens * c.hidden if positions else 0) + norm(c) + _classifier(c)
        )
    embedding = c.vocab * c.hidden * (1 if c.tied_embeddings else 2)
    if c.family == "bert":
        head = c.hidden * c.hidden + c.hidden + norm(c) + c.vocab
        return c.layers * dense + embedding + positions + c.token_types * c.hidden + norm(c) + head
    if c.family == "t5":
        decoder = dense + attention + norm(c)
        relative = 2 * c.relative_buckets * c.heads if c.pos_emb == "relative" else 0
        return c.layers * dense + c.decoder_layers * decoder + embedding + positions + relative + 2 * norm(c)
    sparse = moe_layers(c)
    experts = attention + 2 * norm(c)
    if sparse:
        experts += expert_weights(c, c.num_experts) + c.num_experts * (mlp_biases(c, c.moe_ffn) + int(c.biases))
        experts += mlp_biases(c, c.shared_experts * c.moe_ffn) if c.shared_experts else 0
    layers = (c.layers - sparse) * dense + sparse * experts
    return layers + embedding + positions + (2 if c.embedding_norm else 1) * norm(c)


def matmul_parameters(c: ModelConfig) -> int:
    """Weights that a token is multiplied by: the layers', of experts only those that it visits, and the output head's.

    Of a t5 those of encoder and decoder, of a bert with the head's transform.
    """
    attention = attention_weights(c)
    sparse = moe_layers(c)
    layers = c.layers * attention + (c.layers - sparse) * mlp_weights(c, c.ffn)
    layers += sparse * expert_weights(c, c.experts_per_token)
    if c.family == "t5":
        layers += c.decoder_layers * (2 * attention + mlp_weights(c, c.ffn))
    if c.family == "vit":
        return layers
    return layers + c.vocab * c.hidden + (c.hidden * c.hidden if c.family == "bert" else 0)


def model_flops(c: ModelConfig, seq_len: int) -> float:
    """FLOP of forward and backward of one sequence of `seq_len` tokens (an image), recomputation not counted."""
    pair = 6.0 * c.heads * (c.head_dim + c.value_dim)  # per pair of positions that see each other
    head = c.vocab * c.hidden
    if c.family == "bert":
        head += c.hidden * c.hidden
        layers = matmul_parameters(c) - head
        masked = c.masked_positions or seq_len
        return 6.0 * (layers * seq_len + head * masked) + pair * c.layers * seq_len**2
    if c.family == "vit":
        tokens = c.image_tokens
        # the image needs no gradient: two products instead of three
        patches = 4.0 * (tokens - 1) * c.channels * c.patch_size**2 * c.hidden + 6.0 * c.hidden * c.classes
        return 6.0 * matmul_parameters(c) * tokens + patches + pair * c.layers * tokens**2
    if c.family == "t5":
        return _encoder_decoder_flops(c, seq_len, pair)
    return 6.0 * matmul_parameters(c) * seq_len + 0.5 * pair * c.layers * seq_len**2


def _encoder_decoder_flops(c: ModelConfig, seq_len: int, pair: float) -> float:
    target = c.decoder_seq_len or seq_len
    block = attention_weights(c) + mlp_weights(c, c.ffn)
    keys = 2 * c.hidden * c.kv_heads * c.head_dim  # cross attention reads the encoder's positions
    encoder = 6.0 * c.layers * block * seq_len + pair * c.layers * seq_len**2
    weights = (block + attention_weights(c) - keys) * target + keys * seq_len
    pairs = 0.5 * target**2 + seq_len * target
    return encoder + 6.0 * (c.decoder_layers * weights + c.vocab * c.hidden * target) + pair * c.decoder_layers * pairs


def _patches(c: ModelConfig) -> int:
    """The patch embedding, its bias, and the class token."""
    return c.channels * c.patch_size**2 * c.hidden + 2 * c.hidden


def _classifier(c: ModelConfig) -> int:
    return c.hidden * c.classes + c.classes
