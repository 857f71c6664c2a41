"""Quantized linear layers on traced steps: what is cast, which products are narrow, and what memory holds."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest

from cosim import stacks
from cosim.graph import Category, OpGraph, OpKind, Phase
from cosim.mapping.pricing import Kernels, price
from cosim.simulate import simulate
from cosim.spec import RunSpec
from cosim.techniques.fusion import fuse
from cosim.techniques.quantization import quantize, uncalibrated
from cosim.techniques.recipes import RECIPES, Recipe, choose
from cosim.techniques.recompute import recompute
from cosim.trace import TraceOptions, trace
from cosim.trace.vocabulary import flops, kind_bytes, matmul_operands
from hwmodels.accelerator import load
from hwmodels.units import InputError
from workloads.model import from_dimensions

LAYERS, HIDDEN, KV, FFN, TOKENS = 3, 96, 32, 224, 2 * 64  # of the fixture's llama
WEIGHTS = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * KV + 3 * HIDDEN * FFN  # linear layers of one block
NAMED = {(recipe.precision, recipe.name): recipe for recipe in RECIPES}
DELAYED, CURRENT, BLOCK = (NAMED["fp8", name] for name in ("delayed", "current", "block"))
STACK = stacks.load("pytorch")


@pytest.fixture(scope="module")
def step(traced: Callable[..., OpGraph]) -> OpGraph:
    return traced("llama", parameter_format="bf16", master_format="fp32")


def kinds_of(graph: OpGraph, op_class: str, phase: Phase | None = None) -> list[OpKind]:
    """The kind of every op of a class, in a phase or in all."""
    ops = range(len(graph)) if phase is None else np.flatnonzero(graph.op_phase == phase).tolist()
    return [kind for kind in (graph.kinds[graph.op_kind[op]] for op in ops) if kind.op_class == op_class]


def operand_formats(graph: OpGraph) -> list[tuple[str, str]]:
    """Formats of both operands of every product, in order."""
    return [
        tuple(graph.specs[kind.inputs[place]].dtype for place in matmul_operands(kind))  # type: ignore[misc]
        for kind in kinds_of(graph, "matmul")
    ]


def cast_bytes(graph: OpGraph, phase: Phase) -> float:
    """Bytes that the casts of a phase read and write."""
    return math.fsum(sum(kind_bytes(graph, kind)) for kind in kinds_of(graph, "quantize", phase))


def resident_bytes(graph: OpGraph) -> int:
    """Bytes of narrow weights that are there before the step, as the plan counts them: weights but no parameters."""
    held = (graph.storage_category == Category.WEIGHTS) & (graph.storage_alloc < 0)
    narrow = np.array([spec.itemsize < 2 for spec in graph.specs])
    return int(graph.storage_bytes[held & narrow[graph.storage_spec]].sum())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: f"{r.precision}-{r.name}")
@pytest.mark.parametrize("gathered", [False, True])
def test_every_operand_is_alive_when_it_is_read(
    step: OpGraph, recipe: Recipe, gathered: bool, alive: Callable[[OpGraph], None]
) -> None:
    for policy in ("none", "full", "selective_op"):
        alive(recompute(quantize(step, recipe, gathered), policy))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: f"{r.precision}-{r.name}")
def test_products_and_their_flops_stay_the_same(step: OpGraph, recipe: Recipe) -> None:
    assert flops(quantize(step, recipe, False)) != []
    assert sum(flops(quantize(step, recipe, False))) == sum(flops(step))


def test_seven_linear_layers_of_a_block_have_three_narrow_products_and_the_head_has_none(step: OpGraph) -> None:
    formats = operand_formats(quantize(step, DELAYED, False))
    assert formats.count(("fp8_e4m3", "fp8_e4m3")) == 7 * LAYERS  # forward
    assert formats.count(("fp8_e5m2", "fp8_e4m3")) == 2 * 7 * LAYERS  # dgrad and wgrad
    assert formats.count(("bf16", "bf16")) == 3  # the head


def test_switchback_leaves_the_weights_gradient_in_sixteen_bits(step: OpGraph) -> None:
    formats = operand_formats(quantize(step, NAMED["int8", "switchback"], False))
    assert formats.count(("int8", "int8")) == 2 * 7 * LAYERS
    assert formats.count(("bf16", "bf16")) == 7 * LAYERS + 3


def test_nvfp4_leaves_the_last_blocks_in_sixteen_bits(step: OpGraph) -> None:
    """15 % of three blocks, rounded up, is one (arXiv 2509.25149: about 15 % of the linear layers, the last)."""
    graph = quantize(step, NAMED["nvfp4", "block"], False)
    layers = graph.op_layer[np.isin(graph.op_kind, [i for i, k in enumerate(graph.kinds) if k.op_class == "quantize"])]
    in_step = layers[layers >= 0]
    assert set(in_step.tolist()) == set(step.blocks[0].layers[:2])


def test_a_router_and_small_weights_stay_wide() -> None:
    dimensions = {"family": "moe", "layers": 2, "hidden": 96, "heads": 6, "vocab": 500, "moe_ffn": 64}
    model = from_dimensions({**dimensions, "num_experts": 16, "experts_per_token": 2, "ffn": 224})
    graph = trace(model, TraceOptions(batch=2, sequence=64, parameter_format="bf16", master_format="fp32"))
    narrow = quantize(graph, DELAYED, False)
    wide = {
        narrow.modules[narrow.op_module[op]].rpartition(".")[2]
        for op in range(len(narrow))
        if narrow.kinds[narrow.op_kind[op]].op_class == "matmul"
        and narrow.specs[narrow.kinds[narrow.op_kind[op]].inputs[0]].dtype == "bf16"
    }
    assert wide == {"router", "head"}
    assert "fp8_e4m3" in {narrow.specs[k.inputs[1]].dtype for k in narrow.kinds if k.target == "cosim.grouped_mm"}


def test_delayed_scaling_reads_two_bytes_and_writes_two_copies_of_one(step: OpGraph) -> None:
    """x of q, k, v, of output, of gate and up, and of down; g of each of the seven layers (column "cast" of fp8)."""
    graph = quantize(step, DELAYED, False)
    inputs = TOKENS * (HIDDEN + HIDDEN + HIDDEN + FFN)
    gradients = TOKENS * (HIDDEN + 2 * KV + HIDDEN + 2 * FFN + HIDDEN)
    assert cast_bytes(graph, Phase.FORWARD) == LAYERS * inputs * (2 + 1 + 1)
    assert cast_bytes(graph, Phase.BACKWARD) == LAYERS * gradients * (2 + 1 + 1)
    assert cast_bytes(graph, Phase.OPTIMIZER) == LAYERS * WEIGHTS * (2 + 1 + 1)


def test_current_scaling_reads_every_tensor_once_more(step: OpGraph) -> None:
    for phase in (Phase.FORWARD, Phase.BACKWARD, Phase.OPTIMIZER):
        delayed = cast_bytes(quantize(step, DELAYED, False), phase)
        current = cast_bytes(quantize(step, CURRENT, False), phase)
        casts = len(kinds_of(quantize(step, DELAYED, False), "quantize", phase))
        assert current == delayed * 6 / 4 + casts * 2 * 4  # the number that one pass writes and the other reads


def test_block_scales_are_counted(step: OpGraph) -> None:
    """MXFP8: 2 bytes read and 2 x 33/32 written; NVFP4: 2 x 2 read (the tensor's scale) and 2 x 9/16 written."""
    inputs = LAYERS * TOKENS * (3 * HIDDEN + FFN)
    assert cast_bytes(quantize(step, NAMED["mxfp8", "block"], False), Phase.FORWARD) == inputs * (2 + 2 * 33 / 32)
    every = dataclasses.replace(NAMED["nvfp4", "block"], wide_blocks=0.0)
    casts = 4 * LAYERS
    assert cast_bytes(quantize(step, every, False), Phase.FORWARD) == inputs * (4 + 2 * 9 / 16) + 2 * 4 * casts


def test_one_copy_serves_both_directions_on_blackwell_and_two_on_hopper() -> None:
    hopper, blackwell = (choose("fp8", None, STACK, load(name)) for name in ("h100-sxm-80gb", "b200-sxm"))
    assert hopper is not None and hopper.column_copy and hopper.transposed  # noqa: PT018
    assert blackwell is not None and not blackwell.column_copy and not blackwell.transposed  # noqa: PT018


def layouts(graph: OpGraph) -> set[str]:
    """Layouts of the products that read gradients in e5m2."""
    products = (kind for kind in graph.kinds if kind.op_class == "matmul")
    return {k.attribute("layout") for k in products if "fp8_e5m2" in {graph.specs[spec].dtype for spec in k.inputs}}


def test_products_have_the_layout_tn_where_columns_are_transposed(step: OpGraph) -> None:
    one = dataclasses.replace(DELAYED, column_copy=False, transposed=False)
    assert layouts(quantize(step, DELAYED, False)) == {"TN"}
    assert layouts(quantize(step, one, False)) == {"NN", "NT"}


def test_saved_inputs_of_linear_layers_take_one_byte_where_nothing_else_keeps_them(
    step: OpGraph, saved: Callable[[OpGraph], int]
) -> None:
    """Both norms' and the MLP's products are kept for wgrad alone: 2 bytes become 1. Attention's result is kept for its
    own backward as well, so that a copy more is in memory (Transformer Engine documentation, "Memory usage").
    """
    elements = LAYERS * TOKENS
    freed, more = elements * (2 * HIDDEN + FFN) * (2 - 1), elements * HIDDEN
    assert saved(step) - saved(quantize(step, DELAYED, False)) == freed - more


def test_a_weight_has_two_narrow_copies_that_stay_on_hopper_and_none_that_stay_under_zero_3(step: OpGraph) -> None:
    """Transformer Engine caches quantized weights over micro-batches; FSDP frees what it gathered."""
    assert resident_bytes(quantize(step, DELAYED, False)) == 2 * LAYERS * WEIGHTS
    assert resident_bytes(quantize(step, DELAYED, True)) == 0
    assert resident_bytes(step) == 0


def test_under_zero_3_weights_are_cast_in_forward_and_again_in_backward(step: OpGraph) -> None:
    cached, gathered = quantize(step, DELAYED, False), quantize(step, DELAYED, True)
    for phase in (Phase.FORWARD, Phase.BACKWARD):
        assert cast_bytes(gathered, phase) - cast_bytes(cached, phase) == LAYERS * WEIGHTS * (2 + 1)
    assert cast_bytes(gathered, Phase.OPTIMIZER) == 0


def test_full_recomputation_casts_activations_again(step: OpGraph) -> None:
    graph = recompute(quantize(step, DELAYED, False), "full")
    again = cast_bytes(graph, Phase.RECOMPUTE)
    assert again == cast_bytes(graph, Phase.FORWARD)


def test_autocast_copies_that_only_linear_layers_read_are_gone(traced: Callable[..., OpGraph]) -> None:
    """A narrow cast reads the fp32 weight itself."""
    graph = traced("llama", parameter_format="fp32", autocast_format="bf16")
    narrow = quantize(graph, DELAYED, False)
    casts = [len(kinds_of(g, "copy", Phase.FORWARD)) for g in (graph, narrow)]
    assert casts[0] - casts[1] == LAYERS * (7 + 5)  # of each weight, and of each norm's output for each that reads it
    assert cast_bytes(narrow, Phase.OPTIMIZER) == LAYERS * WEIGHTS * (4 + 1 + 1)


def test_hadamard_transform_and_stochastic_rounding_are_instructions_of_the_cast(step: OpGraph) -> None:
    full = NAMED["nvfp4", "block"]
    plain = dataclasses.replace(full, hadamard=False, stochastic=False)

    def instructions(recipe: Recipe) -> float:
        return math.fsum(k.attribute("vector_ops", 0.0) for k in kinds_of(quantize(step, recipe, False), "quantize"))

    assert instructions(full) > instructions(dataclasses.replace(full, stochastic=False)) > instructions(plain)


def test_a_compiled_cast_joins_the_kernel_before_it_unless_it_waits_for_the_largest_value(step: OpGraph) -> None:
    """Delayed scaling: the norm writes fp8 itself. Current scaling: the norm finds the largest value, and a cast reads
    what it wrote (pytorch/ao, torchao/float8/README.md: delayed has "reduced read/write traffic requirements").
    """
    delayed, current = (fuse(quantize(step, recipe, False), "model") for recipe in (DELAYED, CURRENT))

    def alone(graph: OpGraph) -> int:
        return len(kinds_of(graph, "quantize", Phase.FORWARD))

    assert alone(delayed) == LAYERS  # of attention's result
    assert alone(current) == LAYERS * 4 + LAYERS  # every cast, and the search over attention's result
    assert all_bytes(delayed) < all_bytes(current) < all_bytes(quantize(step, CURRENT, False))


def all_bytes(graph: OpGraph) -> float:
    """Bytes that all ops of forward read and write."""
    forward = np.flatnonzero(graph.op_phase == Phase.FORWARD).tolist()
    return math.fsum(sum(kind_bytes(graph, graph.kinds[graph.op_kind[op]])) for op in forward)


# Published


def linear(m: int, k: int, n: int) -> OpGraph:
    """Two blocks of a single linear layer: a step of x (m, k) through weights (n, k)."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(k, n, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.linear(x)
            return out

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Block(), Block()])  # repeated, beside each other
            self.scales = nn.ParameterList([torch.ones(k), torch.ones(k)])  # so that the inputs have gradients

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return sum(layer(x * scale).sum() for layer, scale in zip(self.layers, self.scales, strict=True))

        def example_inputs(self, batch: int, sequence: int) -> torch.Tensor:
            return torch.empty(m, k, dtype=torch.bfloat16)

    return trace(Layer, TraceOptions(parameter_format="bf16", master_format="fp32"))


@pytest.mark.parametrize(("shape", "published"), [((1024, 2048, 1024), 0.80), ((4096, 8192, 16384), 1.39)])
def test_speed_of_one_linear_layer_on_h100_is_torchaos(shape: tuple[int, int, int], published: float) -> None:
    """pytorch/ao torchao/float8/README.md: forward and backward in fp8 with scales of the tensor over bf16, on H100.

    torchao casts the weight in every pass; the small layer loses, the large one gains, never 2x.
    """
    graph = linear(*shape)
    chip = load("h100-sxm-80gb")
    kernels = Kernels("fp32", "flash-2", STACK)

    def time(g: OpGraph) -> float:
        classes = np.array([k.op_class in ("matmul", "quantize") for k in g.kinds])[g.op_kind]
        return float(price(g, chip, kernels, 1).time_s[classes].sum())

    gain = time(graph) / time(quantize(graph, CURRENT, True))
    assert gain == pytest.approx(published, rel=0.15)


def test_torchtitans_gain_from_fp8_is_within_fifteen_percent() -> None:
    """pytorch/torchtitan benchmarks/llama3_h100_202412_torchtitan.md: Llama-3-8B on 8 H100 of 500 W, compiled: 6,667
    tokens/s per device in bf16, 8,532 with float8 linear layers.
    """
    run = {
        "workload": {"model": "llama3-8b", "seq_len": 8192, "global_batch": 8},
        "system": {"accelerator": "h100-sxm-96gb-hbm2e-500w", "devices": 8},
        "training": {"framework": "torchtitan", "recompute": "selective_op", "compile": True},
    }
    wide, narrow = (
        simulate(RunSpec.from_mapping(run, overrides=[f"training.precision={precision}"]))
        for precision in ("bf16", "fp8")
    )
    gain = narrow.tokens_per_s / wide.tokens_per_s
    assert gain == pytest.approx(8532 / 6667, rel=0.15)
    assert narrow.to_json()["time_breakdown_s"]["compute"]["quantize"] > 0


def test_switchbacks_gain_is_the_published_one() -> None:
    """Wortsman et al., arXiv 2304.13013, abstract: 13 to 25 % faster training of ViT-Huge than in bf16, on A100."""
    huge = {"family": "vit", "layers": 32, "hidden": 1280, "heads": 16, "ffn": 5120, "patch_size": 14}
    run = {
        "workload": {"model": huge, "global_batch": 64, "micro_batch": 64},
        "system": {"accelerator": "a100-sxm-40gb"},
        "training": {"compile": True},
    }
    wide, narrow = (
        simulate(RunSpec.from_mapping(run, overrides=[f"training.precision={precision}"])).step_time_s
        for precision in ("bf16", "int8")
    )
    assert 1.13 < wide / narrow < 1.25


def test_a_format_without_calibrated_products_is_extrapolated(step: OpGraph) -> None:
    narrow, fitted = quantize(step, DELAYED, False), {"value": 0.9, "fitted_on": "products of this test"}
    chip = load("h100-sxm-80gb")
    assert uncalibrated(step, chip) == ()
    assert [said.partition(";")[0] for said in uncalibrated(narrow, chip)] == [
        "h100-sxm-80gb: no product in fp8 was calibrated"
    ]
    other = load({"base": "h100-sxm-80gb", "set": {"calibration.gemm.formats.fp8": fitted}})
    assert uncalibrated(narrow, other) == ()


# Errors


def test_a_chip_without_the_format_says_so_in_a_sentence() -> None:
    run = {
        "workload": {
            "model": {"family": "llama", "layers": 1, "hidden": 128, "heads": 4, "vocab": 512},
            "seq_len": 64,
            "global_batch": 1,
        },
        "system": {"accelerator": "a100-sxm-80gb"},
    }
    for precision, chip in (("fp8", "a100-sxm-80gb"), ("mxfp8", "h100-sxm-80gb"), ("nvfp4", "h100-sxm-80gb")):
        spec = RunSpec.from_mapping(run, overrides=[f"training.precision={precision}", f"system.accelerator={chip}"])
        with pytest.raises(InputError, match=f"training.precision: {chip} does not compute in {precision}; it has"):
            simulate(spec)


def test_a_recipe_of_another_precision_says_so_in_a_sentence() -> None:
    chip = load("b200-sxm")
    with pytest.raises(InputError, match=r"training\.recipe: delayed is not a recipe of training\.precision mxfp8"):
        choose("mxfp8", "delayed", STACK, chip)
    with pytest.raises(InputError, match=r"training\.recipe: block needs a training\.precision of fp8"):
        choose("bf16", "block", STACK, chip)
    assert choose("bf16", None, STACK, chip) is None


def test_quantized_weights_are_weights_in_memory(step: OpGraph) -> None:
    graph = quantize(step, DELAYED, False)
    new = graph.storage_category[len(step.storage_category) :]
    assert (new == Category.WEIGHTS).sum() == 2 * 7 * LAYERS
