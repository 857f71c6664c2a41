"""What a training step minimises."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from hwmodels.units import InputError
from workloads.operators import cross_entropy


def loss(logits: Tensor, labels: Tensor, *, fused: bool = False, in_fp32: bool = True) -> Tensor:
    """Mean cross entropy of logits (batch, seq, vocab) against labels (batch, seq) int64.

    With `in_fp32` the logits are converted first, as torchtitan, Megatron-LM and Hugging Face do: an fp32 copy of
    (tokens, vocab). `fused` is one operator instead of log-softmax and negative log likelihood.
    """
    rows = logits.flatten(0, -2)
    rows = rows.float() if in_fp32 else rows
    return cross_entropy(rows, labels.flatten())[0] if fused else F.cross_entropy(rows, labels.flatten())


def loss_of_output(
    output: object, labels: Tensor, *, fused: bool = False, in_fp32: bool = True, logged: int = 0
) -> Tensor:
    """The scalar loss that a module's output stands for.

    `output` is logits (batch, seq, vocab), a scalar loss, or an object or mapping with `loss` or `logits`. `logged`
    more cross entropies of the same logits are computed without gradient, as trainers do that log metrics.
    Raises InputError for anything else.
    """
    if isinstance(output, Tensor):
        if output.dim() == 0:
            return output
        if output.dim() < 2 or output.shape[:-1].numel() != labels.numel():
            raise InputError(
                f"model: forward returned a tensor of shape {_shape(output)}; allowed: logits of shape "
                f"{_shape(labels, 'vocab')}, one row per label, or a scalar loss; a module whose labels are not one "
                "per token defines example_labels(batch, seq_len)"
            )
        scalar = loss(output, labels, fused=fused, in_fp32=in_fp32)
        with torch.no_grad():
            for _ in range(logged):
                loss(output, labels, in_fp32=False)
        return scalar
    fields = output if isinstance(output, Mapping) else {key: getattr(output, key, None) for key in ("loss", "logits")}
    for key in ("loss", "logits"):
        value = fields.get(key)
        if isinstance(value, Tensor):
            return loss_of_output(value, labels, fused=fused, in_fp32=in_fp32, logged=logged)
    raise InputError(
        f"model: forward returned {type(output).__name__}; allowed: logits (batch, seq, vocab), a scalar loss, "
        "or an object or dict with loss or logits"
    )


def _shape(tensor: Tensor, *more: str) -> str:
    return f"({', '.join([*map(str, tensor.shape), *more])})"
