"""What a training step minimises."""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from hwmodels.units import InputError


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of logits (batch, seq, vocab) against labels (batch, seq) int64, in fp32.

    The logits are converted first, as torchtitan, Megatron-LM and Hugging Face do: an fp32 copy of (tokens, vocab).
    """
    return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten())


def loss_of_output(output: object, labels: Tensor) -> Tensor:
    """The scalar loss that a module's output stands for.

    `output` is logits (batch, seq, vocab), a scalar loss, or an object or mapping with `loss` or `logits`.
    Raises InputError for anything else.
    """
    if isinstance(output, Tensor):
        return output if output.dim() == 0 else loss(output, labels)
    fields = output if isinstance(output, Mapping) else {key: getattr(output, key, None) for key in ("loss", "logits")}
    for key in ("loss", "logits"):
        value = fields.get(key)
        if isinstance(value, Tensor):
            return loss_of_output(value, labels)
    raise InputError(
        f"model: forward returned {type(output).__name__}; allowed: logits (batch, seq, vocab), a scalar loss, "
        "or an object or dict with loss or logits"
    )
