"""The one call: a run file's content in, a result out; this page reads like the list of rooms that the data visits."""

from __future__ import annotations

from collections.abc import Callable

from cosim import engine, parallel, stacks
from cosim.mapping import data_parallel as mapping
from cosim.mapping.pricing import Kernels, attention_algorithm, price
from cosim.mapping.segments import Interference, segments
from cosim.result import Result
from cosim.spec import RunSpec
from cosim.summary import Played, summarize
from cosim.techniques import precision as precisions
from hwmodels import accelerator as accelerators
from hwmodels.cluster import Cluster

Progress = Callable[[str, float | None], None]
CLOCK_ROUNDS = 3
MICRO_STEPS_PLAYED = 4


def simulate(spec: RunSpec, progress: Progress | None = None) -> Result:
    """Simulate one training step of `spec`.

    `progress` is told what is being done, with the fraction done where it is known. Raises InputError where the traced
    model or the accelerator shows that the run cannot be; a run that does not fit in memory is not an error, its result
    says so.
    """
    stack = stacks.load(spec.training.framework)
    accelerator = accelerators.load(_reference(spec), "system.accelerator")
    cluster = Cluster.build(
        accelerator,
        spec.system.devices,
        spec.system.devices_per_node,
        spec.system.nvlink_domain,
        _network(spec),
    )
    zero = _zero(spec)
    formats = precisions.resolve(
        spec.training.precision, stack, zero == 3, spec.training.gradient_format, spec.training.reduce_format
    )
    graph = _graph(spec, formats, stack, progress)
    plan = parallel.data_parallel.plan(
        graph,
        degree=spec.data_parallel,
        per_node=cluster.domain,
        zero=zero,
        formats=formats.step_formats(spec.training.optimizer),
        overlap_gradients=spec.parallel.overlap.gradients is not False,
        overlap_parameters=spec.parallel.overlap.parameters is not False,
        bucket_bytes=stack.bucket_bytes,
        first_bucket_bytes=stack.first_bucket_bytes,
    )
    kernels = Kernels(
        fp32_matmul=formats.fp32_matmul,
        attention=attention_algorithm(spec.training.attention, stack, accelerator.architecture),
        optimizer_shards=plan.shards_optimizer,
        stack=stack,
    )
    micro_steps = min(spec.micro_steps, MICRO_STEPS_PLAYED)
    clock = accelerator.clock_hz
    for rounds in range(1, CLOCK_ROUNDS + 1):
        chip = accelerator if clock == accelerator.clock_hz else accelerator.at_clock(clock)
        prices = price(graph, chip, kernels)
        held = Interference(*mapping.interference(plan, cluster))
        parts = segments(graph, prices, stack, held, kernels.optimizer_shards)
        program = mapping.build_program(plan, parts, cluster, stack, micro_steps)
        timeline = engine.play(program)
        played = Played(
            spec, graph, plan, prices, parts, program, timeline, chip, cluster, stack, formats, micro_steps, rounds
        )
        sustained = played.sustained_clock(accelerator)
        if sustained >= clock * 0.995:
            break
        clock = sustained
    return summarize(played)
