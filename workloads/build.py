"""A model of any kind becomes an nn.Module."""

from torch import nn

from workloads import huggingface, user_module
from workloads.gpt import GPT
from workloads.layers import AttentionKind
from workloads.llama import Llama
from workloads.model import HuggingFaceModel, Model, ModelConfig


def build(config: ModelConfig, attention: AttentionKind = "flash", dropout: float = 0.0) -> nn.Module:
    """The gpt or llama module of `config`.

    Made on the caller's default device and dtype; under FakeTensorMode it takes no memory, whatever its size.
    """
    return {"gpt": GPT, "llama": Llama}[config.family](config, attention, dropout)


def build_module(
    model: Model, *, attention: AttentionKind = "flash", dropout: float = 0.0, seq_len: int | None = None
) -> nn.Module:
    """The module that `model` describes, in training mode; `seq_len` makes its position tables long enough.

    A user's own module decides about attention and dropout itself. Raises InputError as the three loaders do.
    """
    if isinstance(model, ModelConfig):
        return build(model.for_sequence(seq_len) if seq_len else model, attention, dropout)
    if isinstance(model, HuggingFaceModel):
        return huggingface.build(model.class_name, model.config, attention=attention, dropout=dropout)
    return user_module.load(model.target, model.arguments, model.directory)
