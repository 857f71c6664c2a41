"""Recipes of training in 8 bits and fewer: which formats, which scales, which copies, and what stays in 16 bits.

One row per recipe. What all have in common: the products of the linear layers of the repeated blocks have narrow
operands, are summed in fp32 and give 16-bit results; embedding, head, router, norms, softmax and attention stay in 16
bits (NVIDIA, Transformer Engine documentation, "Low precision training"; DeepSeek-V3, arXiv 2412.19437, section 3.3.1).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from cosim.stacks.stack import Stack
from hwmodels.accelerator import Accelerator
from hwmodels.units import InputError

_TENSOR_OPS = 4.0  # per element: absolute value, maximum, product with the scale, conversion
_HADAMARD_OPS = 4.0  # additions per element of a fast transform over 16: log2(16)
_RANDOM_OPS = 2.5  # Philox: about 10 integer operations per 32 bits, 8 of them for each element (PTX ISA, cvt.rs)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How linear layers are quantized.

    `activation`, `weight`, `gradient`: formats. `tensor_amax`: the scale needs the largest value of the tensor as it
    is now, one more pass that reads it (else it is known from earlier steps, or found by block in the cast itself).
    `column_copy`: products along the other dimension read a second narrow copy, written by the same cast. `transposed`:
    that copy is a transpose, so that every product has the layout TN. `wgrad`: the weights' gradient is quantized, too.
    `hadamard` and `stochastic`: random Hadamard transform of what the weights' gradient is made of; stochastic rounding
    of gradients. `wide_blocks`: share of the blocks, the last ones, that stay in 16 bits. `multiple`: sizes of a weight
    that is quantized are multiples of it.
    """

    precision: str
    name: str
    activation: str
    weight: str
    gradient: str
    tensor_amax: bool
    column_copy: bool
    transposed: bool
    source: str
    wgrad: bool = True
    hadamard: bool = False
    stochastic: bool = False
    wide_blocks: float = 0.0
    multiple: int = 16

    def cast_ops(self, gradient: bool, weight: bool, copies: int) -> float:
        """Vector operations per element of a cast into `copies`."""
        column = self.hadamard and not weight and (copies > 1)
        return _TENSOR_OPS * copies + _HADAMARD_OPS * column + _RANDOM_OPS * copies * (self.stochastic and gradient)


_TE = "NVIDIA/TransformerEngine, transformer_engine/common/recipe/__init__.py @000b637ede9c"
RECIPES = (
    Recipe(
        *("fp8", "delayed", "fp8_e4m3", "fp8_e4m3", "fp8_e5m2"),
        tensor_amax=False,
        column_copy=True,
        transposed=True,
        source=f"{_TE}, DelayedScaling: scales from earlier steps; HYBRID: e4m3 forward, e5m2 gradients",
    ),
    Recipe(
        *("fp8", "current", "fp8_e4m3", "fp8_e4m3", "fp8_e5m2"),
        tensor_amax=True,
        column_copy=True,
        transposed=True,
        source=f"{_TE}, Float8CurrentScaling; pytorch/ao, torchao/float8/README.md, dynamic scaling",
    ),
    Recipe(
        *("fp8", "block", "fp8_block128", "fp8_e4m3", "fp8_block128"),
        tensor_amax=False,
        column_copy=True,
        transposed=True,
        source=f"{_TE}, Float8BlockScaling: 1 x 128, weights 128 x 128 (DeepSeek-V3, arXiv 2412.19437, section 3.3.2)",
    ),
    Recipe(
        *("mxfp8", "block", "mxfp8", "mxfp8", "mxfp8"),
        tensor_amax=False,
        column_copy=True,
        transposed=False,
        multiple=32,
        source=f"{_TE}, MXFP8BlockScaling: both directions are cast from 16 bits at once; e4m3 everywhere",
    ),
    Recipe(
        *("mxfp4", "block", "mxfp4", "mxfp4", "mxfp4"),
        tensor_amax=False,
        column_copy=True,
        transposed=True,
        hadamard=True,
        stochastic=True,
        multiple=32,
        source="Quartet, arXiv 2505.14669: all three products in MXFP4, Hadamard transform, stochastic gradients",
    ),
    Recipe(
        *("nvfp4", "block", "nvfp4", "nvfp4", "nvfp4"),
        tensor_amax=True,
        column_copy=True,
        transposed=True,
        hadamard=True,
        stochastic=True,
        wide_blocks=0.15,
        source=f"arXiv 2509.25149, sections 3 and 4: about 15 % of the linear layers, the last, in bf16; {_TE}, "
        "NVFP4BlockScaling: 16 x 16 for weights, transform of the columns, stochastic rounding of gradients",
    ),
    Recipe(
        *("int8", "switchback", "int8", "int8", "int8"),
        tensor_amax=False,
        column_copy=True,
        transposed=True,
        wgrad=False,
        source="SwitchBack, arXiv 2304.13013, section 2.2: forward and dgrad in int8, wgrad in 16 bits",
    ),
    Recipe(
        *("int8", "block", "int8", "int8", "int8"),
        tensor_amax=False,
        column_copy=True,
        transposed=True,
        multiple=32,
        source="Jetfire, arXiv 2403.12422: 32 x 32 blocks, all three products in int8",
    ),
)
NARROW = tuple(dict.fromkeys(recipe.precision for recipe in RECIPES))
"""Precisions that have recipes; everything that these leave alone is in bf16."""


def choose(precision: str, name: str | None, stack: Stack, accelerator: Accelerator) -> Recipe | None:
    """The recipe of a narrow precision: the one named, or the stack's, or the precision's first; None for wide ones.

    On Blackwell and where nothing else is known one FP8 copy with one scale serves both directions; Hopper and Ada
    need a transposed one (Transformer Engine documentation, "Performance considerations", "Architecture differences").
    Raises InputError: a recipe that is not of this precision.
    """
    known = {recipe.name: recipe for recipe in RECIPES if recipe.precision == precision}
    if not known:
        if name is not None:
            raise InputError(f"training.recipe: {name} needs a training.precision of {', '.join(NARROW)}")
        return None
    preferred = stack.fp8_recipe if stack.fp8_recipe in known else next(iter(known))
    chosen = known.get(name or preferred)
    if chosen is None:
        raise InputError(
            f"training.recipe: {name} is not a recipe of training.precision {precision}; allowed: {', '.join(known)}"
        )
    one_scale = precision == "fp8" and chosen.name != "block"
    if one_scale and accelerator.architecture not in ("hopper", "ada"):
        return dataclasses.replace(chosen, column_copy=False, transposed=False)
    return chosen
