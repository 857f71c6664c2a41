"""A Transformer's dimensions: checked, completed with the defaults of its family, and counted in closed form.

Nothing here needs torch; `workloads.build` turns a configuration into a module.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hwmodels.units import InputError

FAMILIES = ("gpt", "llama")
LATER_FAMILIES = ("bert", "t5", "vit", "moe")
POSITIONS = {"gpt": ("learned", "rope", "alibi", "none"), "llama": ("rope", "alibi", "none")}
NORMS = ("layernorm", "rmsnorm")
GATED_ACTIVATIONS = ("swiglu", "geglu")
ACTIVATIONS = ("gelu", "silu", "relu", "squared-relu", *GATED_ACTIVATIONS)
ATTENTION_TYPES = ("mha", "gqa", "mqa")

# Ten times beyond the largest models anyone has published: a larger number is a slip of the keyboard.
_LARGEST = {
    "layers": 10_000,
    "hidden": 1_000_000,
    "heads": 65_536,
    "kv_heads": 65_536,
    "head_dim": 65_536,
    "ffn": 16_777_216,
    "vocab": 100_000_000,
    "max_positions": 100_000_000,
}
_REQUIRED = ("family", "layers", "hidden", "heads", "vocab")
_NOT_MODELLED = ("mla", "dense_layers", "num_experts", "experts_per_token", "moe_ffn", "shared_experts")
_BOOLEANS = ("gated_mlp", "biases", "qkv_bias", "tied_embeddings", "embedding_norm")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The dimensions of a decoder-only Transformer, named as in the run file and in training_runs.csv.

    Every field has its final value; `from_dimensions` fills in what a user leaves out.
    """

    family: str  # gpt: one packed qkv projection; llama: separate q, k and v
    layers: int
    hidden: int
    heads: int
    kv_heads: int  # heads (mha), fewer (gqa), or 1 (mqa)
    head_dim: int
    ffn: int  # width of the MLP's hidden layer; a gated MLP has two projections of this width
    vocab: int
    activation: str  # gelu | silu | relu | squared-relu, or gated: swiglu | geglu
    pos_emb: str  # learned | rope | alibi | none
    norm: str  # layernorm (weight and bias) | rmsnorm
    biases: bool  # of the linear layers, except qkv and the output head (which never has one)
    qkv_bias: bool
    tied_embeddings: bool
    embedding_norm: bool  # a norm right after the embedding, as BLOOM has
    max_positions: int  # rows of the learned position table; a longer run enlarges it
    rope_theta: float
    norm_eps: float

    @property
    def attn_type(self) -> str:
        """mha, gqa or mqa, as the column of training_runs.csv says it."""
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
        learned = self.pos_emb == "learned"
        return replace(self, max_positions=max(self.max_positions, seq_len) if learned else seq_len)

    def layer_matmul_parameters(self) -> int:
        """Weights of one layer that are used in matrix products: q, k, v, output, and the MLP's two or three."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + (3 if self.gated_mlp else 2) * self.hidden * self.ffn

    def parameters(self) -> int:
        """All trainable parameters, tied ones once; equal to the module's own count."""
        norm = (2 if self.norm == "layernorm" else 1) * self.hidden
        qkv_bias = (self.heads + 2 * self.kv_heads) * self.head_dim if self.qkv_bias else 0
        linear_bias = 2 * self.hidden + (2 if self.gated_mlp else 1) * self.ffn if self.biases else 0
        layer = self.layer_matmul_parameters() + qkv_bias + linear_bias + 2 * norm
        embedding = self.vocab * self.hidden * (1 if self.tied_embeddings else 2)
        positions = self.max_positions * self.hidden if self.pos_emb == "learned" else 0
        return self.layers * layer + embedding + positions + (2 if self.embedding_norm else 1) * norm

    def matmul_parameters(self) -> int:
        """Weights that every token is multiplied by: the layers' and the output head's, tied or not."""
        return self.layers * self.layer_matmul_parameters() + self.vocab * self.hidden

    def model_flops_per_token(self, seq_len: int) -> float:
        """FLOP of forward and backward per token of a causal sequence of `seq_len` tokens, recomputation not counted.

        6 * matmul_parameters + 6 * layers * seq_len * heads * head_dim: a multiply and an add per weight, forward and
        twice backward; QK^T and PV are 4 * seq_len * heads * head_dim forward, of which a causal mask leaves half
        (Korthikanti et al., arXiv 2205.05198, appendix A, with the causal half that FlashAttention's papers count).
        """
        return 6.0 * self.matmul_parameters() + 6.0 * self.layers * seq_len * self.heads * self.head_dim


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


def from_dimensions(values: Mapping[str, object], where: str = "model") -> ModelConfig:
    """The configuration that `values` states, completed with its family's defaults.

    gpt: LayerNorm, biases, learned positions, tied embeddings, GELU, ffn = 4 * hidden. llama: RMSNorm, no biases,
    rotary positions, untied embeddings, SwiGLU, ffn = 8/3 * hidden rounded up to 256. Both: head_dim = hidden / heads,
    kv_heads = heads, 2048 positions.

    Raises InputError with one sentence that names `where`, the key, the value and what is allowed.
    """
    known = {*ModelConfig.__dataclass_fields__, "gated_mlp", "attn_type"}
    _refuse_what_is_not_modelled(values, where)
    if unknown := sorted(set(values) - known):
        raise InputError(f"{where}.{unknown[0]}: no such dimension; allowed: {', '.join(sorted(known))}")
    if missing := [key for key in _REQUIRED if values.get(key) is None]:
        raise InputError(f"{where}.{missing[0]}: missing; a model needs {', '.join(_REQUIRED)}, or a name")
    given = {key: _checked(key, value, where) for key, value in values.items() if value is not None}
    _check_words(given, where)
    llama = given["family"] == "llama"
    hidden, heads = given["hidden"], given["heads"]
    if "head_dim" not in given and hidden % heads:
        raise InputError(
            f"{where}.heads: {heads} does not divide hidden {hidden}; allowed: a divisor, or state head_dim"
        )
    activation = _activation(given, where)
    defaults: dict[str, Any] = {
        "head_dim": hidden // heads,
        "kv_heads": _kv_heads(given, where),
        "ffn": -(-8 * hidden // (3 * 256)) * 256 if llama and activation in GATED_ACTIVATIONS else 4 * hidden,
        "pos_emb": "rope" if llama else "learned",
        "norm": "rmsnorm" if llama else "layernorm",
        "biases": not llama,
        "qkv_bias": given.get("biases", not llama),
        "tied_embeddings": not llama,
        "embedding_norm": False,
        "max_positions": 2048,
        "rope_theta": 10_000.0,
        "norm_eps": 1e-5,
    }
    stated = {key: value for key, value in given.items() if key not in ("gated_mlp", "attn_type", "kv_heads")}
    config = ModelConfig(**(defaults | stated | {"activation": activation}))
    if config.pos_emb == "rope" and config.head_dim % 2:
        raise InputError(f"{where}.head_dim: {config.head_dim} is odd; rotary positions need an even head_dim")
    return config


def _refuse_what_is_not_modelled(values: Mapping[str, object], where: str) -> None:
    family = values.get("family")
    if isinstance(family, str) and family in LATER_FAMILIES:
        raise InputError(f"{where}.family: family {family!r} is not modelled yet; allowed: {', '.join(FAMILIES)}")
    for key in _NOT_MODELLED:
        if values.get(key) is not None:
            raise InputError(f"{where}.{key}: not modelled yet; leave it out (families: {', '.join(FAMILIES)})")
    if values.get("attn_type") == "mla":
        raise InputError(f"{where}.attn_type: 'mla' is not modelled yet; allowed: {', '.join(ATTENTION_TYPES)}")
    if "dropout" in values:
        raise InputError(f"{where}.dropout: dropout belongs to the training recipe; write it as training.dropout")


def _checked(key: str, value: Any, where: str) -> Any:
    """`value` if it is of `key`'s type and within its range."""
    if key in _LARGEST:
        most = _LARGEST[key]
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise InputError(f"{where}.{key}: {_short(value)} is not allowed; it must be an integer from 1 to {most}")
        return value
    if key in _BOOLEANS:
        if not isinstance(value, bool):
            raise InputError(f"{where}.{key}: {_short(value)} is not allowed; it must be true or false")
        return value
    if key in ("rope_theta", "norm_eps"):
        low, high = (1.0, 1e12) if key == "rope_theta" else (1e-12, 1.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise InputError(f"{where}.{key}: {_short(value)} is not allowed; it must be from {low:g} to {high:g}")
        return float(value)
    return value


def _check_words(given: Mapping[str, Any], where: str) -> None:
    _one_of(given, "family", FAMILIES, where)
    allowed = {
        "pos_emb": POSITIONS[given["family"]],
        "norm": NORMS,
        "activation": ACTIVATIONS,
        "attn_type": ATTENTION_TYPES,
    }
    for key, words in allowed.items():
        if key in given:
            _one_of(given, key, words, where)


def _one_of(given: Mapping[str, Any], key: str, words: tuple[str, ...], where: str) -> None:
    if given[key] not in words:
        raise InputError(f"{where}.{key}: {_short(given[key])} is not known; allowed: {', '.join(words)}")


def _activation(given: Mapping[str, Any], where: str) -> str:
    """The activation that `activation` and `gated_mlp` state together."""
    gated = given.get("gated_mlp")
    if "activation" not in given:
        if gated is None:
            gated = given["family"] == "llama"
        return "swiglu" if gated else "gelu"
    activation = str(given["activation"])
    if gated is not None and gated != (activation in GATED_ACTIVATIONS):
        fitting = [name for name in ACTIVATIONS if (name in GATED_ACTIVATIONS) == gated]
        raise InputError(
            f"{where}.activation: {activation!r} contradicts gated_mlp: {str(gated).lower()}; "
            f"allowed with it: {', '.join(fitting)}"
        )
    return activation


def _kv_heads(given: Mapping[str, Any], where: str) -> int:
    """The number of key and value heads that `kv_heads` and `attn_type` state together."""
    heads, kind = int(given["heads"]), given.get("attn_type")
    if "kv_heads" not in given and kind == "gqa":
        raise InputError(f"{where}.kv_heads: missing; attn_type 'gqa' needs it, a divisor of heads {heads}")
    kv_heads = int(given.get("kv_heads", 1 if kind == "mqa" else heads))
    if heads % kv_heads:
        raise InputError(f"{where}.kv_heads: {kv_heads} does not divide heads {heads}; allowed: a divisor of heads")
    if (kind == "mha" and kv_heads != heads) or (kind == "mqa" and kv_heads != 1):
        allowed = heads if kind == "mha" else 1
        raise InputError(f"{where}.kv_heads: {kv_heads} contradicts attn_type {kind!r}; allowed with it: {allowed}")
    return kv_heads


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
