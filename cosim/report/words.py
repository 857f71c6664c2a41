"""What the terminal and the page say alike: values with units that people use, and the run in words."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from cosim.result import Result
from hwmodels.units import format_quantity

_JOULES_PER_KWH = 3.6e6
_HOUR_S, _DAY_S, _YEAR_S = 3600.0, 86400.0, 365.25 * 86400.0
_NAMES = {
    "all_gather": "all-gather",
    "all_reduce": "all-reduce",
    "all_to_all": "all-to-all",
    "reduce_scatter": "reduce-scatter",
    "send_recv": "send/receive",
}


def name_of(key: str) -> str:
    """A key of the result as people write it: "attention_backward" is "attention backward"."""
    return _NAMES.get(key, key.replace("_", " "))


def plain_line(text: object) -> str:
    """`text` on one line without control characters, so that a name cannot steer a terminal."""
    return "".join(char if char.isprintable() else " " for char in str(text))


def seconds(value: float) -> str:
    """Up to some minutes in seconds and parts of them; longer in hours, days or years."""
    if not math.isfinite(value) or abs(value) < 600:
        return format_quantity(value, "time").replace(" us", " µs")
    for unit, scale, least in (("years", _YEAR_S, 3.0), ("days", _DAY_S, 2.0), ("h", _HOUR_S, 2.0)):
        if value >= least * scale:
            return f"{significant(value / scale)} {unit}"
    return f"{value / 60:.1f} min"


def memory(value: float) -> str:
    """Bytes in binary units: "61.23 GiB"."""
    return format_quantity(value, "data")


def energy(value: float) -> str:
    """Joules; from 100 kWh on in watt-hours, as electricity is bought."""
    if not math.isfinite(value) or value < 100 * _JOULES_PER_KWH:
        return format_quantity(value, "energy")
    kwh = value / _JOULES_PER_KWH
    for unit, scale in (("TWh", 1e9), ("GWh", 1e6), ("MWh", 1e3)):
        if kwh >= scale:
            return f"{significant(kwh / scale)} {unit}"
    return f"{significant(kwh)} kWh"


def money(value: float | None) -> str:
    """Dollars: "0.031 cents", "$0.521", "$12.30", "$3.214 million"."""
    if value is None:
        return "unknown"
    if 0 < value < 0.01:
        return f"{100 * value:.3g} cents"
    if value >= 1e6:
        return f"${significant(value / 1e9)} billion" if value >= 1e9 else f"${significant(value / 1e6)} million"
    return f"${value:.3g}" if value < 1 else f"${value:,.2f}" if value < 1000 else f"${value:,.0f}"


def count(value: float) -> str:
    """Large counts as people say them: "8.03 billion"."""
    for word, scale in (("trillion", 1e12), ("billion", 1e9), ("million", 1e6)):
        if value >= scale:
            return f"{value / scale:.3g} {word}"
    return f"{value:,.0f}"


def rate(value: float) -> str:
    """Something per second, by its size: "654,321", "12.3"."""
    return f"{value:,.0f}" if value >= 100 else significant(value)


def significant(value: float) -> str:
    """Four significant digits without an exponent where people would not write one: "1,234", "12.34"."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"


def percent(share: float) -> str:
    """A share of 1 as "41.2 %"."""
    return f"{100 * share:.1f} %"


def flops_rate(value: float) -> str:
    """FLOP/s with a prefix."""
    return format_quantity(value, "compute")


def bytes_rate(value: float) -> str:
    """Bytes/s with a decimal prefix."""
    return format_quantity(value, "bandwidth")


def looked_up(spec: Mapping[str, Any], path: str, default: Any = None) -> Any:
    """The value at a path such as "system.devices" of the echoed run file, or `default`."""
    value: Any = spec
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return default if value is None else value


def model_name(result: Result) -> str:
    """The model's name, or what the run file says in its place."""
    if result.detail is not None and result.detail.model_name:
        return plain_line(result.detail.model_name)
    model = looked_up(result.spec, "workload.model", "model")
    if isinstance(model, Mapping):
        model = model.get("huggingface") or model.get("python") or model.get("family") or "model"
    return plain_line(model)


def machine(result: Result) -> str:
    """The devices: "64 × h100-sxm-80gb"."""
    accelerator = looked_up(result.spec, "system.accelerator", "accelerator")
    if isinstance(accelerator, Mapping):
        changed = " (changed)" if accelerator.get("set") else ""
        accelerator = f"{accelerator.get('base', 'accelerator')}{changed}"
    return f"{looked_up(result.spec, 'system.devices', 1)} × {plain_line(accelerator)}"


def facts(result: Result) -> list[tuple[str, str]]:
    """What was run, as (what, value): parameters, framework, precision, batch, division over devices, recipe."""
    spec = result.spec
    facts: list[tuple[str, str]] = []
    if result.detail is not None and result.detail.parameters:
        facts.append(("parameters", count(result.detail.parameters)))
    facts.append(("framework", plain_line(looked_up(spec, "training.framework", "pytorch"))))
    facts.append(("precision", plain_line(looked_up(spec, "training.precision", "bf16"))))
    batch, length = looked_up(spec, "workload.global_batch"), looked_up(spec, "workload.seq_len")
    if isinstance(batch, int) and isinstance(length, int):
        facts.append(("batch", f"{batch:,} × {length:,} tokens"))
    if result.detail is not None:
        facts.append(("micro-steps", f"{result.detail.micro_steps:,}"))
    facts.append(("parallel", _division(spec)))
    recompute = looked_up(spec, "training.recompute", "none")
    if recompute != "none":
        every = recompute.get("every") if isinstance(recompute, Mapping) else None
        facts.append(("recompute", f"every {every}" if every else plain_line(recompute)))
    return facts


def facts_line(result: Result) -> str:
    """The facts in one line of words."""
    say = {"parameters": "{1} {0}", "micro-steps": "micro-steps: {1}", "recompute": "{0} {1}"}
    return ", ".join(say.get(what, "{1}").format(what, value) for what, value in facts(result))


def _division(spec: Mapping[str, Any]) -> str:
    words = []
    shared = 1
    for key in ("tensor", "pipeline", "context"):
        degree = looked_up(spec, f"parallel.{key}", 1)
        shared *= degree if isinstance(degree, int) else 1
        if degree != 1:
            words.append(f"{key} {degree}")
    devices = looked_up(spec, "system.devices", 1)
    words.append(f"data {devices // shared if isinstance(devices, int) else '?'}")
    expert = looked_up(spec, "parallel.expert", 1)
    if expert != 1:
        words.append(f"expert {expert}")
    zero = looked_up(spec, "parallel.zero")
    if zero is not None:
        words.append(f"ZeRO {zero}")
    return ", ".join(words)


def verdict(result: Result) -> str:
    """Whether it fits; if not, why and what would make it fit."""
    peak, capacity = result.peak_memory_bytes, result.memory_capacity_bytes
    if result.feasible:
        return f"fits: {memory(peak)} of {memory(capacity)} at the peak"
    if result.infeasible_reason:
        return f"does not fit: {plain_line(result.infeasible_reason)}"
    if peak > capacity:
        return f"does not fit: {memory(peak)} of {memory(capacity)} at the peak, {memory(peak - capacity)} too much"
    return "not feasible"


def clock(value: float) -> str:
    """A frequency: "1.72 GHz"."""
    return format_quantity(value, "frequency")


def shape(text: str) -> str:
    """Operands' shapes as people write them: "8192×4096 · 4096×14336" for "[8192,4096] x [4096,14336]"."""
    return re.sub(r"(?<=\d)[x,](?=\d)", "×", text).replace("] x [", " · ").strip("[]")
