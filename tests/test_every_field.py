"""Every field that a user can set changes some result, or stands here with the reason why it does not.

A field without effect is worse than none: it is believed.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from cosim import stacks
from cosim.simulate import simulate
from cosim.spec import RunSpec
from cosim.spec.modelled import MODELLED
from cosim.stacks.stack import ByArchitecture, Stack
from hwmodels.accelerator import load_raw

GPT = {"family": "gpt", "layers": 3, "hidden": 128, "heads": 4, "vocab": 1024, "max_positions": 512}
LLAMA = {"family": "llama", "layers": 3, "hidden": 128, "heads": 4, "kv_heads": 2, "ffn": 352, "vocab": 1024}
LARGE = {"family": "llama", "layers": 3, "hidden": 2048, "heads": 16, "kv_heads": 4, "ffn": 5632, "vocab": 32000}


def result_of(overrides: tuple[str, ...], model: Mapping[str, object] = LLAMA) -> dict[str, Any]:
    """The result as JSON, without the echo of what was asked."""
    return _result(overrides, tuple(model.items()), stacks.load)


@functools.cache
def _result(overrides: tuple[str, ...], model: tuple[tuple[str, object], ...], _stacks: object) -> dict[str, Any]:
    base: dict[str, Any] = {
        "workload": {"model": dict(model), "seq_len": 256, "global_batch": 96, "micro_batch": 1, "tokens": 1e9},
        "system": {"accelerator": "h100-sxm-80gb", "devices": 16},
        "parallel": {"zero": 3},
        "training": {"framework": "pytorch"},
    }
    if dict(model)["family"] == "vit":  # the images say how many tokens there are
        del base["workload"]["seq_len"]
    plain = simulate(RunSpec.from_mapping(base, overrides=overrides)).to_json()
    return {key: value for key, value in plain.items() if key not in ("spec", "assumed", "calibration")}


# The run file: field -> a value that must change something, and what else the run must say.

STAGES = ("parallel.pipeline=2", "parallel.zero=1", "workload.model.layers=4")
FAILURES = "system.failures={mean_time_between_failures: 50000 h, checkpoint_time: 60 s}"
RUN_FIELDS: dict[str, tuple[str, ...]] = {
    "workload.model": ("gpt2-small",),
    "workload.seq_len": ("512",),
    "workload.global_batch": ("192",),
    "workload.micro_batch": ("2",),
    "workload.tokens": ("2.0e9",),
    "system.accelerator": ("a100-sxm-80gb",),
    "system.accelerator.base": ("a100-sxm-80gb",),
    "system.accelerator.set": ("{clock: 1.5 GHz}", "system.accelerator.base=h100-sxm-80gb"),
    "system.devices": ("8",),
    "system.devices_per_node": ("4",),
    "system.nvlink_domain": ("2",),
    "system.network.inter_node": ("50 Gb/s",),
    "system.network.inter_node_latency": ("900 us",),
    "system.network.intra_node": ("1 GB/s", "system.devices=8"),
    "system.network.intra_node_latency": ("900 us", "system.devices=8"),
    "system.network.topology": ("fat-tree", "system.network.radix=4", "system.devices_per_node=2"),
    "system.network.oversubscription": ("40", "system.network.radix=4", "system.devices_per_node=1"),
    "system.network.radix": ("4", "system.devices_per_node=1"),
    "system.network.routing": (
        "valiant",
        "system.network={topology: dragonfly, radix: 3}",
        "system.devices_per_node=1",
    ),
    "system.network.in_network_reduction": ("true", "parallel.zero=0", "system.devices=8"),
    "system.network.algorithms": ("[halving]", "parallel.zero=0"),
    "system.variation.slow_device.pipeline_rank": ("1", "system.variation.slow_device.factor=1.5", *STAGES),
    "system.variation.slow_device.factor": ("1.5", "system.variation.slow_device.factor=1.2"),
    "system.variation.slow_link.tier": ("fabric", "system.variation.slow_link.factor=4"),
    "system.variation.slow_link.factor": ("4",),
    "system.variation.jitter": ("0.1",),
    "system.variation.seed": ("1", "system.variation.jitter=0.1"),
    "system.failures.mean_time_between_failures": ("1000 h", FAILURES),
    "system.failures.checkpoint_interval": ("10 min", FAILURES),
    "system.failures.checkpoint_time": ("5 s", FAILURES),
    "system.failures.storage_bandwidth": (
        "1 GB/s",
        "system.failures={mean_time_between_failures: 50000 h, storage_bandwidth: 2 GB/s}",
    ),
    "system.failures.restart_time": ("1 h", FAILURES),
    "parallel.tensor": ("2",),
    "parallel.sequence": ("true", "parallel.tensor=2"),
    "parallel.overlap.tensor": ("true", "parallel.tensor=2", "parallel.sequence=true"),
    "parallel.context": ("2",),
    "parallel.context_by": ("all_to_all", "parallel.context=2"),
    "parallel.pipeline": ("2", "parallel.zero=1", "workload.model.layers=4"),
    "parallel.schedule": ("gpipe", *STAGES),
    "parallel.virtual_stages": ("2", *STAGES),
    "parallel.stage_layers": ("[3, 1]", *STAGES),
    "parallel.zero": ("0",),
    "parallel.hybrid_shard": ("true",),
    "parallel.overlap.gradients": ("false",),
    "parallel.overlap.parameters": ("false",),
    "training.framework": ("composer",),
    "training.precision": ("tf32", "training.attention=unfused"),
    "training.recipe": ("current", "training.precision=fp8"),
    "training.optimizer": ("sgd",),
    "training.gradient_format": ("bf16",),
    "training.reduce_format": ("bf16",),
    "training.recompute": ("full",),
    "training.recompute.every": ("2", "training.recompute={every: 1}"),
    "training.compile": ("true",),
    "training.attention": ("unfused",),
    "training.dropout": ("0.1",),
}
SMALL = {"layers": 3, "hidden": 128, "heads": 4, "vocab": 1024}
MOE = {"family": "moe", "num_experts": 4, "experts_per_token": 2, "moe_ffn": 256, **SMALL}
MLA = {**MOE, "attn_type": "mla", "mla": "kv_lora=512;qk_nope=128;qk_rope=64;v=128"}
IMAGES = {"family": "vit", "layers": 3, "hidden": 128, "heads": 4}
BERT, T5 = {"family": "bert", **SMALL}, {"family": "t5", **SMALL}
FAMILY_DIMENSIONS: dict[str, tuple[Mapping[str, object], object]] = {
    "qk_norm": (LLAMA, True),
    "num_experts": (MOE, 8),
    "experts_per_token": (MOE, 1),
    "moe_ffn": (MOE, 512),
    "capacity_factor": (MOE, 2.0),
    "shared_experts": (MOE, 1),
    "dense_layers": (MOE, 1),
    "token_types": (BERT, 512),
    "decoder_layers": (T5, 2),
    "relative_buckets": (T5, 1024),
    "mla": (MLA, "kv_lora=256;qk_nope=128;qk_rope=64;v=128"),
    "image_size": (IMAGES, 448),
    "patch_size": (IMAGES, 32),
    "channels": (IMAGES, 1),
    "classes": (IMAGES, 21_000),
}
FAMILY_FIELDS: dict[str, tuple[Mapping[str, object], tuple[str, ...]]] = {
    "workload.masked_fraction": (BERT, ("0.5",)),
    "workload.decoder_seq_len": (T5, ("64",)),
    "parallel.expert": (MOE, ("2",)),
    "parallel.expert_tensor": (MOE, ("2", "parallel.expert=2", "parallel.tensor=2")),
    "parallel.expert_imbalance": (MOE, ("1.5", "parallel.expert=2")),
}
DIMENSIONS: dict[str, object] = {
    "layers": 4,
    "hidden": 256,
    "heads": 8,
    "vocab": 2048,
    "kv_heads": 1,
    "head_dim": 64,
    "ffn": 512,
    "gated_mlp": False,
    "activation": "relu",
    "pos_emb": "none",
    "attn_type": "mha",
    "norm": "layernorm",
    "biases": True,
    "qkv_bias": True,
    "tied_embeddings": True,
    "embedding_norm": True,
    "max_positions": 1024,
    "family": "gpt",
}
NO_EFFECT = {
    "workload.model.rope_theta": "changes values in a table, no shape",
    "workload.model.norm_eps": "changes values, no shape",
    "workload.model.huggingface": "another source of the model; tests/workloads",
    "workload.model.config": "of a Hugging Face model; tests/workloads",
    "workload.model.python": "another source of the model; tests/workloads",
    "workload.model.arguments": "of a Python model; tests/workloads",
}


def run_fields(model: type[BaseModel] = RunSpec, prefix: str = "") -> Iterator[str]:
    """Every key of the run file, `a.b.c`."""
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        sections = list(_sections(field.annotation))
        if not sections or path in RUN_FIELDS:
            yield path
        for section in sections:
            yield from run_fields(section, f"{path}.")


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _sections(part)


def refused(path: str) -> bool:
    """Fields of which only one value is modelled."""
    return path in MODELLED and len(MODELLED[path]) == 1


def test_every_field_of_the_run_file_is_accounted_for() -> None:
    dimensions = (f"workload.model.{name}" for name in (*DIMENSIONS, *FAMILY_DIMENSIONS))
    known = {*RUN_FIELDS, *FAMILY_FIELDS, *dimensions, *NO_EFFECT}
    missing = [path for path in run_fields() if path not in known and not refused(path)]
    assert missing == []
    assert sorted(known - set(run_fields())) == []


@pytest.mark.parametrize("path", RUN_FIELDS)
def test_a_field_of_the_run_file_changes_the_result(path: str) -> None:
    value, *context = RUN_FIELDS[path]
    assert result_of((*context, f"{path}={value}")) != result_of(tuple(context))


@pytest.mark.parametrize("name", DIMENSIONS)
def test_a_dimension_changes_the_result(name: str) -> None:
    base: dict[str, object] = dict(GPT) if name in ("max_positions", "tied_embeddings") else dict(LLAMA)
    value = False if base is not LLAMA and name == "tied_embeddings" else DIMENSIONS[name]
    if name in ("attn_type", "family"):
        base.pop("kv_heads", None)
        changed = {**base, name: "mqa" if name == "attn_type" else value}
    else:
        changed = {**base, name: value}
    assert result_of((), changed) != result_of((), base)


@pytest.mark.parametrize("name", FAMILY_DIMENSIONS)
def test_a_dimension_of_some_families_changes_the_result(name: str) -> None:
    base, value = FAMILY_DIMENSIONS[name]
    assert result_of((), {**base, name: value}) != result_of((), base)


@pytest.mark.parametrize("path", FAMILY_FIELDS)
def test_a_field_of_some_families_changes_the_result(path: str) -> None:
    model, (value, *context) = FAMILY_FIELDS[path]
    assert result_of((*context, f"{path}={value}"), model) != result_of(tuple(context), model)


# Stacks: fact -> another value, and the run that shows it.

ONE = ("system.devices=1",)
REPLICATED = ("parallel.zero=0", "training.precision=bf16")
COMPILED = ("training.compile=true",)
TENSOR = ("parallel.zero=0", "parallel.tensor=2")
PIPELINE = ("parallel.zero=0", "parallel.pipeline=3", "system.devices=24")
HOPPER_FLASH = ByArchitecture("flash-2")
STACK_FACTS: dict[str, tuple[object, tuple[str, ...]]] = {
    "attention": (HOPPER_FLASH, ()),
    "attention_unpadded": (True, ("training.attention=flash-2",)),
    "repeat_kv": (True, ()),
    "rms_norm_fused": (False, ()),
    "masked_softmax_longest": (512, ("training.attention=unfused",)),
    "dropout_add_fused": (True, ("training.dropout=0.1",)),
    "rotary_fused": (True, ()),
    "cross_entropy_fused": (True, ()),
    "cross_entropy_format": ("compute", ()),
    "logged_losses": (2, ()),
    "compile_scope": ("block", COMPILED),
    "compile_loss": (True, COMPILED),
    "autocast_norm_format": ("compute", REPLICATED),
    "mixed_precision_sharded": ("autocast", ()),
    "mixed_precision_replicated": ("master_weights", REPLICATED),
    "parameter_gather_format": ("fp32", ()),
    "gradient_reduce_format": ("compute", ()),
    "fp8_recipe": ("current", ("training.precision=fp8",)),
    "loss_scaling": ("none", ("training.precision=fp16",)),
    "gradient_format": ("compute", ()),
    "forward_prefetch": (True, ()),
    "backward_prefetch": ("none", ()),
    "gathers_in_flight": (1, ()),
    "reductions_in_flight": (0, ()),
    "reshard_root": (True, ()),
    "reshard_last_block": (False, ()),
    "collectives_serialised": (False, ()),
    "gather_copies": (3, ()),
    "gradient_copies": (3, ()),
    "sharded_reduce_each_micro_step": (False, ()),
    "replicated_reduce_each_micro_step": (True, REPLICATED),
    "compiled": (True, ()),
    "dropout": (0.1, ()),
    "sequence_parallel": (True, TENSOR),
    "gradients_overlap": (False, ()),
    "parameters_overlap": (False, ()),
    "tensor_overlap": (True, (*TENSOR, "parallel.sequence=true")),
    "tensor_overlap_backward": (True, TENSOR),
    "sequence_gathered_again": (True, (*TENSOR, "parallel.sequence=true")),
    "vocabulary_multiple": (640, TENSOR),
    "pipeline_messages_overlap": (True, (*STAGES, "parallel.virtual_stages=2")),
    "pipeline_messages_sharded": (True, (*PIPELINE, *TENSOR)),
    "gradient_buffer": ("fp32", ("parallel.zero=1", "training.precision=bf16")),
    "gradient_accumulation_fused": (True, ("parallel.zero=1", "training.precision=bf16")),
    "bucket_bytes": (2**21, REPLICATED),
    "first_bucket_bytes": (2**14, REPLICATED),
    "bucket_views": (True, REPLICATED),
    "optimizer_kernel": ("fused", ()),
    "optimizer_syncs": (True, ()),
    "gradient_clipping": (False, ()),
    "host_forward_s": (20e-6, ()),
    "host_backward_s": (20e-6, ()),
    "host_optimizer_s": (20e-6, ()),
    "host_compiled_s": (20e-6, COMPILED),
    "host_unit_s": (50e-6, ()),
    "launch_s": (50e-6, ()),
    "syncs_each_step": (False, ()),
    "syncs_each_micro_step": (True, ()),
    "allocation_unit_bytes": (2**16, ()),
    "blas_workspace_bytes": (ByArchitecture(2**26), ()),
    "context_bytes": (ByArchitecture(2**30), ()),
    "driver_bytes": (ByArchitecture(2**30), ()),
    "communicator_bytes": (2**30, ()),
}
MASTERS: dict[str, object] = {"mixed_precision_replicated": "master_weights"}
BESIDE: dict[str, dict[str, object]] = {  # what else the stack must do for a fact to matter
    "gradient_buffer": MASTERS,
    "gradient_accumulation_fused": {**MASTERS, "gradient_buffer": "fp32"},
}
ABOUT_THE_FILE = ("name", "title", "sources", "assumed")


def test_every_fact_of_a_stack_is_accounted_for() -> None:
    assert {f.name for f in dataclasses.fields(Stack)} == {*STACK_FACTS, *ABOUT_THE_FILE}


@pytest.mark.parametrize("fact", STACK_FACTS)
def test_a_fact_of_a_stack_changes_the_result(fact: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value, context = STACK_FACTS[fact]
    stack = dataclasses.replace(stacks.load("pytorch"), **BESIDE.get(fact, {}))  # type: ignore[arg-type]
    models = (LLAMA, GPT, LARGE)
    assert getattr(stack, fact) != value
    monkeypatch.setattr(stacks, "load", lambda name: stack)
    before = [result_of(context, model) for model in models]
    other = dataclasses.replace(stack, **{fact: value})  # type: ignore[arg-type]
    monkeypatch.setattr(stacks, "load", lambda name: other)
    assert [result_of(context, model) for model in models] != before


# Accelerator files: every number of one, a quarter larger (or smaller, where it is a share of one).

CHIP = "h100-sxm-80gb"
CHIP_NO_EFFECT = {
    r"name|title|architecture|process|sources\..*": "describe it",
    r"peaks\..*": "published, for cosim hw check",
    r"area\..*": "of what a device takes to make; tests/hwmodels/test_area.py",
    r"calibration\.memory\.row": "norms and softmax of these runs are limited by instructions",
    r"matrix\.unit|.*\.technology|.*\.topology|.*\.stacks": "say what it is made of, numbers what it does",
    r"matrix\.structured_sparsity": "no technique prunes weights yet",
    r"vector\.formats\.(fp64|bf16|fp16)|power\.energy_per_flop\.fp64": "no op computes in it on the lanes",
    r"links\.host\..*": "nothing is offloaded yet",
}
CHIP_CONTEXT: dict[str, tuple[str, ...]] = {
    r".*tf32.*": ("training.precision=tf32",),
    r".*\.fp8": ("training.precision=fp8",),
    r".*\.int8": ("training.precision=int8",),
    r"(matrix|power).*\.fp16": ("training.precision=fp16",),
    r".*fabric\.p2p_.*": (*STAGES, "system.devices=8"),
    r".*network\.p2p_.*": (*STAGES, "system.devices_per_node=1"),
    r".*\.head_256": ("workload.model.head_dim=256",),
    r"power\.energy_per_flop\.fp32": ("training.precision=fp32",),
    r"power\.(limit|lowest_clock)": ("system.accelerator.set.power.limit=120 W",),
    r".*fabric.*": ("system.devices=8",),
    r".*links\.network.*": ("system.devices_per_node=1",),
}


def chip_numbers() -> dict[str, tuple[str, str]]:
    """Path in the accelerator's file -> two values, a smaller and a larger one where it may be larger."""
    found: dict[str, tuple[str, str]] = {}

    def walk(node: object, path: str) -> None:
        if isinstance(node, Mapping) and "value" not in node:
            for key, inner in node.items():
                if key not in ("source", "sources", "note", "derived", "assumed", "fitted_on"):
                    walk(inner, f"{path}.{key}" if path else str(key))
            return
        value = node["value"] if isinstance(node, Mapping) else node
        number = re.match(r"([\d.]+(?:e-?\d+)?)(.*)$", str(value))
        if number is None:
            return
        old, unit = float(number[1]) or 100.0, number[2]
        share = 0.4 < old <= 1 and not unit
        whole = re.fullmatch(r"\d+", number[1]) and not unit and not share
        smaller, larger = (0.5 * old, min(1.0, 1.2 * old)) if share else (0.5 * old, 1.5 * old)
        texts = [str(round(new)) if whole else f"{new:.6g}" for new in (smaller, larger)]
        found[path] = (texts[0] + unit, texts[1] + unit)

    walk(load_raw(CHIP), "")
    return found


CHIP_NUMBERS = chip_numbers()


def without_effect(path: str) -> bool:
    return any(re.fullmatch(pattern, path) for pattern in CHIP_NO_EFFECT)


@pytest.mark.parametrize("path", [path for path in CHIP_NUMBERS if not without_effect(path)])
def test_a_number_of_an_accelerator_changes_the_result(path: str) -> None:
    attention = re.match(r"calibration\.attention\.([a-z0-9-]+)\.", path)
    context = next((more for pattern, more in CHIP_CONTEXT.items() if re.fullmatch(pattern, path)), ())
    context = (*context, f"training.attention={attention[1]}") if attention else context
    for model in (LARGE, LLAMA):
        for value in CHIP_NUMBERS[path]:
            if result_of((*context, f"system.accelerator.set.{path}={value}"), model) != result_of(context, model):
                return
    pytest.fail(f"{path}: {' and '.join(CHIP_NUMBERS[path])} change nothing")
