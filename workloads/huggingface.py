"""Models of the transformers library, from their configuration alone: nothing is fetched, nothing is downloaded.

Attention goes to `cosim::attention` under the name 'cosim', so that it is one node in a trace and no (seq, seq) mask is
made; `unfused` is the library's own 'eager' attention.
"""

import difflib
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hwmodels.units import InputError
from workloads import operators
from workloads.layers import AttentionKind

# The names that configurations of the library give to dropout probabilities.
_DROPOUTS = (
    *("attn_pdrop", "resid_pdrop", "embd_pdrop", "attention_dropout", "hidden_dropout", "embedding_dropout"),
    *("attention_probs_dropout_prob", "hidden_dropout_prob", "dropout", "dropout_rate", "activation_dropout"),
)
# Arguments of an attention layer that change what is computed, and that cosim::attention does not have.
_REFUSED = ("softcap", "position_bias", "s_aux")


def build(
    class_name: str, config: Mapping[str, object], *, attention: AttentionKind = "flash", dropout: float = 0.0
) -> nn.Module:
    """`transformers.<class_name>` of a configuration with the entries `config`, in training mode, without a KV cache.

    `dropout` is given to every dropout probability that `config` does not state itself. Under FakeTensorMode the
    weights are left as they are; with real tensors they are initialised as the library does it.
    Raises InputError: transformers is not installed, no such class or entry, or the library refuses the values.
    """
    model_class = _model_class(class_name)
    settings = _configuration(model_class, class_name, config)
    for name in _DROPOUTS:
        if name not in config and isinstance(getattr(settings, name, None), float | int):
            setattr(settings, name, dropout)
    settings.use_cache = False
    _register()
    kind = "cosim" if attention == "flash" else "eager"
    fake = torch._guards.detect_fake_mode() is not None
    try:
        with _no_init_weights() if fake else nullcontext():
            module = model_class._from_config(settings, attn_implementation=kind, dtype=torch.get_default_dtype())
        if fake:
            module.tie_weights()  # part of the initialisation that was left out
    except Exception as error:  # whatever a class of the library raises about the user's configuration
        raise InputError(
            f"model.config: {class_name} cannot be built: {_one_line(error)}; allowed: what that class accepts"
        ) from error
    return module.train()  # type: ignore[no-any-return]


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The library's attention interface in terms of `cosim::attention`: (out (batch, seq, heads, head_dim), None).

    Raises InputError for a variant that the operator does not compute: a window shorter than the sequence, a position
    bias, soft capping, attention sinks.
    """
    name = type(module).__name__
    window = options.get("sliding_window")
    if window is not None and window < key.shape[2]:
        raise InputError(f"model: {name}: sliding_window {window} below seq_len {key.shape[2]} is not modelled yet")
    for option in _REFUSED:
        if options.get(option) is not None:
            raise InputError(f"model: {name}: attention with {option} is not modelled yet; try attention: unfused")
    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    out = operators.attention(query, key, value, causal and query.shape[2] > 1, dropout, scale)[0]
    return out.transpose(1, 2), None


def _model_class(class_name: str) -> Any:
    try:
        import transformers
    except ImportError:
        raise InputError(
            f"model.huggingface: {class_name!r} needs the transformers library; "
            "install it with: pip install cosim[huggingface]"
        ) from None
    try:
        found = getattr(transformers, class_name, None)
    except Exception as error:  # a class whose own imports are missing
        raise InputError(f"model.huggingface: {class_name!r} cannot be imported: {_one_line(error)}") from error
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) and found.config_class is not None:
        return found
    models = [name for name in dir(transformers) if name.endswith(("LMHeadModel", "ForCausalLM"))]
    close = difflib.get_close_matches(class_name, models, n=3) or ["LlamaForCausalLM", "GPT2LMHeadModel"]
    raise InputError(
        f"model.huggingface: {class_name[:80]!r} is not a model class of transformers {transformers.__version__}; "
        f"allowed: for example {', '.join(close)}"
    )


def _configuration(model_class: Any, class_name: str, config: Mapping[str, object]) -> Any:
    """The class's configuration object; unknown entries are refused (the library would keep them silently)."""
    config_class = model_class.config_class
    known = {*config_class().to_dict(), *config_class.attribute_map}
    for key in config:
        if key not in known:
            close = difflib.get_close_matches(str(key), sorted(known), n=3)
            hint = f"; did you mean {' or '.join(close)}" if close else ""
            raise InputError(f"model.config.{key}: {config_class.__name__} has no such entry{hint}")
    try:
        return config_class(**config)
    except Exception as error:
        raise InputError(f"model.config: {class_name} refuses it: {_one_line(error)}") from error


def _register() -> None:
    """Makes 'cosim' known to the library; doing it again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register("cosim", attention_forward)
    AttentionMaskInterface.register("cosim", _no_mask)


def _no_mask(*_arguments: object, **_options: object) -> None:
    """Attention is causal or full by its own flag; a mask tensor of (seq, seq) is never made."""


def _no_init_weights() -> Any:
    from transformers.initialization import no_init_weights

    return no_init_weights()


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
