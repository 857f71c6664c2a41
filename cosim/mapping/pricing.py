"""What each kind of op costs on an accelerator: kernels are chosen here, their time comes from the hardware models.

Every kind of op is priced once, however often it occurs. A matrix product becomes a `Gemm`, attention an `Attention` by
the named algorithm, views nothing, and everything else one pass over memory with the vocabulary's vector and special-
function counts.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cosim.graph import OpGraph, OpKind, Phase
from cosim.parallel.communication import COLLECTIVE
from cosim.stacks.stack import Stack
from cosim.techniques.gradient_buffer import ACCUMULATES
from cosim.techniques.optimizers import whole_ops
from cosim.trace.vocabulary import (
    attention_dims,
    convolution_products,
    kind_bytes,
    lookup,
    matmul_dims,
    matmul_operands,
)
from hwmodels.accelerator import Accelerator
from hwmodels.units import InputError
from hwmodels.work import Attention, Cost, Gemm, Pass

Floats = NDArray[np.float64]
Access = Literal["stream", "row", "gather", "transpose"]
# The access pattern of each class that is a pass over memory.
_ACCESS: Mapping[str, Access] = {
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
    """What the software decides about a step's kernels: formats of fp32 products, the attention algorithm."""

    fp32_matmul: str  # "fp32" or "tf32"
    attention: str
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


def price(graph: OpGraph, accelerator: Accelerator, kernels: Kernels, optimizer_shards: int) -> Prices:
    """The price of every op, those of an update that is spread over `optimizer_shards` ranks cut by that.

    Raises InputError where the accelerator lacks a format that the step needs.
    """
    sharded = ((graph.op_phase == Phase.OPTIMIZER) & ~whole_ops(graph)).astype(np.int64)
    place = graph.op_kind.astype(np.int64) * 2 + sharded
    distinct, inverse = np.unique(place, return_inverse=True)
    rows = [
        _price_kind(graph, int(p) // 2, optimizer_shards if p % 2 else 1, accelerator, kernels)
        for p in distinct.tolist()
    ]
    numbers = np.array([row[:6] for row in rows], dtype=np.float64).reshape(len(rows), 6)[inverse]
    return Prices(
        time_s=numbers[:, 0],
        flops=numbers[:, 1],
        hbm_bytes=numbers[:, 2],
        energy_j=numbers[:, 3],
        core_share=numbers[:, 4],
        memory_share=numbers[:, 5],
        kernels=np.array([row[6] for row in rows], dtype=np.int64)[inverse],
        limited_by=tuple(row[7] for row in rows),
        limit=inverse.astype(np.int32),
    )


def _price_kind(
    graph: OpGraph, kind: int, shards: int, accelerator: Accelerator, kernels: Kernels
) -> tuple[float, float, float, float, float, float, int, str]:
    works = works_of(graph, graph.kinds[kind], kernels, shards)
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
    if kind.op_class in ("view", COLLECTIVE):  # collectives: see cosim.mapping.collectives
        return []
    if kind.op_class == "matmul":
        product = gemm(graph, kind, kernels.fp32_matmul)
        return [dataclasses.replace(product, m=-(-product.m // shards))]
    if kind.op_class == "convolution":
        return list(convolution(graph, kind, kernels.fp32_matmul))
    if kind.op_class in ("attention", "attention_backward"):
        return attention(graph, kind, kernels)
    whole = memory_pass(graph, kind, shards)
    if kind.op_class == "norm_backward" and kind.target != "fused":
        # one kernel for the input's gradient, one that reads the same again for the weights'
        return [whole, Pass(whole.read_bytes, 0.0, whole.vector_ops / 2, 0.0, whole.format, "row")]
    return [whole]


def gemm(graph: OpGraph, kind: OpKind, fp32_matmul: str) -> Gemm:
    """The product that aten.mm, addmm, bmm, baddbmm or a grouped one does; formats are the operands'."""
    batch, m, n, k = matmul_dims(graph, kind)
    dtype = graph.specs[kind.inputs[matmul_operands(kind)[0]]].dtype
    result = graph.specs[kind.outputs[0]]
    return Gemm(
        m=m,
        n=n,
        k=k,
        batch=batch,
        format=fp32_matmul if dtype == "fp32" else dtype,
        output_format=result.dtype,
        layout=kind.attribute("layout", "TN"),
        epilogue_bytes=batch * m * n * result.itemsize if kind.attribute(ACCUMULATES) else 0.0,
    )


def convolution(graph: OpGraph, kind: OpKind, fp32_matmul: str) -> list[Gemm]:
    """A convolution as implicit products (cuDNN's implicit GEMM); its input is read once, not unfolded in memory."""
    dtype = graph.specs[kind.inputs[0]].dtype
    compute = fp32_matmul if dtype == "fp32" else dtype
    return [Gemm(m=m, n=n, k=k, format=compute, output_format=dtype) for m, n, k in convolution_products(graph, kind)]


def attention(graph: OpGraph, kind: OpKind, kernels: Kernels) -> list[Gemm | Attention | Pass]:
    """The attention kernel of a cosim.attention op or its backward, and the copies that the stack makes around it."""
    backward = kind.op_class == "attention_backward"
    batch, heads, kv_heads, seq_q, seq_k, head_dim, value_dim = attention_dims(graph, kind)
    element = graph.specs[kind.inputs[backward]].dtype
    itemsize = float(graph.specs[kind.inputs[backward]].itemsize)
    stack = kernels.stack
    repeated = stack.repeat_kv and kv_heads < heads
    causal = bool(kind.attribute("causal", False))
    if causal and _sees_more(graph, kind, backward):
        causal, seq_k = False, max(1, seq_k // 2)
    kernel = Attention(
        algorithm=kernels.attention,
        phase="backward" if backward else "forward",
        batch=batch,
        heads=heads,
        kv_heads=heads if repeated else kv_heads,
        seq_q=seq_q,
        seq_k=seq_k,
        head_dim=head_dim,
        causal=causal,
        format=element,
        dropout=float(kind.attribute("dropout", 0.0)) > 0,
        bias=len(kind.inputs) > (7 if backward else 3),
        value_dim=value_dim,
    )
    works: list[Gemm | Attention | Pass] = [kernel]
    if repeated:  # k and v to all heads; in backward their gradients are summed over the group
        for width in (head_dim, value_dim):
            few, many = (itemsize * batch * n * seq_k * width for n in (kv_heads, heads))
            works.append(Pass(many, few, many / itemsize) if backward else Pass(few, many))
    if stack.attention_unpadded and kernels.attention in ("flash-1", "flash-2", "flash-3"):
        for width in (head_dim, head_dim, value_dim, value_dim):  # q, k, v and the result
            size = itemsize * batch * heads * seq_q * width
            works.append(Pass(size, size, kind="gather"))
    return works


def _sees_more(graph: OpGraph, kind: OpKind, backward: bool) -> bool:
    """Whether queries are a part of the sequence that keys have whole: a context-parallel rank's, which is given an
    early and a late part of it, so that it sees half of the keys without a mask (zigzag: Llama 3, arXiv 2407.21783).
    """
    queries, keys = (graph.specs[spec].dims[2] for spec in kind.inputs[backward : backward + 2])
    return queries != keys and "context_sequence" in keys


def memory_pass(graph: OpGraph, kind: OpKind, shards: int = 1) -> Pass:
    """One kernel that reads every input and writes every output once; written inputs count both ways.

    Pointwise kernels compute in fp32 whatever they read (PyTorch's opmath).
    """
    read, write = kind_bytes(graph, kind)
    vector_ops, special_ops = arithmetic(graph, kind)
    access: Access = kind.attribute("access") or _ACCESS.get(kind.op_class, "stream")
    return Pass(
        read / shards,
        write / shards,
        vector_ops / shards,
        special_ops / shards,
        "fp32",
        access,
    )


def arithmetic(graph: OpGraph, kind: OpKind) -> tuple[float, float]:
    """Vector and special-function operations of a whole op; of a fused one, those of all its members."""
    members = kind.attribute("members")
    if members:
        pairs = [arithmetic(graph, graph.kinds[member]) for member in members]
        return math.fsum(vector for vector, _ in pairs), math.fsum(special for _, special in pairs)
    entry = lookup(kind.target)
    per_element = kind.attribute("vector_ops", entry.vector_ops)
    sizes = [math.prod(graph.shapes[spec]) for spec in (*kind.inputs, *kind.outputs)]
    elements = max(sizes, default=0)
    if kind.op_class == "optimizer":  # over lists of tensors, the parameters first: written, unlike what comes next
        parameters = itertools.takewhile(lambda pair: pair[0] == pair[1], enumerate(kind.mutated))
        elements = sum(sizes[place] for place, _ in parameters)
    elif "_foreach_" in kind.target:  # all elements of one list
        lists = max(1, len(kind.inputs) // max(1, len(kind.mutated or kind.outputs)))
        elements = sum(sizes[: len(kind.inputs)]) // lists
    return per_element * elements, entry.special_ops * elements


def attention_algorithm(choice: str, stack: Stack, accelerator: Accelerator, compute: str) -> str:
    """The algorithm that runs attention: what the run names; for "flash", the stack's choice for the chip.

    Fused kernels compute in 16 bit or less: "flash" in fp32 or tf32 means unfused. Raises InputError where the run
    names a fused kernel that lacks the format.
    """
    wide = compute in ("fp32", "tf32")
    if choice == "flash":
        return "unfused" if wide else stack.attention.on(accelerator.architecture)
    if choice != "unfused" and wide:
        raise InputError(
            f"training.attention: {choice} does not compute in training.precision {compute}; "
            "allowed: unfused, flash (unfused in this format), or precision bf16 or fp16"
        )
    return choice
