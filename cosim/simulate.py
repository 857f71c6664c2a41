"""The one call: a run file's content in, a result out; this page reads like the list of rooms that the data visits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from cosim import engine, stacks, trace
from cosim.engine.program import Program
from cosim.footprint import device_memory
from cosim.graph import OpGraph
from cosim.mapping.builder import LONGEST_S, too_long
from cosim.mapping.collectives import with_collectives
from cosim.mapping.pricing import Kernels, Prices, attention_algorithm, price
from cosim.mapping.program import program_of
from cosim.parallel.divide import DividedStep, Stage, divide
from cosim.played import Played, RankPart
from cosim.remedies import remedy
from cosim.replicas import beside_each_other, micro_steps_played, replicas_played
from cosim.result import Result
from cosim.spec import RunSpec
from cosim.spec.reliability import SlowDevice
from cosim.spec.sections import EveryBlocks
from cosim.stacks.stack import Stack
from cosim.summary import summarize
from cosim.techniques import optimizers, precision, recipes
from cosim.techniques.fusion import HandFused, fuse, fuse_by_hand
from cosim.techniques.gradient_buffer import buffer_gradients
from cosim.techniques.precision import Precision
from cosim.techniques.quantization import quantize
from cosim.techniques.recompute import recompute
from cosim.trace import TraceOptions
from cosim.trace.vocabulary import flops
from hwmodels import accelerator as accelerators
from hwmodels.accelerator import Accelerator
from hwmodels.cluster import Cluster
from hwmodels.units import InputError

Progress = Callable[[str, float | None], None]
_SECTIONS = ("workload", "system", "parallel", "training")
CLOCK_ROUNDS = 3


def simulate(spec: RunSpec, progress: Progress | None = None, unfold: bool = False) -> Result:
    """Simulate one training step of `spec`.

    `progress` is told what is being done, with the fraction done where it is known. With `unfold` every data-parallel
    replica is played instead of one for all. Raises InputError where the traced model or the accelerator shows that the
    run cannot be; a run that does not fit in memory is not an error, its result says so.
    """
    played = _played(spec, progress, unfold)

    def device_bytes_of(other: RunSpec) -> float:
        return device_memory(_played(other, None)).total

    offered = device_memory(played).offered
    return summarize(played, lambda needed: remedy(spec, needed, offered, device_bytes_of))


def _played(spec: RunSpec, progress: Progress | None, unfold: bool = False) -> Played:
    """The step of `spec`, traced, priced, mapped and played."""
    accelerator, cluster = _machine(spec)
    stack, formats, attention = _software(spec, accelerator)
    whole = step_graph(spec, formats, stack, attention, progress)
    with about("parallel"):
        step = divide(whole, spec, stack, formats.step_formats(optimizers.state_bytes(whole)), cluster.domain)
    kernels = Kernels(formats.fp32_matmul, attention, stack)
    replicas = replicas_played(spec, unfold)
    return _play(spec, whole, step, kernels, formats, accelerator, cluster, replicas)


def compiled(spec: RunSpec, stack: Stack) -> bool | str:
    """Whether the step is compiled, and how: as the run file says, else as the stack does it."""
    said = spec.training.compile
    return stack.compiled if said is None else said


def trace_step(spec: RunSpec, progress: Progress | None = None, frontend: str = "eager") -> OpGraph:
    """The traced step of `spec` with its techniques, as `simulate` prices it; raises InputError as `simulate` does.

    With the frontend "compile", what torch.compile captures and partitions, which `simulate` does not price.
    """
    accelerator, _ = _machine(spec)
    stack, formats, attention = _software(spec, accelerator)
    return step_graph(spec, formats, stack, attention, progress, frontend)


def _software(spec: RunSpec, accelerator: Accelerator) -> tuple[Stack, Precision, str]:
    """The software stack, its formats, and the attention algorithm on this accelerator."""
    stack = stacks.load(spec.training.framework)
    formats = precision.resolve(
        spec.training.precision,
        stack,
        spec.parallel.zero == 3,
        spec.training.gradient_format,
        spec.training.reduce_format,
    )
    recipe = recipes.choose(spec.training.precision, spec.training.recipe, stack, accelerator)
    formats = dataclasses.replace(formats, recipe=recipe)
    with about("training.precision"):
        accelerator.peak_flops(formats.compute)
        if recipe is not None:
            accelerator.peak_flops("bf16")  # of what is not quantized
    with about("training.attention"):
        attention = attention_algorithm(spec.training.attention, stack, accelerator, formats.compute)
    return stack, formats, attention


def _play(
    spec: RunSpec,
    whole: OpGraph,
    step: DividedStep,
    kernels: Kernels,
    formats: Precision,
    accelerator: Accelerator,
    cluster: Cluster,
    replicas: int,
) -> Played:
    """Price, map and play the step, at the clock that its own power leaves: repeated until the clock stays."""
    micro_steps = micro_steps_played(spec)
    chip = accelerator
    plan = step.stages[0].plan
    together = max(1, plan.degree // spec.parallel.context) if plan.replicas is not None else None
    model_flops = np.array(flops(whole), dtype=np.float64)
    for clock_round in range(1, CLOCK_ROUNDS + 1):

        def price_replica(slow: SlowDevice | None, chip: Accelerator = chip) -> tuple[RankPart, ...]:
            factors = [slow.factor if slow and slow.pipeline_rank == rank else 1.0 for rank in range(len(step.stages))]
            return tuple(
                _priced(stage, step, spec, chip, kernels, cluster, micro_steps, factor)
                for stage, factor in zip(step.stages, factors, strict=True)
            )

        def map_replica(ranks: tuple[RankPart, ...]) -> tuple[Program, NDArray[np.float64]]:
            with about("system.network"):
                prices, compiles = [rank.prices for rank in ranks], bool(compiled(spec, kernels.stack))
                return program_of(step, prices, micro_steps, cluster, kernels.stack, compiles)

        found = beside_each_other(spec, replicas, price_replica, together, map_replica)
        program = found.program
        played = Played(
            spec=spec,
            whole=whole,
            model_flops=model_flops,
            ranks=found.ranks,
            replicas=replicas,
            program=program,
            moved_j=found.moved_j,
            timeline=engine.play(program),
            accelerator=chip,
            cluster=cluster,
            groups=step.groups,
            stack=kernels.stack,
            formats=formats,
            micro_steps_played=micro_steps,
            clock_rounds=clock_round,
        )
        if played.clock_is_sustained:
            break
        chip = accelerator.at_clock(played.sustained_clock_hz)
    return played


def _priced(
    stage: Stage,
    step: DividedStep,
    spec: RunSpec,
    chip: Accelerator,
    kernels: Kernels,
    cluster: Cluster,
    micro_steps: int,
    slower: float,
) -> RankPart:
    """A rank's part with what its kernels, `slower` than the chip's, and its collectives cost."""
    graph = stage.part.graph
    with about("system.accelerator"):
        prices = price(graph, chip, kernels, stage.plan.optimizer_shards)
        prices = dataclasses.replace(prices, time_s=prices.time_s * slower)
    with about("system.network"):
        how = (step.overlap_tensor, step.beside_backward)
        prices = with_collectives(graph, prices, step.groups, cluster, *how)
    with about("system.accelerator"):
        _check_length(graph, prices, micro_steps)
    return RankPart(graph, stage.plan, prices)


def _machine(spec: RunSpec) -> tuple[Accelerator, Cluster]:
    system = spec.system
    reference = system.accelerator
    named = reference if isinstance(reference, str) else reference.model_dump()
    accelerator = accelerators.load(named, "system.accelerator")
    network = system.network.overrides()
    cluster = Cluster.build(accelerator, system.devices, system.devices_per_node, system.nvlink_domain, network)
    slow = system.variation.slow_link
    if slow is None:
        return accelerator, cluster
    try:
        return accelerator, cluster.with_slow_link(slow.tier, slow.factor)
    except InputError as error:
        raise InputError(f"system.variation.slow_link.{error}") from None


def step_graph(
    spec: RunSpec,
    formats: Precision,
    stack: Stack,
    attention: str,
    progress: Progress | None = None,
    frontend: str = "eager",
) -> OpGraph:
    """The traced step of `spec`, with its techniques, bound to its micro-batch and sequence length."""
    training, workload = spec.training, spec.workload
    compiles = compiled(spec, stack)
    frontend = "compile" if compiles == "captured" else frontend
    if frontend == "compile" and training.recompute != "none":
        raise InputError(
            f"training.recompute: {training.recompute} is not modelled on what torch.compile captures, whose "
            "partitioner decides what is recomputed; allowed with training.compile captured, or that frontend: none"
        )
    options = TraceOptions(
        attention="unfused" if attention == "unfused" else "flash",
        dropout=stack.dropout if training.dropout is None else training.dropout,
        parameter_format=formats.parameter,
        autocast_format=formats.autocast,
        master_format=formats.master,
        gradient_format=formats.gradient,
        optimizer=training.optimizer,
        optimizer_implementation={"per_parameter": "single"}.get(stack.optimizer_kernel, stack.optimizer_kernel),
        gradient_clipping=stack.gradient_clipping,
        loss_scaling=formats.compute == "fp16" and stack.loss_scaling == "dynamic",
        autocast_norms_in_fp32=stack.autocast_norm_format == "fp32",
        rms_norm_fused=stack.rms_norm_fused or bool(compiles),  # the compiler keeps what the fused norm keeps
        loss_fused=stack.cross_entropy_fused,
        loss_in_fp32=stack.cross_entropy_format == "fp32",
        logged_losses=stack.logged_losses,
        task=workload.task,
        frontend=frontend,
        batch=workload.micro_batch,
        sequence=workload.seq_len,
    )
    with about("workload"):
        graph = trace.cached_trace(spec.model(), options, progress)
    graph = quantize(graph, formats.recipe, gathered=spec.parallel.zero == 3 and spec.data_parallel > 1)
    policy = training.recompute
    _check_blocks(graph, policy)
    graph = recompute(graph, policy if isinstance(policy, str) else policy.every)
    # The compiler sees what is recomputed: forward does not write what backward makes again.
    if compiles:
        captured = frontend == "compile"  # forward and loss as one graph, whatever the stack compiles
        graph = fuse(graph, "model" if captured else stack.compile_scope, captured or stack.compile_loss)
    else:
        by_hand = (stack.masked_softmax_longest, stack.dropout_add_fused, stack.rotary_fused)
        graph = fuse_by_hand(graph, HandFused(*by_hand, spec.parallel.tensor))
    buffer = formats.buffer if (spec.parallel.zero or 0) < 2 else None
    return buffer_gradients(graph, buffer, stack.gradient_accumulation_fused)


@contextmanager
def about(key: str) -> Iterator[None]:
    """An InputError raised inside names `key` of the run file, unless it names one itself."""
    try:
        yield
    except InputError as error:
        said = str(error)
        if said.startswith("model"):  # a loader of models, which does not know where in a file its model was
            error.args = (f"workload.{said}",)
        elif not said.startswith(_SECTIONS):
            error.args = (f"{key}: {said}",)
        raise


def _check_length(graph: OpGraph, prices: Prices, micro_steps: int) -> None:
    """Raises InputError if the kernels take longer than an engine can count, naming the one that takes most."""
    total = float(prices.time_s.sum()) * micro_steps
    if total <= LONGEST_S:
        return
    longest = int(np.argmax(np.nan_to_num(prices.time_s, nan=np.inf)))
    target, limit = graph.kinds[graph.op_kind[longest]].target, prices.limited_by[prices.limit[longest]]
    raise too_long(f"{target} and the other kernels, limited by {limit} of the chip at this workload's sizes", total)


def _check_blocks(graph: OpGraph, policy: str | EveryBlocks) -> None:
    """Raises InputError if fewer blocks than `every` asks for are there."""
    most = max((len(block.layers) for block in graph.blocks), default=0)
    if not isinstance(policy, str) and most and policy.every > most:
        raise InputError(f"training.recompute.every: {policy.every} is more than the {most} blocks of the model")
