"""What a model's dimensions may be: words, ranges, and which family has which; bad ones are one clear sentence."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hwmodels.units import InputError

FAMILIES = ("gpt", "llama", "bert", "t5", "vit", "moe")
POSITIONS: Mapping[str, tuple[str, ...]] = {
    "gpt": ("learned", "rope", "alibi", "none"),
    "llama": ("rope", "alibi", "none"),
    "bert": ("learned", "rope", "none"),
    "t5": ("relative", "learned", "none"),
    "vit": ("learned", "none"),
    "moe": ("rope", "learned", "none"),
}
NORMS = ("layernorm", "rmsnorm")
GATED_ACTIVATIONS = ("swiglu", "geglu")
ACTIVATIONS = ("gelu", "silu", "relu", "squared-relu", *GATED_ACTIVATIONS)
ATTENTION_TYPES = ("mha", "gqa", "mqa", "mla")

OF_FAMILIES: Mapping[str, tuple[str, ...]] = {
    "mla": ("moe",),
    "num_experts": ("moe",),
    "experts_per_token": ("moe",),
    "moe_ffn": ("moe",),
    "shared_experts": ("moe",),
    "capacity_factor": ("moe",),
    "dense_layers": ("moe",),
    "qk_norm": ("llama", "moe"),
    "embedding_norm": ("gpt", "llama"),
    "token_types": ("bert",),
    "decoder_layers": ("t5",),
    "relative_buckets": ("t5",),
    "image_size": ("vit",),
    "patch_size": ("vit",),
    "channels": ("vit",),
    "classes": ("vit",),
}
"""Dimensions that only some families have."""

# Ten times beyond the largest models anyone has published: a larger number is a slip of the keyboard.
_LARGEST = {
    "layers": 10_000,
    "decoder_layers": 10_000,
    "dense_layers": 10_000,
    "hidden": 1_000_000,
    "heads": 65_536,
    "kv_heads": 65_536,
    "head_dim": 65_536,
    "ffn": 16_777_216,
    "moe_ffn": 16_777_216,
    "num_experts": 65_536,
    "experts_per_token": 65_536,
    "shared_experts": 65_536,
    "vocab": 100_000_000,
    "max_positions": 100_000_000,
    "relative_buckets": 65_536,
    "token_types": 65_536,
    "image_size": 65_536,
    "patch_size": 65_536,
    "channels": 65_536,
    "classes": 100_000_000,
}
_RANGES = {"rope_theta": (1.0, 1e12), "norm_eps": (1e-12, 1.0), "capacity_factor": (1.0, 1024.0)}
_FROM_ZERO = ("dense_layers", "shared_experts", "token_types")
_BOOLEANS = ("gated_mlp", "biases", "qkv_bias", "tied_embeddings", "embedding_norm", "qk_norm")
_LATENT = ("q_lora", "kv_lora", "qk_nope", "qk_rope", "v")


@dataclass(frozen=True, slots=True)
class Latent:
    """Widths of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    q_lora and kv_lora are the ranks of the compressed queries and of the compressed keys and values; a head's query and
    key are qk_nope + qk_rope wide, the latter rotated and, in the key, shared by the heads; its value is v wide.
    """

    q_lora: int  # 0: queries are projected directly
    kv_lora: int
    qk_nope: int
    qk_rope: int
    v: int


def latent(text: str, where: str = "model") -> Latent:
    """The widths in "q_lora=1536;kv_lora=512;qk_nope=128;qk_rope=64;v=128" (the column `mla`); q_lora may be left out.

    Raises InputError.
    """
    found: dict[str, int] = {}
    for part in str(text).split(";"):
        key, _, number = part.strip().partition("=")
        low = 0 if key == "q_lora" else 1
        if key not in _LATENT or key in found or not number.isdecimal() or not low <= int(number[:9]) <= 65_536:
            raise InputError(
                f"{where}.mla: {short(part)} is not allowed; it must be like 'q_lora=1536;kv_lora=512;qk_nope=128;"
                "qk_rope=64;v=128', each from 1 to 65536"
            )
        found[key] = int(number)
    if missing := [key for key in _LATENT[1:] if key not in found]:
        raise InputError(f"{where}.mla: {missing[0]} is missing; it needs {', '.join(_LATENT[1:])}")
    return Latent(**({"q_lora": 0} | found))


def check_family(values: Mapping[str, object], where: str) -> None:
    """Refuses an unknown family, dimensions that it does not have, and what is not a dimension."""
    one_of(values, "family", FAMILIES, where)
    family = str(values["family"])
    for key, families in OF_FAMILIES.items():
        if values.get(key) and family not in families:
            raise InputError(
                f"{where}.{key}: family {family!r} has no such dimension; it belongs to {', '.join(families)}"
            )
    if values.get("attn_type") == "mla" and family != "moe":
        raise InputError(f"{where}.attn_type: family {family!r} has no 'mla'; it belongs to moe")


def checked(key: str, value: Any, where: str) -> Any:
    """`value` if it is of `key`'s type and within its range."""
    if key in _LARGEST:
        low, most = 0 if key in _FROM_ZERO else 1, _LARGEST[key]
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= most:
            raise InputError(
                f"{where}.{key}: {short(value)} is not allowed; it must be an integer from {low} to {most}"
            )
        return value
    if key in _BOOLEANS:
        if not isinstance(value, bool):
            raise InputError(f"{where}.{key}: {short(value)} is not allowed; it must be true or false")
        return value
    if key in _RANGES:
        least, highest = _RANGES[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= highest:
            raise InputError(f"{where}.{key}: {short(value)} is not allowed; it must be from {least:g} to {highest:g}")
        return float(value)
    return value


def check_words(given: Mapping[str, Any], where: str) -> None:
    """Refuses words that their keys do not know."""
    allowed = {
        "pos_emb": POSITIONS[given["family"]],
        "norm": NORMS,
        "activation": ACTIVATIONS,
        "attn_type": ATTENTION_TYPES,
    }
    for key, words in allowed.items():
        if key in given:
            one_of(given, key, words, where)


def one_of(given: Mapping[str, Any], key: str, words: tuple[str, ...], where: str) -> None:
    """Refuses a value that is not one of `words`."""
    if given[key] not in words:
        raise InputError(f"{where}.{key}: {short(given[key])} is not known; allowed: {', '.join(words)}")


def activation(given: Mapping[str, Any], gated_by_default: bool, plain: str, where: str) -> str:
    """The activation that `activation` and `gated_mlp` state together; `plain` is the family's without a gate."""
    gated = given.get("gated_mlp")
    if "activation" not in given:
        gated = gated_by_default if gated is None else gated
        return "swiglu" if gated else plain
    name = str(given["activation"])
    if gated is not None and gated != (name in GATED_ACTIVATIONS):
        fitting = [word for word in ACTIVATIONS if (word in GATED_ACTIVATIONS) == gated]
        raise InputError(
            f"{where}.activation: {name!r} contradicts gated_mlp: {str(gated).lower()}; "
            f"allowed with it: {', '.join(fitting)}"
        )
    return name


def kv_heads(given: Mapping[str, Any], where: str) -> int:
    """The number of key and value heads that `kv_heads` and `attn_type` state together."""
    heads, kind = int(given["heads"]), given.get("attn_type")
    if "kv_heads" not in given and kind == "gqa":
        raise InputError(f"{where}.kv_heads: missing; attn_type 'gqa' needs it, a divisor of heads {heads}")
    found = int(given.get("kv_heads", 1 if kind == "mqa" else heads))
    if heads % found:
        raise InputError(f"{where}.kv_heads: {found} does not divide heads {heads}; allowed: a divisor of heads")
    if (kind in ("mha", "mla") and found != heads) or (kind == "mqa" and found != 1):
        allowed = 1 if kind == "mqa" else heads
        raise InputError(f"{where}.kv_heads: {found} contradicts attn_type {kind!r}; allowed with it: {allowed}")
    return found


def check_experts(given: Mapping[str, Any], where: str) -> None:
    """Refuses a moe family whose experts do not fit together."""
    for key in ("num_experts", "experts_per_token"):
        if key not in given:
            raise InputError(f"{where}.{key}: missing; family 'moe' needs num_experts and experts_per_token")
    if given["experts_per_token"] > given["num_experts"]:
        raise InputError(
            f"{where}.experts_per_token: {given['experts_per_token']} is more than num_experts {given['num_experts']}"
        )
    rows = given["experts_per_token"] * given.get("capacity_factor", 1.0)
    if rows != int(rows):
        raise InputError(
            f"{where}.capacity_factor: {given['capacity_factor']:g} times experts_per_token "
            f"{given['experts_per_token']} is {rows:g}; it must be a whole number"
        )
    if given.get("dense_layers", 0) > given["layers"]:
        raise InputError(f"{where}.dense_layers: {given['dense_layers']} is more than layers {given['layers']}")
    if given.get("attn_type") == "mla" and "mla" not in given:
        raise InputError(
            f"{where}.mla: missing; attn_type 'mla' needs it, like 'kv_lora=512;qk_nope=128;qk_rope=64;v=128'"
        )
    if "mla" in given and given.get("attn_type", "mla") != "mla":
        raise InputError(f"{where}.attn_type: {given['attn_type']!r} contradicts mla; allowed with it: mla")


def check_image(given: Mapping[str, Any], where: str) -> None:
    """Refuses patches that do not tile the image."""
    image, patch = given.get("image_size", 224), given.get("patch_size", 16)
    if image % patch:
        raise InputError(f"{where}.patch_size: {patch} does not divide image_size {image}; allowed: a divisor")


def short(value: object) -> str:
    """`value` as text of bounded length."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
