"""The peak of the trace's memory against that of a real training step on this machine's CPU.

The real step is the second one of forward, loss, backward, clipping and AdamW, with gradients given up afterwards. Its
memory is every byte that PyTorch's CPU allocator hands out and takes back, by the profiler's allocation events, from
before the module was built. The trace's memory is what its storages hold, each from the operator that makes it to the
one after which PyTorch gives it up. Both count bytes as asked for, without an allocator's rounding (64 on a CPU).

Both run the same operators (`cuda_operators`), attention with its scores in memory. Where an operator of this project
runs as its plain implementation (norms, experts, attention in a module that brings its own), what that allocates and
gives back before it returns stands for the registers and shared memory of one kernel, and is counted apart.
"""

from __future__ import annotations

import io
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cosim.graph import Category, OpGraph, Phase
from cosim.memory import held
from cosim.trace import TraceOptions, trace
from cosim.trace.step import Progress
from hwmodels.units import InputError
from workloads.model import HuggingFaceModel, Model, PythonModel, from_dimensions

if TYPE_CHECKING:
    from rich.table import Table

BOUND = 0.03
"""How far a predicted peak may be from the measured one."""
CATEGORIES = tuple(category for category in Category if category != Category.FRAMEWORK)
PHASES = (Phase.FORWARD, Phase.BACKWARD, Phase.OPTIMIZER)
_LIVES_ON = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class Peak:
    """Most bytes alive at once: in all, by category at that time, in each phase."""

    total: int
    categories: Mapping[Category, int]
    phases: Mapping[Phase, int]

    @property
    def phase(self) -> Phase:
        """When the peak is reached."""
        return max(self.phases, key=lambda phase: self.phases[phase])


@dataclass(frozen=True, slots=True)
class Case:
    """One model: its recipe, and the peaks of a real step and of its trace."""

    name: str
    options: TraceOptions
    parameters: int
    measured: Peak
    predicted: Peak
    inside_operators: int  # bytes by which the measured peak is higher with what operators allocate for themselves

    @property
    def error(self) -> float:
        """Predicted over measured peak, minus 1."""
        return self.predicted.total / self.measured.total - 1

    def phase_error(self, phase: Phase) -> float:
        """The same for the peak within one phase."""
        return self.predicted.phases[phase] / self.measured.phases[phase] - 1

    @property
    def good(self) -> bool:
        """Whether the peak is within the bound."""
        return abs(self.error) <= BOUND


_RECIPES: Mapping[str, tuple[Mapping[str, object], Mapping[str, Any]]] = {
    "gpt": (
        {"family": "gpt", "layers": 4, "hidden": 128, "heads": 4, "vocab": 500, "max_positions": 256},
        {"batch": 2, "sequence": 256, "dropout": 0.1},
    ),
    "llama": (
        {"family": "llama", "layers": 4, "hidden": 128, "heads": 8, "kv_heads": 2, "ffn": 352, "vocab": 2000},
        {"batch": 4, "sequence": 128},
    ),
    "llama, bf16": (
        {"family": "llama", "layers": 4, "hidden": 128, "heads": 8, "kv_heads": 2, "ffn": 352, "vocab": 500},
        {"batch": 4, "sequence": 128, "parameter_format": "bf16"},
    ),
    "bert": (
        {"family": "bert", "layers": 3, "hidden": 128, "heads": 4, "vocab": 1000, "max_positions": 128},
        {"batch": 8, "sequence": 64, "dropout": 0.1},
    ),
    "t5": (
        {"family": "t5", "layers": 2, "hidden": 128, "heads": 4, "vocab": 300},
        {"batch": 4, "sequence": 128},
    ),
    "vit": (
        {"family": "vit", "layers": 4, "hidden": 128, "heads": 4, "image_size": 64, "patch_size": 8, "classes": 100},
        {"batch": 8, "dropout": 0.1},
    ),
    "moe": (
        {"family": "moe", "layers": 3, "hidden": 128, "heads": 4, "kv_heads": 2, "vocab": 300}
        | {"num_experts": 8, "experts_per_token": 2, "moe_ffn": 192, "shared_experts": 1, "dense_layers": 1},
        {"batch": 1, "sequence": 64, "optimizer_implementation": "foreach"},
    ),
}
_LLAMA = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}


def models(pattern: str = "") -> Iterator[tuple[str, Model, TraceOptions]]:
    """(name, model, recipe) of every case whose name contains `pattern`; all in fp32 but where the name says so."""
    for name, (dimensions, recipe) in _RECIPES.items():
        model = from_dimensions(dimensions)
        sequence = model.image_tokens or recipe["sequence"]
        yield from _chosen(name, pattern, model.for_workload(sequence), {**recipe, "sequence": sequence})
    hugging_face = HuggingFaceModel("LlamaForCausalLM", {**_LLAMA, "num_key_value_heads": 2, "vocab_size": 800})
    yield from _chosen("LlamaForCausalLM", pattern, hugging_face, {"batch": 2, "sequence": 192})
    encoder = PythonModel("workloads.encoder:build", {"layers": 3, "hidden": 128, "heads": 4, "vocab": 400})
    yield from _chosen("torch.nn.TransformerEncoder", pattern, encoder, {"batch": 2, "sequence": 160})


def _chosen(
    name: str, pattern: str, model: Model, recipe: Mapping[str, Any]
) -> Iterator[tuple[str, Model, TraceOptions]]:
    if pattern in name:
        yield name, model, TraceOptions(attention="unfused", **recipe)


def check(pattern: str = "", progress: Progress | None = None) -> list[Case]:
    """Every case that `models` names. Raises InputError if there is none, or if a model cannot be traced."""
    chosen = list(models(pattern))
    if not chosen:
        known = ", ".join(name for name, _, _ in models())
        raise InputError(f"validate memory: no model has {pattern[:80]!r} in its name; there are {known}")
    cases = []
    for number, (name, model, options) in enumerate(chosen):
        if progress is not None:
            progress(f"a step of {name}", number / len(chosen))
        cases.append(case(name, model, options))
    return cases


def case(name: str, model: Model, options: TraceOptions) -> Case:
    """Trace one model, and run it."""
    graph = trace(model, options)
    allocations, marks = _run(model, options)
    measured = _peak(allocations, marks)
    everything = _peak(allocations, marks, inside=True)
    return Case(name, options, graph.parameter_count(), measured, predicted(graph), everything.total - measured.total)


def predicted(graph: OpGraph) -> Peak:
    """The peak of a traced step: parameters, optimizer state and inputs are there from the beginning."""
    op = np.concatenate([np.maximum(graph.storage_alloc, 0), graph.storage_free + 1])
    category, size = graph.storage_category, graph.storage_bytes
    begins = {phase: np.flatnonzero(graph.op_phase == phase) for phase in PHASES}
    spans = {phase: (int(ops[0]), int(ops[-1]) + 1) for phase, ops in begins.items()}
    return _highest(op, np.concatenate([category, category]), np.concatenate([size, -size]), spans)


def _highest(
    moment: NDArray[np.int64],
    category: NDArray[Any],
    delta_bytes: NDArray[np.int64],
    spans: Mapping[Phase, tuple[int, int]],
) -> Peak:
    """The peak within the phases, each from its first moment to before its second; at one moment, frees come first."""
    order = np.lexsort((delta_bytes, moment))
    moment, category, delta_bytes = moment[order], category[order], delta_bytes[order]
    total = np.concatenate([[0], np.cumsum(delta_bytes)])
    phases, when = {}, {}
    for phase, (first, last) in spans.items():
        # what is there as the phase begins, and after each of its changes
        start, stop = np.searchsorted(moment, [first, last]).tolist()
        when[phase] = start + int(total[start : stop + 1].argmax())
        phases[phase] = int(total[when[phase]])
    peak = max(phases, key=lambda phase: phases[phase])
    at_peak = held(category, delta_bytes, len(Category), np.array([when[peak]]))[:, 0]
    return Peak(phases[peak], {name: int(at_peak[name]) for name in CATEGORIES}, phases)


@dataclass(frozen=True, slots=True)
class _Allocations:
    """Rows of what the allocator handed out: how much, from when to when (ns), for what, inside one operator or not."""

    size: NDArray[np.int64]
    start: NDArray[np.int64]
    end: NDArray[np.int64]
    category: NDArray[np.int64]
    inside: NDArray[np.bool_]


def _peak(rows: _Allocations, marks: Mapping[Phase, tuple[int, int]], inside: bool = False) -> Peak:
    """The peak between the beginning of forward and the end of the optimizer."""
    kept = np.flatnonzero(~rows.inside | inside)
    size, category = rows.size[kept], rows.category[kept]
    time = np.concatenate([rows.start[kept], rows.end[kept]])
    return _highest(time, np.concatenate([category, category]), np.concatenate([size, -size]), marks)


def _run(model: Model, options: TraceOptions) -> tuple[_Allocations, dict[Phase, tuple[int, int]]]:
    """Two real steps under the profiler; what was allocated and when each phase of the second began and ended (ns)."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler reports its start and stop, if torch is new
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    from cosim.trace.replacements import cuda_operators
    from workloads.training import loss_of_output

    with cuda_operators(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        module, inputs, labels = _built(model, options)
        fused = options.implementation == "fused"
        optimizer = torch.optim.AdamW(module.parameters(), fused=fused, foreach=not fused)
        places: dict[Category, set[int]] = {}
        for _ in range(2):
            with record_function(_mark(Phase.FORWARD)):
                loss = loss_of_output(module(**inputs) if isinstance(inputs, Mapping) else module(*inputs), labels)
            with record_function(_mark(Phase.BACKWARD)):
                loss.backward()  # type: ignore[no-untyped-call]
                del loss
            places[Category.GRADIENTS] = _places(p.grad for p in module.parameters() if p.grad is not None)
            with record_function(_mark(Phase.OPTIMIZER)):
                torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0, foreach=True)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        state = [value for values in optimizer.state.values() for value in values.values()]
        places[Category.WEIGHTS] = _places((*module.parameters(), *module.buffers()))
        places[Category.OPTIMIZER] = _places(value for value in state if isinstance(value, torch.Tensor))
    results: Any = profiler.profiler.kineto_results
    marks = {}
    for phase in PHASES:
        spans = [(e.start_ns(), e.end_ns()) for e in results.events() if e.name() == _mark(phase)]
        marks[phase] = max(spans)
    return _allocations(results, marks, places), marks


def _mark(phase: Phase) -> str:
    return f"cosim: {phase.name.lower()}"


def _places(tensors: Any) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def _built(model: Model, options: TraceOptions) -> tuple[Any, Any, Any]:
    """The module in the options' format, and random inputs and labels; integers are 0 or 1, which any table has."""
    import torch

    from workloads.build import build_module

    torch.manual_seed(0)
    with _default_format(options.parameter_format):
        attention: Any = options.attention
        module = build_module(model, attention=attention, dropout=options.dropout, seq_len=options.sequence).train()
        tokens = torch.zeros((options.batch, options.sequence), dtype=torch.int64)
        example, own = (getattr(module, f"example_{kind}", None) for kind in ("inputs", "labels"))
        inputs = example(options.batch, options.sequence) if callable(example) else (tokens,)
        labels = own(options.batch, options.sequence) if callable(own) else tokens.clone()
    for tensor in (*(inputs.values() if isinstance(inputs, Mapping) else inputs), labels):
        tensor.normal_() if tensor.is_floating_point() else tensor.random_(2)
    return module, inputs, labels


@contextmanager
def _default_format(name: str) -> Iterator[None]:
    import torch

    from cosim.trace.optimizer import DTYPES

    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[name])
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _allocations(
    results: Any, marks: Mapping[Phase, tuple[int, int]], places: Mapping[Category, set[int]]
) -> _Allocations:
    """The profiler's events of allocating and freeing, paired by address."""
    rows: list[list[int]] = []  # size, start, end, address, end of the operator that it was allocated in or -1
    living: dict[int, int] = {}
    for event, operator_end in sorted(_events(results.experimental_event_tree()), key=lambda e: e[0].start_time_ns):
        allocation = event.typed[1]
        if allocation.alloc_size > 0:
            living[allocation.ptr] = len(rows)
            rows.append([allocation.alloc_size, event.start_time_ns, _LIVES_ON, allocation.ptr, operator_end])
        elif allocation.ptr in living:
            rows[living.pop(allocation.ptr)][2] = event.start_time_ns
    size, start, end, _, operator_end = np.array(rows, dtype=np.int64).T
    category = [_category(row[3], row[1], row[2], marks, places) for row in rows]
    return _Allocations(size, start, end, np.array(category), end <= operator_end)


def _category(
    place: int, start: int, end: int, marks: Mapping[Phase, tuple[int, int]], places: Mapping[Category, set[int]]
) -> Category:
    """What an allocation is for, as a trace sorts its storages; what exists before the step and is no weight and no
    optimizer state is an input.
    """
    backward, updating = marks[Phase.BACKWARD][0], marks[Phase.OPTIMIZER][0]
    if start < marks[Phase.FORWARD][0]:
        known = (Category.WEIGHTS, Category.OPTIMIZER)
        return next((category for category in known if place in places[category]), Category.INPUTS)
    if start < updating < end and place in places[Category.GRADIENTS]:
        return Category.GRADIENTS
    return Category.ACTIVATIONS if start < backward < end else Category.TEMPORARY


def _events(tree: Sequence[Any], operator_end: int = -1) -> Iterator[tuple[Any, int]]:
    """(event, end of the operator of this project around it or -1) of every allocation below `tree`."""
    from torch._C._profiler import _EventType

    for event in tree:
        if event.typed[0] == _EventType.Allocation:
            yield event, operator_end
        own = operator_end < 0 and event.name.startswith("cosim::")
        yield from _events(event.children, event.end_time_ns if own else operator_end)


def tables(cases: Sequence[Case]) -> list[Table]:
    """The peaks, and what they are made of."""
    from rich import box
    from rich.table import Table

    peaks = Table(title="Peak of a training step, bytes", title_justify="left", box=box.MARKDOWN)
    parts = Table(title="At the peak, bytes", title_justify="left", box=box.MARKDOWN)
    peaks.add_column("model", no_wrap=True)
    parts.add_column("model", no_wrap=True)
    for name in ("batch x seq", "parameters", "measured", "predicted", "error", "peak in"):
        peaks.add_column(name, justify="right", no_wrap=True)
    for name in (*(f"{phase.name.lower()} error" for phase in PHASES), "inside operators"):
        peaks.add_column(name, justify="right", min_width=9)
    parts.add_column("")
    for category in CATEGORIES:
        parts.add_column(category.name.lower(), justify="right")
    for row in cases:
        options, measured = row.options, row.measured
        peaks.add_row(
            *(row.name, f"{options.batch} x {options.sequence}", f"{row.parameters:,}"),
            *(f"{measured.total:,}", f"{row.predicted.total:,}", f"{row.error:+.3%}", measured.phase.name.lower()),
            *(f"{row.phase_error(phase):+.3%}" for phase in PHASES),
            f"{row.inside_operators:,}",
            style="" if row.good else "red",
        )
        for word, peak in (("measured", measured), ("predicted", row.predicted)):
            parts.add_row(row.name, word, *(f"{peak.categories[category]:,}" for category in CATEGORIES))
    return [peaks, parts]


def markdown(cases: Sequence[Case], arguments: Sequence[str]) -> str:
    """The tables as a page that says how they were made; `arguments` are those of the command that makes it."""
    import torch
    from rich.console import Console

    command = " ".join(["cosim validate memory", *filter(None, arguments)])
    worst = max(abs(row.error) for row in cases)
    text = [f"# Peak memory of the trace against a real step\n\n`{command}`, {_versions(torch.__version__)}\n\n{_HOW}"]
    text.append(f"Largest error of a peak: {worst:.3%} (bound: {BOUND:.0%}).\n")
    for table in tables(cases):
        text.append(f"## {table.title}\n")
        table.title = None
        page = io.StringIO()
        Console(file=page, width=300, color_system=None).print(table)
        text.append("\n".join(line.strip() for line in page.getvalue().splitlines() if line.strip()) + "\n")
    return "\n".join(text)


def _versions(torch: str) -> str:
    return f"PyTorch {torch}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"


_HOW = """\
Measured: the second training step (forward, loss, backward, clipping, AdamW, gradients given up) on a CPU, by the
allocation events of PyTorch's profiler from before the module was built. Predicted: the storages of the trace of the
same module and recipe, each alive from the operator that makes it to the one after which PyTorch gives it up. Bytes
as asked for, without an allocator's rounding (64 bytes on a CPU, 512 on CUDA). Formats are fp32 where the name says
nothing. AdamW is fused; for moe it is foreach, whose temporaries then are the peak.

Both run the operators that a CUDA device would run, where PyTorch's CPU would take others (dropout, RMSNorm), and
compute attention with its scores in memory. torch.nn.TransformerEncoder calls PyTorch's attention itself, which runs
as this project's operator. What a plain implementation of such an operator allocates and gives back before it returns
stands for the inside of one kernel. It is left out; "inside operators" is by how much it would raise the measured
peak.

Not compared: autocast by CUDA's rules, for which PyTorch's CPU lacks a kernel, and attention without scores in
memory.
"""
