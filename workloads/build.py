"""A model of any kind becomes an nn.Module."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from hwmodels.units import InputError
from workloads import huggingface, user_module
from workloads.gpt import GPT
from workloads.layers import AttentionKind
from workloads.llama import Llama
from workloads.model import ModelConfig


def build(config: ModelConfig, attention: AttentionKind = "flash", dropout: float = 0.0) -> nn.Module:
    """The gpt or llama module of `config`, on the caller's default device, dtype and (fake) tensor mode."""
    return {"gpt": GPT, "llama": Llama}[config.family](config, attention, dropout)
