"""What a kernel or collective costs on an accelerator: a row of a published table in, the hardware model's answer out.

A row has the columns of kernels.csv or collectives.csv: `op` names the kernel or collective, `accelerator` is a name, a
file or {base, set}; columns that say what was measured (time_us, tflops, busbw_gbps, source, note, id) may stay.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from hwmodels.accelerator import Accelerator, load
from hwmodels.cluster import Cluster
from hwmodels.units import InputError
from hwmodels.vector_unit import ELEMENT_WORK
from hwmodels.work import Attention, Collective, Cost, Gemm, Pass, Phase
from hwmodels.yaml_file import load_json

GEMMS = ("gemm", "bmm", "grouped_gemm")
ATTENTION: dict[str, tuple[Phase, ...]] = {
    "attention_fwd": ("forward",),
    "attention_bwd": ("backward",),
    "attention_fwd_bwd": ("forward", "backward"),
}
_WHOLE_NAMES = ("softmax", "layernorm", "rmsnorm", "embedding")
PASSES = {(kind if kind in _WHOLE_NAMES else f"elementwise_{kind}"): kind for kind in ELEMENT_WORK}
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send_recv")
# Columns: what each family of ops reads, and what says where a row came from or what was measured.
_READS = {
    "gemm": ("dtype", "output_dtype", "b", "m", "n", "k", "layout"),
    "attention": ("dtype", "b", "heads", "kv_heads", "head_dim", "seq", "causal", "algorithm"),
    "pass": ("dtype", "b", "m", "n"),
    "collective": ("bytes", "devices", "devices_per_node"),
}
_ABOUT = ("id", "op", "collective", "accelerator", "system", "time_us", "tflops", "busbw_gbps", "source", "note")
_KNOWN = {*_ABOUT, *(column for columns in _READS.values() for column in columns)}
# Attention kernels as the column `note` of kernels.csv names them: `impl=flash2`.
IMPLEMENTATIONS = {
    "flash1": "flash-1",
    "flash2": "flash-2",
    "flash3": "flash-3",
    "flash_triton": "flash-triton",
    "triton": "flash-triton",
    "cudnn": "cudnn",
}


def answer(row: Mapping[str, Any], chips: dict[str, Accelerator]) -> dict[str, Any]:
    """The cost of a row's op: op, accelerator, time_us, flops, bytes per memory level, limited_by, energy_j,
    calibration; `id` if the row has one, `algorithm` where there is a choice, `cycles` on a systolic array.

    `chips` keeps the accelerators that were built, by what names them. Raises InputError: a column that is unknown, is
    missing, or has a value that cannot be.
    """
    unknown = [str(key) for key in row if key not in _KNOWN]
    if unknown:
        raise InputError(f"{unknown[0]!r} is not a known column; known are {', '.join(sorted(_KNOWN))}")
    op = str(row.get("op") or row.get("collective") or "")
    chip = _chip(row.get("accelerator"), chips)
    if op in COLLECTIVES:
        costs, algorithm = _collective(op, row, chip)
    elif op in GEMMS:
        costs, algorithm = [chip.cost(_gemm(row))], ""
    elif op in ATTENTION:
        costs, algorithm = _attention(op, row, chip)
    elif op in PASSES:
        costs, algorithm = [chip.cost(_pass(row, PASSES[op]))], ""
    else:
        known = ", ".join((*GEMMS, *ATTENTION, *PASSES, *COLLECTIVES))
        raise InputError(f"op: {op!r:.80} is not one of {known}" if op else f"op is missing; it is one of {known}")
    levels = dict.fromkeys(level for cost in costs for level in cost.bytes_per_level)
    found = {
        **({"id": row["id"]} if row.get("id") else {}),
        "op": op,
        "accelerator": chip.name,
        **({"algorithm": algorithm} if algorithm else {}),
        "time_us": sum(cost.time_s for cost in costs) * 1e6,
        "flops": sum(cost.flops for cost in costs),
        "bytes": {level: sum(cost.bytes_per_level.get(level, 0.0) for cost in costs) for level in levels},
        "limited_by": max(costs, key=lambda cost: cost.time_s).limited_by,
        "energy_j": sum(cost.energy_j for cost in costs),
    }
    cycles = [cost.cycles for cost in costs if cost.cycles is not None]
    if cycles:
        found["cycles"] = sum(cycles)
    return {**found, "calibration": chip.calibration_status}


def answer_line(line: bytes, where: str, chips: dict[str, Accelerator], default: str | None = None) -> dict[str, Any]:
    """The answer to one line of JSON, on the accelerator `default` where it names none; a line that has no answer
    becomes {"error": sentence}.
    """
    try:
        row = load_json(line, where)
        if not isinstance(row, dict):
            raise InputError(f"{where}: must be an object of columns, not {row!r:.80}")
        return answer(row if default is None or row.get("accelerator") else {**row, "accelerator": default}, chips)
    except InputError as error:
        sentence = " ".join(str(error).split())
        return {"error": sentence if sentence.startswith(where) else f"{where}: {sentence}"}


def _chip(reference: Any, chips: dict[str, Accelerator]) -> Accelerator:
    if not isinstance(reference, str | Mapping):
        raise InputError(
            f"accelerator: {reference!r:.80} must be a name, a .yaml file, or {{base: NAME, set: {{...}}}}"
        )
    key = json.dumps(reference, sort_keys=True, default=str)
    if key not in chips:
        chips[key] = load(reference)
    return chips[key]


def _gemm(row: Mapping[str, Any]) -> Gemm:
    dtype = str(row.get("dtype") or "bf16")
    layout = str(row.get("layout") or "TN")
    if layout not in ("TN", "NN", "NT"):
        raise InputError(f"layout: {layout!r:.80} is not one of TN, NN, NT")
    m, n, k = (_whole(row, key) for key in ("m", "n", "k"))
    output = str(row.get("output_dtype") or dtype)
    return Gemm(m, n, k, _whole(row, "b", 1), dtype, output, layout)  # type: ignore[arg-type]


def _attention(op: str, row: Mapping[str, Any], chip: Accelerator) -> tuple[list[Cost], str]:
    """Its kernels' costs; by the algorithm that the row names, or the one that is fastest on the chip."""
    implementation = re.search(r"impl=(\w+)", str(row.get("note") or ""))
    named = str(row.get("algorithm") or (implementation[1] if implementation else ""))
    named = IMPLEMENTATIONS.get(named, named)
    heads, seq = _whole(row, "heads"), _whole(row, "seq")
    kv_heads, causal = _whole(row, "kv_heads", heads), _truth(row, "causal")
    batch, head_dim, dtype = _whole(row, "b", 1), _whole(row, "head_dim"), str(row.get("dtype") or "bf16")
    if heads % kv_heads:
        raise InputError(f"kv_heads: {kv_heads} must divide heads, {heads}")

    def costs(algorithm: str) -> list[Cost]:
        return [
            chip.cost(Attention(algorithm, phase, batch, heads, kv_heads, seq, seq, head_dim, causal, dtype))
            for phase in ATTENTION[op]
        ]

    if named:
        return costs(named), named
    tried = {algorithm: costs(algorithm) for algorithm in chip.attention}
    best = min(tried, key=lambda algorithm: sum(cost.time_s for cost in tried[algorithm]))
    return tried[best], best


def _pass(row: Mapping[str, Any], kind: str) -> Pass:
    work, dtype = ELEMENT_WORK[kind], str(row.get("dtype") or "bf16")
    if dtype not in ("fp32", "bf16", "fp16"):
        raise InputError(f"dtype: {dtype!r:.80} is not one of fp32, bf16, fp16")
    elements = float(_whole(row, "m") * _whole(row, "n", 1) * _whole(row, "b", 1))
    element = 4.0 if dtype == "fp32" else 2.0
    return Pass(
        read_bytes=work.reads * element * elements,
        write_bytes=element * elements,
        vector_ops=work.vector_ops * elements,
        special_ops=work.special_ops * elements,
        format=dtype,
        kind=work.kind,
    )


def _collective(op: str, row: Mapping[str, Any], chip: Accelerator) -> tuple[list[Cost], str]:
    devices = _whole(row, "devices")
    cluster = Cluster.build(chip, devices, _whole(row, "devices_per_node", 8), where="row")
    work = Collective(op, float(_whole(row, "bytes")), devices, min(devices, cluster.domain))  # type: ignore[arg-type]
    return [cluster.cost(work)], cluster.collective_cost(work).algorithm


def _whole(row: Mapping[str, Any], key: str, default: int | None = None) -> int:
    raw = row.get(key)
    if raw is None or raw == "":
        if default is None:
            raise InputError(f"{key} is missing")
        return default
    try:
        value = float(raw)
    except (TypeError, ValueError):
        raise InputError(f"{key}: {raw!r:.80} must be a whole number") from None
    if isinstance(raw, bool) or not 1 <= value <= 2**63 or value != int(value):
        raise InputError(f"{key}: {raw!r:.80} must be a whole number of at least 1")
    return int(value)


def _truth(row: Mapping[str, Any], key: str) -> bool:
    raw = row.get(key)
    text = str(raw or False).lower()
    if text not in ("true", "false"):
        raise InputError(f"{key}: {raw!r:.80} must be true or false")
    return text == "true"
