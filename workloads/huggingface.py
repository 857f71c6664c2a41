"""Models of the transformers library, from their configuration alone: nothing is fetched, nothing is downloaded.

Attention goes to `cosim::attention` under the name 'cosim', so that it is one node in a trace and no (seq, seq) mask is
made; `unfused` is the library's own 'eager' attention. Experts go to `cosim::grouped_mm`, with a balanced load. The
inputs of a step follow from the signature of the class's forward.
"""

import difflib
import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hwmodels.units import InputError
from workloads import operators
from workloads.layers import AttentionKind, unfused_attention
from workloads.moe import grouped, route

# The names that configurations of the library give to dropout probabilities.
_DROPOUTS = (
    *("attn_pdrop", "resid_pdrop", "embd_pdrop", "attention_dropout", "hidden_dropout", "embedding_dropout"),
    *("attention_probs_dropout_prob", "hidden_dropout_prob", "dropout", "dropout_rate", "activation_dropout"),
)
# Classes that compute their own loss from labels, whose output is more than logits of tokens.
_OWN_LOSS = ("BertForPreTraining",)
_INPUTS = ("input_ids", "pixel_values", "decoder_input_ids", "input_features", "input_values", "bbox")
# Entries of published configurations that classes read without declaring them.
_ALWAYS_KNOWN = ("num_labels", "head_dim", "rope_theta", "rope_scaling")


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
    # classes with attention of their own run what the library chooses for them: its sdpa, or products and softmax
    kind = "eager" if attention != "flash" else "cosim" if model_class._can_set_attn_implementation() else None
    if model_class._can_set_experts_implementation():
        settings._experts_implementation = "cosim"
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
    _describe_inputs(module, class_name)
    return module.train()  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The inputs and labels of a training step of a class of the library."""

    names: tuple[str, ...]  # of forward's arguments
    settings: Any
    own_loss: bool

    def example_inputs(self, batch: int, seq_len: int) -> dict[str, Tensor]:
        """Images, or tokens (batch, seq_len) under each name; labels too where the class computes its own loss."""
        if "pixel_values" in self.names:
            return {"pixel_values": _images(self.settings, batch)}
        inputs = {name: _tokens(batch, seq_len) for name in self.names}
        if self.own_loss:
            inputs |= {"labels": _tokens(batch, seq_len), "next_sentence_label": _tokens(batch)}
        return inputs

    def example_labels(self, batch: int, seq_len: int) -> Tensor:
        """A class per image, or a token per position."""
        return _tokens(batch) if "pixel_values" in self.names else _tokens(batch, seq_len)


def _describe_inputs(module: nn.Module, class_name: str) -> None:
    """Gives the module `example_inputs` and `example_labels`, and the longest sequence that its attention is modelled
    for; raises InputError where its inputs cannot be made.
    """
    taken = inspect.signature(module.forward).parameters
    names = tuple(name for name in _INPUTS if name in taken)
    if names not in (("input_ids",), ("pixel_values",), ("input_ids", "decoder_input_ids")):
        raise InputError(
            f"model.huggingface: the inputs of {class_name} cannot be made, its forward takes "
            f"{', '.join(list(taken)[:6])}; allowed: classes of tokens (input_ids, decoder_input_ids) or of "
            "images (pixel_values)"
        )
    inputs = StepInputs(names, module.config, class_name in _OWN_LOSS)
    vars(module).update(
        example_inputs=inputs.example_inputs,
        example_labels=inputs.example_labels,
        longest_sequence=_window(module.config),
    )


def _window(settings: Any) -> int | None:
    """How far attention sees, if not everywhere; configurations write 0, or switch it off, where it is not used."""
    used = getattr(settings, "use_sliding_window", True)
    return (getattr(settings, "sliding_window", None) or None) if used else None


def _tokens(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def _images(settings: Any, batch: int) -> Tensor:
    side = settings.image_size
    height, width = side if isinstance(side, list | tuple) else (side, side)
    return torch.zeros((batch, getattr(settings, "num_channels", 3), height, width))


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The library's experts interface in terms of `cosim::grouped_mm`: (tokens, hidden) -> (tokens, hidden).

    As its 'grouped_mm' implementation, for any format and without reading how many tokens an expert has.
    """
    rows, token_of_row, counts = route(top_k_index, self.num_experts)
    expert = top_k_index.flatten().index_select(0, rows)

    def project(x: Tensor, name: str) -> Tensor:
        weight = getattr(self, name)
        x = grouped(x, weight if self.is_transposed else weight.mT, counts)
        return x + getattr(self, f"{name}_bias").index_select(0, expert).to(x.dtype) if self.has_bias else x

    inner = project(hidden_states.index_select(0, token_of_row), "gate_up_proj" if self.has_gate else "up_proj")
    inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
    out = project(inner, "down_proj")
    if self.has_post_expert_norm:
        out = self.post_expert_norm(out)
    out = out * top_k_weights.flatten().index_select(0, rows).unsqueeze(-1).to(out.dtype)
    total = torch.zeros_like(hidden_states, dtype=out.dtype).index_add(0, token_of_row, out)
    return total.to(hidden_states.dtype)


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

    Scores with a trained bias (T5), a soft cap (Gemma 2) or sinks (gpt-oss) have no fused kernel here and are computed
    in memory. Raises InputError for a window shorter than the sequence.
    """
    name = type(module).__name__
    window = options.get("sliding_window")
    if window and window < key.shape[2]:
        raise InputError(f"model: {name}: sliding_window {window} below seq_len {key.shape[2]} is not modelled yet")
    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    causal = causal and query.shape[2] > 1
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    bias, cap, sinks = (options.get(option) for option in ("position_bias", "softcap", "s_aux"))
    if bias is not None and not bias.requires_grad:
        bias = None  # attention over the encoder's output gets zeros
    if bias is None and cap is None and sinks is None:
        out = operators.attention(query, key, value, causal, dropout, scale)[0]
    else:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(1) if causal else None
        out = unfused_attention(query, key, value, mask, dropout, scale, bias=bias, cap=cap, sinks=sinks)
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
    endings = ("LMHeadModel", "ForCausalLM", "ForMaskedLM", "ForConditionalGeneration", "ForImageClassification")
    models = [name for name in dir(transformers) if name.endswith(endings) and not name.startswith("Auto")]
    close = difflib.get_close_matches(class_name, models, n=3) or ["LlamaForCausalLM", "GPT2LMHeadModel"]
    raise InputError(
        f"model.huggingface: {class_name[:80]!r} is not a model class of transformers {transformers.__version__}; "
        f"allowed: for example {', '.join(close)}"
    )


def _configuration(model_class: Any, class_name: str, config: Mapping[str, object]) -> Any:
    """The class's configuration object; unknown entries are refused (the library would keep them silently)."""
    config_class = model_class.config_class
    known = {*config_class().to_dict(), *config_class.attribute_map, *_without_default(config_class), *_ALWAYS_KNOWN}
    for key in config:
        if key not in known:
            close = difflib.get_close_matches(str(key), sorted(known), n=3)
            hint = f"; did you mean {' or '.join(close)}" if close else ""
            raise InputError(f"model.config.{key}: {config_class.__name__} has no such entry{hint}")
    try:
        return config_class(**config)
    except Exception as error:
        raise InputError(f"model.config: {class_name} refuses it: {_one_line(error)}") from error


def _without_default(config_class: Any) -> set[str]:
    """Entries that the class declares and leaves out of a configuration that does not state them."""
    return {name for kind in config_class.__mro__ for name in vars(kind).get("__annotations__", {})}


def _register() -> None:
    """Makes 'cosim' known to the library; doing it again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register("cosim", experts_forward)
    AttentionInterface.register("cosim", attention_forward)
    AttentionMaskInterface.register("cosim", _no_mask)


def _no_mask(*_arguments: object, **_options: object) -> None:
    """Attention is causal or full by its own flag; a mask tensor of (seq, seq) is never made."""


def _no_init_weights() -> Any:
    from transformers.initialization import no_init_weights

    return no_init_weights()


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
