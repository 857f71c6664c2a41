"""A row in the columns of kernels.csv or collectives.csv as the work that it describes: the only reader of them.

A value may be text, as a csv file has it (empty: not given), or a JSON value.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

from hwmodels.number_formats import bytes_of
from hwmodels.units import InputError
from hwmodels.vector_unit import ELEMENT_WORK
from hwmodels.work import Attention, Collective, Gemm, HostCopy, Pass, Phase

GEMMS = ("gemm", "bmm", "grouped_gemm")
ATTENTION: dict[str, tuple[Phase, ...]] = {
    "attention_fwd": ("forward",),
    "attention_bwd": ("backward",),
    "attention_fwd_bwd": ("forward", "backward"),
}
_WHOLE_NAMES = ("softmax", "layernorm", "rmsnorm", "embedding")
PASSES = {(kind if kind in _WHOLE_NAMES else f"elementwise_{kind}"): kind for kind in ELEMENT_WORK}
COPIES = ("host_to_device", "device_to_host")
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send_recv")
# Attention kernels as the column `note` of kernels.csv names them: `impl=flash2`.
IMPLEMENTATIONS = {
    "flash1": "flash-1",
    "flash2": "flash-2",
    "flash3": "flash-3",
    "flash_triton": "flash-triton",
    "triton": "flash-triton",
    "cudnn": "cudnn",
    "pytorch": "unfused",
    "standard": "unfused",
}
UNFUSED = "unfused"
# A pointwise kernel over tensors that are not laid out alike divides each element's number by the length of every
# dimension: a high product, sum, shift, remainder, test and branch, and per tensor a multiply-add
# (aten/src/ATen/cuda/detail/OffsetCalculator.cuh, IntegerDivider.cuh: counted).
_PER_DIMENSION = 6
# Columns: what each family of ops reads, and what says where a row came from or what was measured.
_READS = {
    "gemm": ("dtype", "output_dtype", "b", "m", "n", "k", "layout", "sparsity"),
    "attention": ("dtype", "b", "heads", "kv_heads", "head_dim", "value_dim", "seq", "causal", "algorithm"),
    "pass": ("dtype", "b", "m", "n"),
    "copy": ("bytes",),
    "collective": ("bytes", "devices", "devices_per_node"),
}
_ABOUT = ("id", "op", "collective", "accelerator", "system", "time_us", "tflops", "busbw_gbps", "source", "note")
_KNOWN = {*_ABOUT, *(column for columns in _READS.values() for column in columns)}
_PASS_FORMATS = ("fp32", "bf16", "fp16")

Kernel = Gemm | Attention | Pass | HostCopy


def check_columns(row: Mapping[str, Any]) -> None:
    """Raises InputError: a column that no op knows."""
    unknown = [str(key) for key in row if key not in _KNOWN]
    if unknown:
        raise InputError(f"{unknown[0]!r} is not a known column; known are {', '.join(sorted(_KNOWN))}")


def op_of(row: Mapping[str, Any]) -> str:
    """The row's op, or its collective. Raises InputError: none, or an unknown one."""
    op = str(row.get("op") or row.get("collective") or "")
    if op not in (*GEMMS, *ATTENTION, *PASSES, *COPIES, *COLLECTIVES):
        pointwise = "elementwise_" + "|".join(kind for kind in ELEMENT_WORK if kind not in _WHOLE_NAMES)
        known = ", ".join((*GEMMS, *ATTENTION, pointwise, *_WHOLE_NAMES, *COPIES, *COLLECTIVES))
        raise InputError(f"op: {op!r:.80} is not one of {known}" if op else f"op is missing; it is one of {known}")
    return op


def kernels(row: Mapping[str, Any], algorithm: str = "") -> tuple[Kernel, ...]:
    """The kernels of a row of kernels.csv, one after the other; attention goes by `algorithm`.

    Raises InputError: a column is missing, or has a value that cannot be.
    """
    op = op_of(row)
    if op in GEMMS:
        return (_gemm(row),)
    if op in PASSES:
        return (_pass(row, PASSES[op]),)
    if op in COPIES:
        return (HostCopy(float(whole(row, "bytes")), op),)  # type: ignore[arg-type]
    if op in COLLECTIVES:
        raise InputError(f"op: {op} is a collective, not a kernel")
    works: list[Kernel] = []
    for phase in ATTENTION[op]:
        work = _attention(row, algorithm, phase)
        works += _unfused(work) if algorithm == UNFUSED else [work]
    return tuple(works)


def algorithm_of(row: Mapping[str, Any]) -> str:
    """The attention algorithm that the row names in `algorithm`, or in its note (`impl=flash2`); empty if none."""
    implementation = re.search(r"impl=(\w+)", str(row.get("note") or ""))
    named = str(row.get("algorithm") or (implementation[1] if implementation else ""))
    return IMPLEMENTATIONS.get(named, named)


def collective(row: Mapping[str, Any], domain: int) -> Collective:
    """The collective of a row of collectives.csv among `domain` devices that share a fast fabric.

    Raises InputError: a column is missing, or has a value that cannot be.
    """
    op, devices = op_of(row), whole(row, "devices")
    return Collective(op, float(whole(row, "bytes")), devices, min(devices, domain))  # type: ignore[arg-type]


def _gemm(row: Mapping[str, Any]) -> Gemm:
    """A product; a note of kernels.csv says what it is written as (out=fp32) and whether it is added to what is there
    (accumulate=True: the sums are read once more).
    """
    dtype, note = str(row.get("dtype") or "bf16"), str(row.get("note") or "")
    layout = str(row.get("layout") or "TN")
    if layout not in ("TN", "NN", "NT"):
        raise InputError(f"layout: {layout!r:.80} is not one of TN, NN, NT")
    sparsity = str(row.get("sparsity") or "dense")
    if sparsity not in ("dense", "2:4"):
        raise InputError(f"sparsity: {sparsity!r:.80} is not one of dense, 2:4")
    m, n, k = (whole(row, key) for key in ("m", "n", "k"))
    batch = whole(row, "b", 1)
    noted = re.search(r"out=(\w+)", note)
    output = str(row.get("output_dtype") or (noted[1] if noted else dtype))
    added = bytes_of(output) * batch * m * n if "accumulate=True" in note else 0.0
    return Gemm(m, n, k, batch, dtype, output, layout, added, sparsity)  # type: ignore[arg-type]


def _attention(row: Mapping[str, Any], algorithm: str, phase: Phase) -> Attention:
    heads, seq = whole(row, "heads"), whole(row, "seq")
    kv_heads, causal = whole(row, "kv_heads", heads), _truth(row, "causal")
    batch, head_dim, dtype = whole(row, "b", 1), whole(row, "head_dim"), str(row.get("dtype") or "bf16")
    if heads % kv_heads:
        raise InputError(f"kv_heads: {kv_heads} must divide heads, {heads}")
    value_dim = whole(row, "value_dim", head_dim)
    return Attention(algorithm, phase, batch, heads, kv_heads, seq, seq, head_dim, causal, dtype, value_dim=value_dim)


def _unfused(work: Attention) -> list[Kernel]:
    """Attention as PyTorch's operators run it: products of all scores, whatever is masked, and passes over the scores.

    The kernels of attention_pytorch in benchmarks/benchmark_flash_attention.py of github.com/Dao-AILab/flash-attention,
    which drew the published charts. Forward: queries and values are copied apart by head, keys transposed; a mask is
    made anew (filled and cut in fp32, then cast) and added, read again for every head. Backward: dP and dV, softmax, dQ
    and dK, both times the scale, and the three gradients copied back into one tensor. A dropout of 0, a beta of 0 and
    casts to the same format start no kernel.
    """
    rows, batch, out = float(work.batch * work.heads * work.seq_q), work.batch * work.heads, work.format
    scores, square = rows * work.seq_k, float(work.seq_q) * work.seq_k
    queries, keys = rows * work.head_dim, float(batch) * work.seq_k * work.head_dim
    values, element = float(batch) * work.seq_k * work.value_dim, bytes_of(out)

    def product(m: int, n: int, k: int) -> Gemm:
        return Gemm(m, n, k, batch, out, out)

    def strided(elements: float, inputs: int, dimensions: int, kind: Literal["stream", "transpose"] = "stream") -> Pass:
        ops = inputs - 1 + dimensions * (_PER_DIMENSION + inputs + 1)
        return Pass(inputs * element * elements, element * elements, ops * elements, 0.0, out, kind)

    copies = [strided(queries, 1, 4), strided(keys, 1, 4, "transpose"), strided(values, 1, 4)]
    softmax, short = ELEMENT_WORK["softmax"], work.seq_k <= ELEMENT_WORK["softmax"].registers
    size, row = element * scores, element * work.seq_k
    if work.phase == "forward":
        full = 4.0 * square  # fp32
        mask = [Pass(0.0, full), Pass(full, full, square), Pass(full, element * square), strided(scores, 2, 2)]
        sweeps = 1.0 if short else softmax.sweeps
        ops, special = softmax.vector_ops * scores, softmax.special_ops * scores
        return [
            *copies[:2],
            product(work.seq_q, work.seq_k, work.head_dim),
            *(mask if work.causal else []),
            Pass(size, size, ops, special, out, "row", row, sweeps),
            copies[2],
            product(work.seq_q, work.value_dim, work.seq_k),
        ]
    scaled = [Pass(element * width, element * width, width, 0.0, out) for width in (queries, keys)]
    return [
        product(work.seq_q, work.seq_k, work.value_dim),
        product(work.seq_k, work.value_dim, work.seq_q),
        Pass(2.0 * size, size, 4.0 * scores, 0.0, out, "row", row, 1.0 if short else 2.0),
        product(work.seq_q, work.head_dim, work.seq_k),
        product(work.seq_k, work.head_dim, work.seq_q),
        *scaled,
        *copies,
    ]


def _pass(row: Mapping[str, Any], kind: str) -> Pass:
    work, dtype = ELEMENT_WORK[kind], str(row.get("dtype") or "bf16")
    if dtype not in _PASS_FORMATS:
        raise InputError(f"dtype: {dtype!r:.80} is not one of {', '.join(_PASS_FORMATS)}")
    length, element = whole(row, "n", 1), bytes_of(dtype)
    elements = float(whole(row, "m") * length * whole(row, "b", 1))
    return Pass(
        read_bytes=work.reads * element * elements,
        write_bytes=element * elements,
        vector_ops=work.vector_ops * elements,
        special_ops=work.special_ops * elements,
        format=dtype,
        kind=work.kind,
        row_bytes=element * length if work.kind == "row" else 0.0,
        sweeps=1.0 if length <= work.registers else work.sweeps,
    )


def whole(row: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """The positive whole number in column `key`. Raises InputError: missing without a default, or something else."""
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


def positive(row: Mapping[str, Any], key: str) -> float | None:
    """The positive number in column `key`; None where it is empty. Raises InputError: something else."""
    raw = row.get(key)
    if raw is None or raw == "":
        return None
    try:
        value = float(raw)
    except (TypeError, ValueError):
        value = math.nan
    if isinstance(raw, bool) or not 0.0 < value < math.inf:
        raise InputError(f"{key}: {raw!r:.80} must be a positive number")
    return value


def _truth(row: Mapping[str, Any], key: str) -> bool:
    raw = row.get(key)
    text = str(raw or False).lower()
    if text not in ("true", "false"):
        raise InputError(f"{key}: {raw!r:.80} must be true or false")
    return text == "true"
