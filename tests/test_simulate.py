"""Directions that physics demands of a whole simulated step."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from cosim import stacks
from cosim.graph import Phase
from cosim.result import Result
from cosim.simulate import simulate
from cosim.spec import RunSpec
from cosim.validate.cpu_memory import predicted
from hwmodels.units import InputError

TINY = {"family": "llama", "layers": 3, "hidden": 128, "heads": 4, "kv_heads": 2, "ffn": 352, "vocab": 1024}
MEDIUM = {"family": "gpt", "layers": 4, "hidden": 2048, "heads": 16, "vocab": 50304, "max_positions": 4096}


def run(*overrides: str, model: Mapping[str, object] = MEDIUM) -> Result:
    base: dict[str, Any] = {
        "workload": {"model": dict(model), "seq_len": 1024, "global_batch": 32, "micro_batch": 1},
        "system": {"accelerator": "h100-sxm-80gb", "devices": 16},
        "parallel": {"zero": 3},
        "training": {"framework": "pytorch"},
    }
    return simulate(RunSpec.from_mapping(base, overrides=overrides))


def changed(key: str, value: str) -> str:
    return f"system.accelerator.set.{key}={value}"


@pytest.mark.parametrize("zero", [0, 3])
@pytest.mark.parametrize(
    ("slow", "fast"),
    [
        (changed("memory.hbm.bandwidth", "1.5 TB/s"), changed("memory.hbm.bandwidth", "4 TB/s")),
        (changed("clock", "1.2 GHz"), changed("clock", "2.2 GHz")),
        (changed("matrix.cores", "100"), changed("matrix.cores", "200")),
        ("system.network.inter_node=100 Gb/s", "system.network.inter_node=800 Gb/s"),
        ("system.network.intra_node=20 GB/s", "system.network.intra_node=900 GB/s"),
        ("system.network.inter_node_latency=500 us", "system.network.inter_node_latency=1 us"),
        ("system.network.intra_node_latency=500 us", "system.network.intra_node_latency=1 us"),
        (changed("power.limit", "300 W"), changed("power.limit", "1000 W")),
        ("training.attention=unfused", "training.attention=flash-2"),
        ("training.attention=flash-2", "training.attention=flash-3"),
        ("training.recompute=full", "training.recompute=none"),
        ("training.compile=false", "training.compile=true"),
        ("parallel.overlap.gradients=false", "parallel.overlap.gradients=true"),
        ("parallel.overlap.parameters=false", "parallel.overlap.parameters=true"),
    ],
)
def test_better_parts_are_never_slower(slow: str, fast: str, zero: int) -> None:
    worse, better = run(slow, f"parallel.zero={zero}"), run(fast, f"parallel.zero={zero}")
    assert better.step_time_s <= worse.step_time_s
    if not any(word in slow for word in ("network", "overlap", "power")):
        assert better.step_time_s < worse.step_time_s


@pytest.mark.parametrize(
    ("slow", "fast"),
    [
        ("system.network.inter_node=10 Gb/s", "system.network.inter_node=400 Gb/s"),
        ("system.network.inter_node_latency=10 ms", "system.network.inter_node_latency=5 us"),
    ],
)
def test_a_network_bound_step_follows_its_network(slow: str, fast: str) -> None:
    worse, better = run(slow), run(fast)
    assert worse.step_time_s > 1.5 * better.step_time_s
    assert worse.limited_by.startswith("communication")


def test_wider_formats_are_slower() -> None:
    """Peaks of the datasheet: bf16 989, tf32 494, fp32 67 TFLOP/s."""
    formats = ("bf16", "tf32", "fp32")
    narrow, middle, wide = (run(f"training.precision={name}", "training.attention=unfused") for name in formats)
    assert narrow.step_time_s < middle.step_time_s < wide.step_time_s


def test_a_larger_micro_batch_takes_more_memory_and_no_more_time() -> None:
    one = ("system.devices=1", "workload.global_batch=8")
    results = [run(*one, f"workload.micro_batch={n}") for n in (1, 2, 4, 8)]
    peaks = [result.peak_memory_bytes for result in results]
    assert peaks == sorted(set(peaks))
    assert results[-1].step_time_s <= results[0].step_time_s


def test_activations_grow_in_proportion_to_the_micro_batch() -> None:
    one = ("system.devices=1", "workload.global_batch=16")  # large enough to be at the peak
    held = [run(*one, f"workload.micro_batch={n}").memory_bytes["activations"] for n in (4, 8, 16)]
    assert held[2] - held[1] == pytest.approx(2 * (held[1] - held[0]), rel=0.01)


def test_unfused_attention_is_larger_by_its_scores() -> None:
    """Softmax's output is kept for backward: 2 a s^2 b bytes per layer in 16 bit (arXiv 2205.05198)."""
    one = ("system.devices=1", "workload.global_batch=8", "workload.micro_batch=8", "workload.seq_len=2048")
    flash, unfused = (run(*one, f"training.attention={name}") for name in ("flash-2", "unfused"))
    scores = 8 * 4 * 2 * 16 * 2048**2
    assert unfused.peak_memory_bytes - flash.peak_memory_bytes == pytest.approx(scores, rel=0.01)
    assert unfused.step_time_s > flash.step_time_s


@pytest.mark.parametrize(
    "overrides",
    [
        ("training.precision=fp32", "training.attention=unfused"),
        ("training.precision=bf16",),
        ("training.precision=fp16", "parallel.zero=3"),
        ("training.recompute=full",),
        ("training.compile=true", "training.optimizer=adafactor"),
    ],
)
@pytest.mark.parametrize("model", [TINY, MEDIUM], ids=["llama", "gpt"])
def test_one_device_peaks_where_its_trace_does(overrides: tuple[str, ...], model: Mapping[str, object]) -> None:
    """To the allocator's rounding of each storage: what `cosim validate memory` compares with a real step."""
    one = ("system.devices=1", "workload.global_batch=1", *overrides)
    result = run(*one, model=model)
    assert result.detail is not None
    assert result.detail.traced is not None
    graph = result.detail.traced.graph
    allocated = result.peak_memory_bytes - result.memory_bytes["framework"]
    assert abs(allocated - predicted(graph).total) <= 512 * len(graph.storage_spec)


def test_recomputation_trades_memory_for_time() -> None:
    one = ("system.devices=1", "workload.global_batch=4", "workload.micro_batch=4")
    none, some, full = (run(*one, f"training.recompute={policy}") for policy in ("none", "{every: 2}", "full"))
    assert none.step_time_s < some.step_time_s < full.step_time_s
    assert none.peak_memory_bytes > some.peak_memory_bytes > full.peak_memory_bytes
    assert run(*one, "training.recompute=selective").step_time_s == none.step_time_s


def test_a_launch_bound_step_takes_as_long_as_its_host() -> None:
    """A tiny model: kernels times the host's time for each, forward, backward and update."""
    result = run("system.devices=1", "workload.seq_len=64", "workload.global_batch=1", model=TINY)
    assert result.detail is not None
    stack = stacks.load("pytorch")
    kernels = {row.phase: 0.0 for row in result.detail.ops}
    for row in result.detail.ops:
        kernels[row.phase] += row.count
    host = sum(count * getattr(stack, f"host_{phase}_s") for phase, count in kernels.items())
    assert result.step_time_s == pytest.approx(host, rel=0.1)
    assert result.limited_by.startswith("host")


def test_a_slower_host_slows_a_launch_bound_step_in_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    tiny = ("system.devices=1", "workload.seq_len=64", "workload.global_batch=1")
    before = run(*tiny, model=TINY).step_time_s
    stack = stacks.load("pytorch")
    facts = {name: 2 * getattr(stack, name) for name in ("host_forward_s", "host_backward_s", "host_optimizer_s")}
    monkeypatch.setattr(stacks, "load", lambda name: dataclasses.replace(stack, **facts))
    assert run(*tiny, model=TINY).step_time_s == pytest.approx(2 * before, rel=0.1)


def test_one_device_sends_nothing_whatever_it_shards() -> None:
    for zero in range(4):
        result = run("system.devices=1", f"parallel.zero={zero}", model=TINY)
        assert result.time_breakdown_s["exposed_communication"] == {}
        assert result.detail is not None
        assert {label.kind for label in result.detail.program.labels} <= {"compute", "copy", "host"}


def test_the_same_run_gives_the_same_result() -> None:
    first, second = run(model=TINY).to_json(), run(model=TINY).to_json()
    assert first == second


def test_more_devices_at_the_same_global_batch_are_faster_and_hold_less() -> None:
    few, many = (run(f"system.devices={n}", "workload.global_batch=128") for n in (8, 64))
    assert many.step_time_s < few.step_time_s
    assert many.memory_bytes["optimizer"] == pytest.approx(few.memory_bytes["optimizer"] / 8, rel=0.01)


def test_what_the_chip_lacks_is_one_sentence() -> None:
    with pytest.raises(InputError, match=r"training\.attention") as refused:
        run("training.attention=flash-2", "training.precision=fp32")
    assert "\n" not in str(refused.value)


def test_every_op_is_somewhere_in_the_program() -> None:
    """Compute tasks of forward and backward are the priced ops of the micro-steps played, to a picosecond each."""
    result = run("workload.global_batch=64", model=TINY)
    detail = result.detail
    assert detail is not None
    program = detail.program
    work = {label.phase: 0 for label in program.labels}
    for row in range(len(program)):
        label = program.labels[program.label[row]]
        if label.kind == "compute":
            work[label.phase] += int(program.work_ps[row])
    played, steps = detail.micro_steps_played, detail.micro_steps
    for phase in (Phase.FORWARD, Phase.BACKWARD):
        seconds = sum(row.time_s for row in detail.ops if row.phase == phase.name.lower())
        assert np.isclose(work[phase.name.lower()] * 1e-12 / played, seconds / steps, rtol=1e-6)
