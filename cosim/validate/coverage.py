"""Every family and Hugging Face class, traced and counted: unknown operators, FLOP and parameters against PyTorch.

FLOP are compared with torch.utils.flop_counter on the same module (attention in full, without its causal half), and
parameters with the module's own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cosim.trace import TraceOptions, trace
from cosim.trace.step import Progress
from cosim.trace.vocabulary import flops, kind_bytes
from hwmodels.units import InputError
from workloads import named
from workloads.model import HuggingFaceModel, Model, ModelConfig, PythonModel, from_dimensions

if TYPE_CHECKING:
    from rich.console import Console

    from cosim.graph import OpGraph

FLOPS_BOUND = 0.005
"""How far the traced FLOP may be from PyTorch's counter."""
_BATCH = 2
_SEQUENCE = {"tiny": 64, "real": 512}


@dataclass(frozen=True, slots=True)
class Coverage:
    """What became of one model; `problem` is the sentence of a model that cannot be traced."""

    name: str
    ops: int = 0
    unknown: Mapping[str, int] | None = None
    unknown_share: float = 0.0  # of the bytes that all operators move
    flops: float = 0.0
    counted_flops: float = 0.0
    parameters: int = 0
    counted_parameters: int = 0
    trace_s: float = 0.0
    problem: str = ""

    @property
    def flops_error(self) -> float:
        """Traced over counted FLOP, minus 1."""
        return self.flops / self.counted_flops - 1.0 if self.counted_flops else 0.0

    @property
    def good(self) -> bool:
        """Traced, nothing unknown of weight, FLOP and parameters as PyTorch counts them."""
        counted = abs(self.flops_error) <= FLOPS_BOUND and self.parameters == self.counted_parameters
        return not self.problem and counted and self.unknown_share <= 0.01


_WIDTHS = {"hidden": 64, "heads": 4, "layers": 2}
_EXPERTS = {"num_experts": 4, "experts_per_token": 2, "moe_ffn": 48, "vocab": 300}
_FAMILIES: Mapping[str, Mapping[str, object]] = {
    "gpt": {"vocab": 300, "max_positions": 64},
    "llama": {"vocab": 300, "kv_heads": 2},
    "bert": {"vocab": 300, "max_positions": 64},
    "t5": {"vocab": 300},
    "vit": {"image_size": 32, "patch_size": 8, "classes": 10},
    "moe": {**_EXPERTS, "kv_heads": 2, "shared_experts": 1, "dense_layers": 1, "layers": 3},
    "moe, latent": {**_EXPERTS, "mla": "q_lora=24;kv_lora=16;qk_nope=8;qk_rope=4;v=8"},
}
_REAL = ("gpt2-xl", "llama3-8b", "bert-large", "t5-large", "vit-l16", "mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v2")

_TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 300,
}
_GROUPED = {**_TINY, "num_key_value_heads": 2}
_HUGGING_FACE: Mapping[str, Mapping[str, object]] = {
    "GPT2LMHeadModel": {"n_embd": 64, "n_layer": 2, "n_head": 4},
    "LlamaForCausalLM": _GROUPED,
    "BertForMaskedLM": _TINY,
    "BertForPreTraining": _TINY,
    "ViTForImageClassification": {k: v for k, v in _TINY.items() if k != "vocab_size"}
    | {"image_size": 32, "patch_size": 8},
    "T5ForConditionalGeneration": {
        "d_model": 64,
        "d_ff": 96,
        "d_kv": 16,
        "num_layers": 2,
        "num_heads": 4,
        "vocab_size": 300,
    },
    "MixtralForCausalLM": {**_GROUPED, "num_local_experts": 4},
    "Qwen2ForCausalLM": _GROUPED,
    "Qwen3ForCausalLM": {**_GROUPED, "head_dim": 16},
    "Qwen3MoeForCausalLM": {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    "GemmaForCausalLM": {**_GROUPED, "head_dim": 16},
    "Gemma2ForCausalLM": {**_GROUPED, "head_dim": 16},
}
_ENCODER = "torch.nn.TransformerEncoder"


def models(size: str, pattern: str = "") -> Iterator[tuple[str, Model]]:
    """(name, model) of every family, class and module, `size` tiny or real; only names that contain `pattern`.

    Real ones are named configurations and what the classes' configurations are by default.
    """
    if size == "tiny":
        for name, given in _FAMILIES.items():
            if pattern in name:
                config = from_dimensions({"family": name.partition(",")[0], **_WIDTHS, **given})
                yield name, config.for_workload(_SEQUENCE[size])
    else:
        for name in _REAL:
            if pattern in name:
                yield name, named.load(name).for_workload(_SEQUENCE[size])
    for name, settings in _HUGGING_FACE.items():
        if pattern in name:
            yield name, HuggingFaceModel(name, settings if size == "tiny" else {})
    if pattern in _ENCODER:
        widths = {} if size == "tiny" else {"layers": 24, "hidden": 1024, "heads": 16, "vocab": 30522}
        yield _ENCODER, PythonModel("workloads.encoder:build", widths)


def check(size: str, pattern: str = "", progress: Progress | None = None) -> list[Coverage]:
    """What became of every model that `models` names. Raises InputError if none does."""
    chosen = list(models(size, pattern))
    if not chosen:
        known = ", ".join(name for name, _ in models(size))
        raise InputError(f"workload check: no family or class has {pattern[:80]!r} in its name; there are {known}")
    rows = []
    for number, (name, model) in enumerate(chosen):
        if progress is not None:
            progress(f"tracing {name}", number / len(chosen))
        rows.append(cover(name, model, size))
    return rows


def cover(name: str, model: Model, size: str) -> Coverage:
    """Trace one model and count it with PyTorch."""
    sequence = _SEQUENCE[size]
    if isinstance(model, ModelConfig) and model.image_tokens:
        sequence = model.image_tokens
    start = time.perf_counter()
    try:
        graph = trace(model, TraceOptions(batch=_BATCH, sequence=sequence))
        seconds = time.perf_counter() - start
        counted_flops, counted_parameters = _counted(model, sequence)
    except InputError as error:
        return Coverage(name, problem=str(error), trace_s=time.perf_counter() - start)
    return Coverage(
        name,
        ops=len(graph),
        unknown=dict(graph.unknown_ops),
        unknown_share=_unknown_share(graph),
        flops=sum(flops(graph, halve_causal=False)),
        counted_flops=counted_flops,
        parameters=graph.parameter_count(),
        counted_parameters=counted_parameters,
        trace_s=seconds,
    )


def _unknown_share(graph: OpGraph) -> float:
    moved = [sum(kind_bytes(graph, kind)) for kind in graph.kinds]
    total = sum(moved[kind] for kind in graph.op_kind.tolist())
    unknown = sum(moved[kind] for kind in graph.op_kind.tolist() if graph.kinds[kind].op_class == "unknown")
    return unknown / total if total else 0.0


def _counted(model: Model, sequence: int) -> tuple[float, int]:
    """(FLOP of forward and backward by torch.utils.flop_counter, parameters) of the module on fake tensors."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    from cosim.trace.replacements import cuda_operators
    from workloads.build import build_module
    from workloads.training import loss_of_output

    def attention(q: Any, k: Any, v: Any, *_a: Any, **_k: Any) -> int:
        return int(sdpa_flop_count(q, q[:2] + k[2:], q[:2] + v[2:]))  # type: ignore[no-untyped-call]

    def attention_backward(grad: Any, q: Any, k: Any, v: Any, *_a: Any, **_k: Any) -> int:
        return int(sdpa_backward_flop_count(grad, q, q[:2] + k[2:], q[:2] + v[2:]))  # type: ignore[no-untyped-call]

    def grouped(x: Any, other: Any, *_a: Any, **_k: Any) -> int:
        return int(2 * x[0] * x[1] * other[-1])

    known = {
        torch.ops.cosim.attention: attention,
        torch.ops.cosim.attention_backward: attention_backward,
        torch.ops.cosim.grouped_mm: grouped,
        torch.ops.cosim.grouped_mm_weight: grouped,
    }
    with FakeTensorMode(allow_non_fake_inputs=True), cuda_operators():
        module = build_module(model, seq_len=sequence).train()
        example, own = (getattr(module, f"example_{kind}", None) for kind in ("inputs", "labels"))
        tokens = torch.zeros((_BATCH, sequence), dtype=torch.int64)
        inputs = example(_BATCH, sequence) if callable(example) else (tokens,)
        labels = own(_BATCH, sequence) if callable(own) else tokens
        with FlopCounterMode(display=False, custom_mapping=known) as counter:
            output = module(**inputs) if isinstance(inputs, Mapping) else module(*inputs)
            loss_of_output(output, labels).backward()  # type: ignore[no-untyped-call]
        return float(counter.get_total_flops()), sum(p.numel() for p in module.parameters())


def print_coverage(rows: list[Coverage], console: Console) -> None:
    """The table, and the sentence of each model that cannot be traced."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("model")
    for name in ("ops", "unknown", "FLOP", "against counter", "parameters", "against module", "trace s"):
        table.add_column(name, justify="right")
    for row in rows:
        if row.problem:
            table.add_row(row.name, "cannot be traced", style="red")
            continue
        table.add_row(
            row.name,
            str(row.ops),
            f"{sum((row.unknown or {}).values())} ({row.unknown_share:.1%})" if row.unknown else "0",
            f"{row.flops:.4g}",
            f"{row.flops_error:+.2%}",
            f"{row.parameters:,}",
            "same" if row.parameters == row.counted_parameters else f"{row.counted_parameters:,}",
            f"{row.trace_s:.1f}",
        )
    console.print(table)
    for row in rows:
        if row.problem:
            console.print(f"{row.name}: {row.problem}", highlight=False)
        for target, count in (row.unknown or {}).items():
            console.print(f"{row.name}: unknown operator {target}, {count} times", highlight=False)
