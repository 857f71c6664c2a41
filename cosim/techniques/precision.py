"""What `training.precision` means in a software stack: formats of parameters, compute, gradients and masters.

16-bit training keeps fp32 masters (Micikevicius et al. 2017, arXiv 1710.03740). Stacks differ in where they are:
`autocast` keeps fp32 parameters and casts them op by op; `cast_parameters` (FSDP's mixed precision) shards fp32 and
gathers 16 bit; `master_weights` holds the 16-bit model and fp32 copies for the optimizer.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from cosim.stacks.stack import Format, Stack
from cosim.techniques.recipes import NARROW, Recipe

ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True, slots=True)
class StepFormats:
    """Bytes per element of what a step holds and sends, from the precision and the stack."""

    parameter: int  # as forward and backward read them
    master: int  # as the optimizer reads them; equal to `parameter` when there is one copy
    gradient: int  # as the optimizer reads it
    gather: int
    reduce: int
    optimizer_state: float  # bytes per trainable parameter of all states together, masters apart


@dataclass(frozen=True, slots=True)
class Precision:
    """Formats by role. `autocast` is None without it; `master` is None where the optimizer updates the parameters
    themselves.
    """

    parameter: str
    autocast: str | None
    master: str | None
    gradient: str
    gather: str
    reduce: str
    fp32_matmul: str  # fp32 or tf32
    compute: str  # of matrix products, for the chip's peak
    buffer: str | None = None  # of a buffer that micro-steps add their gradients to
    recipe: Recipe | None = None  # of a narrow precision: how linear layers are quantized

    def step_formats(self, optimizer_state: float) -> StepFormats:
        """The same in bytes per element, with the optimizer's states (`cosim.techniques.optimizers.state_bytes`)."""
        return StepFormats(
            parameter=ITEMSIZE[self.parameter],
            master=ITEMSIZE[self.master or self.parameter],
            gradient=ITEMSIZE[self.gradient],
            gather=ITEMSIZE[self.gather],
            reduce=ITEMSIZE[self.reduce],
            optimizer_state=optimizer_state,
        )


def resolve(
    precision: str, stack: Stack, sharded: bool, gradient_format: str | None, reduce_format: str | None
) -> Precision:
    """The formats of `precision` under `stack`, where parameters are `sharded` (ZeRO 3) or not.

    The run's own gradient and reduction formats come first. Narrow precisions (fp8 and fewer bits) are bf16 mixed
    precision whose linear layers are quantized, see `cosim.techniques.quantization`.
    """
    if precision in NARROW:
        wide = resolve("bf16", stack, sharded, gradient_format, reduce_format)
        return dataclasses.replace(wide, compute=precision)
    if precision in ("fp32", "tf32"):
        gradient, reduced = gradient_format or "fp32", reduce_format or "fp32"
        return Precision("fp32", None, None, gradient, "fp32", reduced, precision, precision)

    def named(role: Format) -> str:
        wide = role == "fp32" or (role == "fp32_if_bf16" and precision == "bf16")
        return "fp32" if wide else precision

    way = stack.mixed_precision_sharded if sharded else stack.mixed_precision_replicated
    autocast = way == "autocast"
    parameter = "fp32" if autocast else precision
    return Precision(
        parameter=parameter,
        autocast=precision if autocast else None,
        master=None if autocast else "fp32",
        gradient=gradient_format or named(stack.gradient_format),
        gather=named(stack.parameter_gather_format),
        reduce=reduce_format or named(stack.gradient_reduce_format),
        fp32_matmul="fp32",
        compute=precision,
        buffer=None if sharded or stack.gradient_buffer == "none" else named(stack.gradient_buffer),
    )
