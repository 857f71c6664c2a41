"""A Transformer's dimensions: checked, completed with the defaults of its family, and counted in closed form.

Nothing here needs torch; `workloads.build` turns a configuration into a module.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from hwmodels.units import InputError
from workloads import checks, counts
from workloads.checks import GATED_ACTIVATIONS, Latent


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The dimensions of a Transformer, named as in the run file and in training_runs.csv.

    Every field has its final value; `from_dimensions` fills in what a user leaves out. Those with a default here belong
    to some families only.
    """

    family: str  # gpt: one packed qkv projection; the others: separate q, k and v
    layers: int  # of t5: in the encoder
    hidden: int
    heads: int
    kv_heads: int  # heads (mha), fewer (gqa), or 1 (mqa)
    head_dim: int  # of queries and keys; with mla also that of what attention sees, qk_nope + qk_rope
    ffn: int  # width of the MLP's hidden layer; a gated MLP has two projections of this width
    vocab: int  # 0 for vit
    activation: str  # gelu | silu | relu | squared-relu, or gated: swiglu | geglu
    pos_emb: str  # learned | rope | alibi | relative | none
    norm: str  # layernorm (weight and bias) | rmsnorm
    biases: bool  # of the linear layers, except qkv and the output head (which never has one)
    qkv_bias: bool
    tied_embeddings: bool
    embedding_norm: bool  # a norm right after the embedding, as BLOOM has
    max_positions: int  # rows of the learned position table; a longer run enlarges it
    rope_theta: float
    norm_eps: float
    qk_norm: bool = False  # an RMS norm over each head's query and key (Qwen3)
    mla: str | None = None  # widths of latent attention, see checks.latent
    num_experts: int = 0  # routed, per layer
    experts_per_token: int = 0
    moe_ffn: int = 0  # width of one expert's MLP
    shared_experts: int = 0  # as one MLP of shared_experts * moe_ffn
    capacity_factor: float = 0.0  # rows of an expert's buffer over those of a balanced load; 0: no buffers, no drops
    dense_layers: int = 0  # leading layers with an MLP of width ffn instead of experts
    token_types: int = 0  # rows of bert's segment embedding
    masked_positions: int = 0  # per sequence, which bert's head sees; 0: all; from workload.masked_fraction
    decoder_layers: int = 0
    decoder_seq_len: int = 0  # 0: as long as the encoder's; from workload.decoder_seq_len
    relative_buckets: int = 0  # rows of t5's table of relative positions
    image_size: int = 0  # pixels per side
    patch_size: int = 0
    channels: int = 0
    classes: int = 0

    @property
    def latent(self) -> Latent | None:
        """The widths of latent attention; None without it."""
        return checks.latent(self.mla) if self.mla else None

    @property
    def value_dim(self) -> int:
        """Width of a head's values: head_dim, except in latent attention."""
        return self.latent.v if self.latent else self.head_dim

    @property
    def image_tokens(self) -> int:
        """Patches of an image and the class token; 0 unless family is vit."""
        return (self.image_size // self.patch_size) ** 2 + 1 if self.patch_size else 0

    @property
    def attn_type(self) -> str:
        """mha, gqa, mqa or mla, as the column of training_runs.csv says it."""
        if self.mla:
            return "mla"
        if self.kv_heads == self.heads:
            return "mha"
        return "mqa" if self.kv_heads == 1 else "gqa"

    @property
    def gated_mlp(self) -> bool:
        """Whether the MLP multiplies two projections (SwiGLU, GeGLU)."""
        return self.activation in GATED_ACTIVATIONS

    def for_sequence(self, seq_len: int) -> "ModelConfig":
        """The same model with position tables for `seq_len` tokens.

        A learned table only grows, because its rows are parameters; rotary tables are exactly as long as the run, as
        torchtitan makes them.
        """
        if self.family == "vit":
            return self
        learned = self.pos_emb == "learned"
        return replace(self, max_positions=max(self.max_positions, seq_len) if learned else seq_len)

    def for_workload(
        self, seq_len: int, masked_fraction: float | None = None, decoder_seq_len: int | None = None
    ) -> "ModelConfig":
        """The same model as a run uses it: how many positions bert's head sees (default: 15 %, as in arXiv 1810.04805),
        how long t5's targets are (default: as its inputs).
        """
        if self.family == "bert":
            share = 0.15 if masked_fraction is None else masked_fraction
            masked = max(1, round(share * seq_len))
            return replace(self, masked_positions=0 if masked >= seq_len else masked)
        if self.family == "t5":
            return replace(self, decoder_seq_len=0 if decoder_seq_len in (None, seq_len) else decoder_seq_len)
        return self

    def stated(self) -> dict[str, Any]:
        """The dimensions as a run file states them: without those that the family does not have."""
        found = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        if self.family == "vit":
            found.pop("vocab")
        return {name: value for name, (value, default) in found.items() if value != default}

    def layer_matmul_parameters(self) -> int:
        """Weights of one layer without experts that are used in matrix products."""
        return counts.attention_weights(self) + counts.mlp_weights(self, self.ffn)

    def parameters(self) -> int:
        """All trainable parameters, tied ones once; equal to the module's own count."""
        return counts.parameters(self)

    def matmul_parameters(self) -> int:
        """Weights that a token is multiplied by: of experts only those that it visits; the output head's, tied or
        not.
        """
        return counts.matmul_parameters(self)

    def model_flops_per_token(self, seq_len: int) -> float:
        """FLOP of forward and backward per token of sequences of `seq_len` tokens, recomputation not counted.

        For gpt and llama 6 * matmul_parameters + 6 * layers * seq_len * heads * head_dim; see `workloads.counts`. Of
        t5, the decoder's work counts towards the encoder's tokens.
        """
        return counts.model_flops(self, seq_len) / seq_len


@dataclass(frozen=True, slots=True)
class HuggingFaceModel:
    """A class of the transformers library and the entries of its configuration; no weights are fetched."""

    class_name: str
    config: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PythonModel:
    """A user's own module: `package.module:build`, called with `arguments`; imported as if from `directory`."""

    target: str
    arguments: Mapping[str, object] = field(default_factory=dict)
    directory: Path | None = None  # of the run file; the current one when None


Model = ModelConfig | HuggingFaceModel | PythonModel


_REQUIRED = ("family", "layers", "hidden", "heads", "vocab")
_OF_A_RUN = ("masked_positions", "decoder_seq_len")


def from_dimensions(values: Mapping[str, object], where: str = "model") -> ModelConfig:
    """The configuration that `values` states, completed with its family's defaults.

    gpt: LayerNorm, biases, learned positions, tied embeddings, GELU, ffn = 4 * hidden. llama and moe: RMSNorm, no
    biases, rotary positions, untied embeddings, SwiGLU, ffn = 8/3 * hidden rounded up to 256. bert and vit: as gpt,
    with two token types, and 1000 classes of images of 224 pixels in patches of 16. t5: RMSNorm, no biases, relative
    positions in 32 buckets, tied embeddings, ReLU. All: head_dim = hidden / heads, kv_heads = heads, 2048 positions.

    Raises InputError with one sentence that names `where`, the key, the value and what is allowed.
    """
    known = {*ModelConfig.__dataclass_fields__, "gated_mlp", "attn_type"} - {*_OF_A_RUN}
    if "dropout" in values:
        raise InputError(f"{where}.dropout: dropout belongs to the training recipe; write it as training.dropout")
    if unknown := sorted(set(values) - known):
        raise InputError(f"{where}.{unknown[0]}: no such dimension; allowed: {', '.join(sorted(known))}")
    required = _REQUIRED[:-1] if values.get("family") == "vit" else _REQUIRED
    if missing := [key for key in required if values.get(key) is None]:
        raise InputError(f"{where}.{missing[0]}: missing; a model needs {', '.join(required)}, or a name")
    checks.check_family(values, where)
    given = {key: checks.checked(key, value, where) for key, value in values.items() if value is not None}
    checks.check_words(given, where)
    family = given["family"]
    if family == "moe":
        checks.check_experts(given, where)
    if family == "vit":
        checks.check_image(given, where)
    defaults = _defaults(given, where)
    stated = {key: value for key, value in given.items() if key not in ("gated_mlp", "attn_type", "kv_heads")}
    if "mla" in stated:  # the published rows print hidden / heads as head_dim
        stated.pop("head_dim", None)
    config = ModelConfig(**(defaults | stated | {"activation": defaults["activation"]}))
    turned = config.latent.qk_rope if config.latent else config.head_dim
    if config.pos_emb == "rope" and turned % 2:
        raise InputError(f"{where}.head_dim: {turned} is odd; rotary positions need an even head_dim")
    return config


def _defaults(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a family's models have unless they state it."""
    family, hidden, heads = given["family"], given["hidden"], given["heads"]
    modern = family in ("llama", "moe")
    if "head_dim" not in given and "mla" not in given and hidden % heads:
        raise InputError(
            f"{where}.heads: {heads} does not divide hidden {hidden}; allowed: a divisor, or state head_dim"
        )
    latent = checks.latent(given["mla"], where) if "mla" in given else None
    activation = checks.activation(given, modern, "relu" if family == "t5" else "gelu", where)
    ffn = -(-8 * hidden // (3 * 256)) * 256 if modern and activation in GATED_ACTIVATIONS else 4 * hidden
    biases = not modern and family != "t5"
    return {
        "head_dim": latent.qk_nope + latent.qk_rope if latent else hidden // heads,
        "kv_heads": checks.kv_heads(given, where),
        "vocab": 0,
        "ffn": ffn,
        "activation": activation,
        "pos_emb": {"t5": "relative"}.get(family, "rope" if modern else "learned"),
        "norm": "rmsnorm" if modern or family == "t5" else "layernorm",
        "biases": biases,
        "qkv_bias": given.get("biases", biases),
        "tied_embeddings": not modern,
        "embedding_norm": False,
        "max_positions": 2048,
        "rope_theta": 10_000.0,
        "norm_eps": 1e-5,
        **_family_defaults(family, given, given.get("ffn", ffn)),
    }


def _family_defaults(family: str, given: Mapping[str, Any], ffn: int) -> dict[str, Any]:
    if family == "bert":
        return {"token_types": 2, "norm_eps": 1e-12}
    if family == "t5":
        return {"decoder_layers": given["layers"], "relative_buckets": 32, "norm_eps": 1e-6}
    if family == "vit":
        return {"image_size": 224, "patch_size": 16, "channels": 3, "classes": 1000, "tied_embeddings": False}
    return {"moe_ffn": ffn} if family == "moe" else {}
