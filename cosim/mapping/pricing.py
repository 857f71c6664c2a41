"""What each kind of op costs on an accelerator: kernels are chosen here, their time comes from the hardware models.

Every kind of op is priced once, however often it occurs. A matrix product becomes a `Gemm`, attention an `Attention` by
the named algorithm, views nothing, and everything else one pass over memory with the vocabulary's vector and special-
function counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cosim.graph import OpGraph, OpKind, Phase
from cosim.stacks.stack import Stack
from cosim.trace.vocabulary import lookup
from hwmodels.accelerator import Accelerator
from hwmodels.units import InputError
from hwmodels.work import Attention, Cost, Gemm, Pass

Floats = NDArray[np.float64]
FLOAT_FORMATS = frozenset({"fp64", "fp32", "fp16", "bf16"})
# The access pattern of each class that is a pass over memory.
_ACCESS: Mapping[str, str] = {
    "norm": "row",
    "norm_backward": "row",
    "softmax": "row",
    "softmax_backward": "row",
    "loss": "row",
    "reduction": "row",
    "gather": "gather",
    "scatter": "gather",
}


@dataclass(frozen=True, slots=True)
class Kernels:
    """What the software decides about a step's kernels: formats of fp32 products, the attention algorithm, sharded
    updates.
    """

    fp32_matmul: str  # "fp32" or "tf32"
    attention: str
    optimizer_shards: int
    stack: Stack


@dataclass(frozen=True, slots=True)
class Prices:
    """Per op of the graph, at the nominal clock and alone on the device."""

    time_s: Floats
    flops: Floats
    hbm_bytes: Floats
    energy_j: Floats
    core_share: Floats
    memory_share: Floats
    kernels: NDArray[np.int64]  # launched; 0 for views
    limited_by: tuple[str, ...]  # per kind and place, see `limit`
    limit: NDArray[np.int32]


def price(graph: OpGraph, accelerator: Accelerator, kernels: Kernels) -> Prices:
    """The price of every op; raises InputError where the accelerator lacks a format that the step needs."""
    sharded = (graph.op_phase == Phase.OPTIMIZER).astype(np.int64)
    place = graph.op_kind.astype(np.int64) * 2 + sharded
    distinct, inverse = np.unique(place, return_inverse=True)
    rows = [_price_kind(graph, int(p) // 2, int(p) % 2 == 1, accelerator, kernels) for p in distinct.tolist()]
    numbers = np.array([row[:6] for row in rows], dtype=np.float64).reshape(len(rows), 6)
    launches = np.array([row[6] for row in rows], dtype=np.int64)
    return Prices(
        *(numbers[inverse, i] for i in range(6)),
        launches[inverse],
        tuple(row[7] for row in rows),
        inverse.astype(np.int32),
    )


def _price_kind(
    graph: OpGraph, kind: int, in_optimizer: bool, accelerator: Accelerator, kernels: Kernels
) -> tuple[float, float, float, float, float, float, int, str]:
    works = works_of(graph, graph.kinds[kind], kernels, kernels.optimizer_shards if in_optimizer else 1)
    if not works:
        return (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0, "nothing")
    costs = [accelerator.cost(work) for work in works]
    time = math.fsum(cost.time_s for cost in costs)
    longest = max(costs, key=lambda cost: cost.time_s)

    def mean(share: str) -> float:
        return math.fsum(getattr(cost, share) * cost.time_s for cost in costs) / time if time else 0.0

    return (
        time,
        math.fsum(cost.flops for cost in costs),
        math.fsum(_hbm(cost) for cost in costs),
        math.fsum(cost.energy_j for cost in costs),
        mean("core_share"),
        mean("memory_share"),
        len(costs),
        longest.limited_by,
    )


def _hbm(cost: Cost) -> float:
    return cost.bytes_per_level.get("hbm", 0.0)


def works_of(graph: OpGraph, kind: OpKind, kernels: Kernels, shards: int = 1) -> list[Gemm | Attention | Pass]:
    """The kernels that run an op of this kind, in order; `shards` divides an update that is spread over ranks."""
    if kind.op_class == "view":
        return []
    if kind.op_class == "matmul":
        return [gemm(graph, kind, kernels.fp32_matmul)]
    if kind.op_class in ("attention", "attention_backward"):
        return [attention(graph, kind, kernels.attention)]
    if kind.op_class.startswith("norm") and _is_decomposed(kind, kernels.stack):
        return list(_decomposed_norm(graph, kind))
    whole = memory_pass(graph, kind, shards)
    if kind.op_class == "norm_backward":
        # one kernel for the input's gradient, one that reads the same again for the weights'
        return [whole, Pass(whole.read_bytes, 0.0, whole.vector_ops / 2, 0.0, whole.format, "row")]
    return [whole]


def gemm(graph: OpGraph, kind: OpKind, fp32_matmul: str) -> Gemm:
    """The product that aten.mm, addmm, bmm or baddbmm does: [batch,] m x k by k x n, formats from the operands."""
    a, b = kind.inputs[-2:]
    left, right = graph.shapes[a], graph.shapes[b]
    dtype = graph.specs[a].dtype
    element = fp32_matmul if dtype == "fp32" else dtype
    return Gemm(
        m=left[-2] if len(left) > 1 else 1,
        n=right[-1] if len(right) > 1 else 1,
        k=left[-1],
        batch=math.prod(left[:-2]),
        format=element,
        output_format=graph.specs[kind.outputs[0]].dtype,
        layout=kind.attribute("layout", "TN"),
    )


def attention(graph: OpGraph, kind: OpKind, algorithm: str) -> Attention:
    """The attention that a cosim.attention op or its backward does; q, k, v come after the output's gradient in
    backward.
    """
    backward = kind.op_class == "attention_backward"
    q, k = (graph.shapes[spec] for spec in kind.inputs[backward : backward + 2])
    dtype = graph.specs[kind.inputs[backward]].dtype
    return Attention(
        algorithm=algorithm,
        phase="backward" if backward else "forward",
        batch=q[0],
        heads=q[1],
        kv_heads=k[1],
        seq_q=q[2],
        seq_k=k[2],
        head_dim=q[3],
        causal=bool(kind.attribute("causal", False)),
        format=dtype,
        dropout=float(kind.attribute("dropout", 0.0)) > 0,
        bias=bool(kind.attribute("alibi", False)),
    )


def memory_pass(graph: OpGraph, kind: OpKind, shards: int = 1) -> Pass:
    """One kernel that reads every input and writes every output once; written inputs count both ways."""
    entry = lookup(kind.target)
    sizes = graph.spec_bytes
    outputs = kind.outputs or tuple(kind.inputs[i] for i in kind.mutated)
    read = float(sum(sizes[spec] for spec in kind.inputs))
    write = float(sum(sizes[spec] for spec in kind.outputs) + sum(sizes[kind.inputs[i]] for i in kind.mutated))
    if kind.op_class in ("gather", "scatter"):
        read, write = _indexed_bytes(graph, kind, read, write)
    elements = max((math.prod(graph.shapes[spec]) for spec in outputs), default=0)
    if kind.op_class in ("reduction", "loss", "optimizer"):
        elements = max((math.prod(graph.shapes[spec]) for spec in kind.inputs), default=elements)
    if kind.op_class == "optimizer":
        elements = sum(math.prod(graph.shapes[kind.inputs[i]]) for i in kind.mutated) // 3 or elements
    return Pass(
        read / shards,
        write / shards,
        entry.vector_ops * elements / shards,
        entry.special_ops * elements / shards,
        _vector_format(graph, kind),
        _ACCESS.get(kind.op_class, "stream"),  # type: ignore[arg-type]
    )


def _indexed_bytes(graph: OpGraph, kind: OpKind, read: float, write: float) -> tuple[float, float]:
    """A gather reads only the rows that it returns; a scatter reads and writes only the rows that it is given, and
    zeroes the rest.
    """
    sizes = [float(graph.spec_bytes[spec]) for spec in kind.inputs]
    if kind.op_class == "gather":
        table = max(sizes, default=0.0)
        return min(read, read - table + write), write
    return read, write + max(sizes, default=0.0)


def _vector_format(graph: OpGraph, kind: OpKind) -> str:
    """Pointwise kernels compute in fp32 whatever they read (PyTorch's opmath), integers in 32 bits."""
    del graph, kind
    return "fp32"


def _is_decomposed(kind: OpKind, stack: Stack) -> bool:
    fused = stack.rms_norm_fused if "rms_norm" in kind.target else stack.layer_norm_fused
    return not fused


def _decomposed_norm(graph: OpGraph, kind: OpKind) -> list[Pass]:
    """A norm as elementary operations: cast, square, mean, multiply by 1/rms, cast, scale; backward about twice as
    many.

    Hugging Face's and LLaMA's RMSNorm.forward are written so; each is a pass over the activations in fp32 or its own
    format.
    """
    largest = max(kind.inputs, key=lambda spec: int(graph.spec_bytes[spec]))
    n = float(math.prod(graph.shapes[largest]))
    own = float(graph.specs[largest].itemsize)
    forward = [(own, 4.0), (4.0, 4.0), (4.0, 0.0), (4.0, 4.0), (4.0, own), (own, own)]
    backward = [(2 * own, own), (2 * own, 0.0), (own, 4.0), (8.0, 4.0), (8.0, 0.0), (8.0, 4.0), (4.0, 4.0), (4.0, own)]
    rows = backward if kind.op_class == "norm_backward" else forward
    return [Pass(read * n, write * n, n, 0.0, "fp32", "stream" if write else "row") for read, write in rows]


def attention_algorithm(choice: str | None, stack: Stack, architecture: str) -> str:
    """The algorithm that runs the attention op: what the run names, or the stack's default on the chip for "flash"
    or silence.
    """
    if choice not in (None, "flash"):
        return str(choice)
    default = stack.attention.on(architecture)
    return "flash-2" if default == "unfused" and choice == "flash" else default


def check_format(accelerator: Accelerator, format_name: str, where: str) -> None:
    """Raise InputError when the matrix unit has no such format."""
    try:
        accelerator.peak_flops(format_name)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def as_detail(cost: Cost) -> dict[str, Any]:
    """A cost as plain data."""
    return {
        "time_s": cost.time_s,
        "flops": cost.flops,
        "bytes": dict(cost.bytes_per_level),
        "limited_by": cost.limited_by,
    }
