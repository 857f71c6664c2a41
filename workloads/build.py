"""A model of any kind becomes an nn.Module."""

from torch import nn

from workloads import huggingface, user_module
from workloads.bert import Bert
from workloads.gpt import GPT
from workloads.layers import AttentionKind
from workloads.llama import Llama
from workloads.model import HuggingFaceModel, Model, ModelConfig
from workloads.moe import MoE
from workloads.t5 import T5
from workloads.vit import ViT


def build(config: ModelConfig, attention: AttentionKind = "flash", dropout: float = 0.0) -> nn.Module:
    """The module of `config`, by its family.

    Made on the caller's default device and dtype; under FakeTensorMode it takes no memory, whatever its size.
    """
    families: dict[str, type[nn.Module]] = {
        "gpt": GPT,
        "llama": Llama,
        "bert": Bert,
        "t5": T5,
        "vit": ViT,
        "moe": MoE,
    }
    return families[config.family](config, attention, dropout)


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
