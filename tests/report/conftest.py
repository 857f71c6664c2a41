"""A made-up but plausible result: Llama-3-8B, 64 devices, FSDP, with a program of a few thousand tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import cosim
from cosim.engine.program import Demands, Label, Program, Stream, Timeline
from cosim.graph import Csr
from cosim.result import Detail, MemoryCurve, OpRow, Result, Roofline

HOST, COMPUTE, GATHER, REDUCE = range(4)
LAYERS, MICRO_STEPS, PLAYED = 32, 8, 8
PS = 1e12
CAPACITY = 79.6 * 2**30


def plausible_result(devices: int = 1, names: str = "") -> Result:
    """A result whose parts sum as a real one's do; `names` is put into every text that a user or a model decides."""
    program, timeline = _played(devices, names)
    step = timeline.makespan_ps / PS
    busy = float((timeline.end_ps - timeline.start_ps)[program.stream == COMPUTE].sum()) / PS
    shares = {"matmul": 0.66, "attention": 0.07, "attention_backward": 0.12, "pointwise": 0.06, "norm": 0.02}
    shares |= {
        "norm_backward": 0.035,
        "copy": 0.015,
        "softmax": 0.008,
        "loss": 0.002,
        "gather": 0.005,
        "reduction": 0.005,
    }
    optimizer = 0.02 * busy
    compute = {name: share * (busy - optimizer) for name, share in shares.items()}
    idle = step - busy
    memory = {
        "weights": 1.5,
        "gradients": 0.47,
        "optimizer": 0.94,
        "activations": 44.1,
        "temporary": 9.2,
        "framework": 1.1,
    }
    memory_bytes = {name: size * 2**30 for name, size in memory.items()}
    tokens = 512 * 8192
    flops = 6 * 8.03e9 * tokens * 1.15
    mfu = flops / step / (64 * 989e12)
    return Result(
        step_time_s=step,
        step_time_interval_s=(0.94 * step, 1.07 * step),
        tokens_per_s=tokens / step,
        tokens_per_s_per_device=tokens / step / 64,
        mfu=mfu,
        hfu=mfu,
        model_flops=flops,
        feasible=True,
        infeasible_reason=None,
        peak_memory_bytes=sum(memory_bytes.values()),
        worst_rank=0,
        memory_bytes=memory_bytes,
        device_memory_bytes={"allocated": sum(memory_bytes.values()), "offered": CAPACITY},
        memory_capacity_bytes=CAPACITY,
        time_breakdown_s={
            "compute": compute,
            "exposed_communication": {"all_gather": 0.45 * idle, "reduce_scatter": 0.25 * idle},
            "bubble": 0.0,
            "host": 0.3 * idle,
            "optimizer": optimizer,
        },
        clock_hz=1.72e9,
        clock_rounds=2,
        energy_j=64 * 610 * step,
        cost_usd=64 * 2.5 / 3600 * step,
        run={
            "time_s": 15e12 / tokens * step,
            "energy_j": 15e12 / tokens * step * 64 * 610,
            "cost_usd": 15e12 / tokens * step * 64 * 2.5 / 3600,
        },
        limited_by=f"compute: matrix unit{names}",
        anchor_factor=None,
        calibration={"status": "family defaults", "provenance": [f"tensor-core GPUs{names}"]},
        extrapolated=(),
        assumed=(
            f"framework: stream priorities as in NCCL's default{names}",
            "cost: 2.50 USD per device and hour",
            "host: 5 us per kernel",
            "network: full bisection bandwidth",
        ),
        unknown_ops=({"target": f"aten._unusual{names}", "count": 3, "share": 0.0004},),
        warnings=(f"activations use 77 % of memory: recompute would make room for a larger micro-batch{names}",),
        spec={
            "workload": {
                "model": f"llama3-8b{names}",
                "seq_len": 8192,
                "global_batch": 512,
                "micro_batch": 1,
                "task": "pretrain",
                "tokens": 15e12,
            },
            "system": {"accelerator": f"h100-sxm-80gb{names}", "devices": 64, "devices_per_node": 8},
            "parallel": {"tensor": 1, "pipeline": 1, "context": 1, "expert": 1, "zero": 3},
            "training": {"framework": "torchtitan", "precision": "bf16", "optimizer": "adamw", "recompute": "none"},
        },
        detail=Detail(
            program=program,
            timeline=timeline,
            ops=_ops(compute, names),
            memory=_memory(memory_bytes, step, names),
            roofline=Roofline({"bf16": 989e12, "fp8": 1979e12, "tf32": 494e12, "fp32": 67e12}, 3.35e12),
            device_capacity_bytes=80 * 2**30,
            model_name=f"llama3-8b{names}",
            parameters=8_030_261_248,
            micro_steps=MICRO_STEPS,
            micro_steps_played=PLAYED,
        ),
    )


def _played(devices: int, names: str) -> tuple[Program, Timeline]:
    """Tasks as FSDP issues them, each as soon as its stream, its host thread and what it depends on allow."""
    streams = []
    for device in range(devices):
        streams += [Stream(f"{name}{names}", device, kind) for name, kind in _STREAMS]
    labels: dict[Label, int] = {}
    rows: list[tuple[int, float, int, int]] = []  # stream, duration in s, label, task that it waits for
    rng = np.random.default_rng(7)

    def task(stream: int, duration: float, after: int, label: Label) -> int:
        rows.append((stream, duration * rng.uniform(0.97, 1.03), labels.setdefault(label, len(labels)), after))
        return len(rows) - 1

    for device in range(devices):
        at = device * len(_STREAMS)
        for micro_step in range(PLAYED):
            done = -1
            for phase, scale in (("forward", 1.0), ("backward", 2.1)):
                for i in range(LAYERS):
                    layer = i if phase == "forward" else LAYERS - 1 - i
                    gathered = task(
                        at + GATHER, 11e-3, -1, Label(f"all-gather block {layer}{names}", "all_gather", phase, layer)
                    )
                    done = task(
                        at + COMPUTE, 9.5e-3 * scale, gathered, Label(f"{phase} block {layer}", "compute", phase, layer)
                    )
                    if phase == "backward":
                        label = Label(f"reduce-scatter block {layer}", "reduce_scatter", phase, layer)
                        task(at + REDUCE, 23e-3, done, label)
                        label = Label(f"add gradients {layer}", "copy", phase, layer)
                        done = task(at + COMPUTE, 3e-4, done, label)
                if phase == "forward":
                    done = task(at + COMPUTE, 22e-3, done, Label("head and loss", "compute", "forward"))
            if micro_step == PLAYED - 1:
                task(at + COMPUTE, 15e-3, len(rows) - 2, Label("adamw", "optimizer", "optimizer"))
    columns = np.array(rows)
    stream, host = columns[:, 0].astype(np.int32), (columns[:, 0].astype(np.int32) // len(_STREAMS)) * len(_STREAMS)
    count = len(rows)
    issue, start, end = np.zeros(count), np.zeros(count), np.zeros(count)
    free = np.zeros(len(streams))
    for i, (on, duration, _, after) in enumerate(rows):
        issue[i] = free[host[i]]
        free[host[i]] += 1e-3
        waited = end[after] if after >= 0 else 0.0
        ready = max(free[on], issue[i], waited, end[i - 8] if on % 4 == GATHER and i >= 8 else 0.0)
        start[i], end[i] = ready, ready + duration
        free[on] = end[i]
    empty = np.zeros(count, dtype=np.int32)
    program = Program(
        streams=tuple(streams),
        resources=(),
        labels=tuple(labels),
        profiles=(),
        stream=stream,
        work_ps=(0.95 * columns[:, 1] * PS).astype(np.int64),
        host=host,
        launch_ps=np.full(count, int(0.9e-3 * PS)),
        span_ps=empty.astype(np.int64),
        synchronises=empty.astype(np.bool_),
        priority=empty.astype(np.int8),
        rendezvous=empty - 1,
        depends=Csr.of([[int(after)] if after >= 0 else [] for after in columns[:, 3]]),
        demands=Demands(np.zeros(count + 1, dtype=np.int32), empty[:0], np.zeros(0)),
        label=columns[:, 2].astype(np.int32),
        profile=empty - 1,
        micro_step=empty,
    )
    return program, Timeline(*((column * PS).astype(np.int64) for column in (issue, start, end)))


_STREAMS = (("host", "host"), ("compute", "compute"), ("all-gather", "communication"), ("reduce", "communication"))


def _ops(compute: dict[str, float], names: str) -> tuple[OpRow, ...]:
    modules = {"attn.q_proj": "8192x4096x4096", "attn.k_proj": "8192x1024x4096", "attn.o_proj": "8192x4096x4096"}
    modules |= {"mlp.gate": "8192x14336x4096", "mlp.up": "8192x14336x4096", "mlp.down": "8192x4096x14336"}
    rows = []
    weights = {name: np.prod([float(n) for n in shape.split("x")]) for name, shape in modules.items()}
    for name, shape in modules.items():
        for phase, share in (("forward", 0.34), ("backward", 0.66)):
            time = compute["matmul"] * share * weights[name] / sum(weights.values())
            flops = time * 989e12 * (0.55 + 0.2 * len(name) / 10)
            count = LAYERS * MICRO_STEPS * (1 if phase == "forward" else 2)
            row = OpRow(
                f"layers.*.{name}{names}", "aten.mm", "matmul", phase, count, time, flops, flops / 1900, "matrix", shape
            )
            rows.append(row)
    for key, intensity, rate in (("attention", 900, 420e12), ("attention_backward", 700, 350e12)):
        phase = "backward" if "backward" in key else "forward"
        size = compute[key] * rate
        target = f"cosim.{key}"
        rows.append(
            OpRow(
                "layers.*.attn",
                target,
                key,
                phase,
                256,
                compute[key],
                size,
                size / intensity,
                "exponentials",
                "1x32x8192x128",
            )
        )
    for key in ("pointwise", "norm", "norm_backward", "softmax", "reduction"):
        for i, phase in enumerate(("forward", "backward")):
            time = compute[key] * (0.4 + 0.2 * i)
            row = OpRow(
                f"layers.*.{key}",
                f"aten.{key}",
                key,
                phase,
                1024,
                time,
                time * 2.6e12 / (4 - i),
                time * 2.6e12,
                "memory",
                "8192x4096",
            )
            rows.append(row)
    for key in ("copy", "gather"):
        time = compute[key]
        rows.append(OpRow("embed", f"aten.{key}", key, "forward", 64, time, 0.0, time * 2.2e12, "memory", "8192x4096"))
    return tuple(sorted(rows, key=lambda row: -row.time_s))


def _memory(at_peak: dict[str, float], step: float, names: str) -> MemoryCurve:
    count = 4000
    time = np.linspace(0.0, step, count)
    within = (time / step * MICRO_STEPS) % 1.0
    alive = np.where(within < 0.36, within / 0.36, np.maximum(0.0, (1 - within) / 0.64))
    rows = []
    for name, size in at_peak.items():
        if name == "activations":
            rows.append(0.03 * size + 0.97 * size * alive)
        elif name == "temporary":
            rows.append(size * (0.4 + 0.3 * (np.arange(count) % 25 > 12)))
        else:
            rows.append(np.full(count, size))
    curve = np.array(rows)
    peak = int(curve.sum(axis=0).argmax())
    curve[:, peak] = list(at_peak.values())
    return MemoryCurve(time, curve, tuple(at_peak), float(time[peak]), f"forward head and loss{names}")


PIPELINED = """
workload:
  model: {family: gpt, layers: 8, hidden: 512, heads: 8, vocab: 4096, tied_embeddings: true}
  seq_len: 512
  global_batch: 16
  micro_batch: 1
system: {accelerator: h100-sxm-80gb, devices: 8}
parallel: {pipeline: 4, schedule: %s, virtual_stages: %d, zero: 1}
training: {framework: megatron-core}
"""


@pytest.fixture(scope="session", params=[("interleaved-1f1b", 2), ("zb-h1", 1)], ids=["interleaved", "zero-bubble"])
def pipelined(request: pytest.FixtureRequest) -> Result:
    """A simulated step over four pipeline ranks, in eight micro-batches."""
    return cosim.simulate(cosim.RunSpec.from_text(PIPELINED % request.param))


@pytest.fixture(scope="session")
def result() -> Result:
    return plausible_result()


@pytest.fixture(scope="session")
def changed() -> Callable[..., Result]:
    """The same result with other fields."""

    def change(**fields: Any) -> Result:
        return dataclasses.replace(plausible_result(), **fields)

    return change


@pytest.fixture(scope="session")
def hostile() -> Result:
    """Every name that comes from a user is markup, script and terminal commands at once."""
    return plausible_result(names="<script>alert(1)</script>&\"'[bold]\x1b[31m</script>\n%{y}")
