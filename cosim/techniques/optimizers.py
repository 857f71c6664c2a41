"""What an optimizer needs beside its traced update: states per parameter, and what a sharded update sends.

Where ranks share the update (ZeRO 1 to 3), elementwise passes are cut by elements. Three optimizers need more:

- lamb: norms per tensor are sums over ranks, one all-reduce of all weight norms and one of all update norms, as in
  NVIDIA Apex's DistributedFusedLAMB.
- adafactor: the column statistics of a matrix whose rows are spread over ranks are an all-reduce per matrix; norms
  that the host reads are reduced where it reads them (see `cosim.mapping.data_parallel`).
- muon: a matrix is orthogonalised whole by one rank. With ZeRO 1 and 2 ranks own whole matrices, and the reduction
  and gathering of parameters are as ever; with ZeRO 3 momenta and updates cross in one all-to-all each way, in 16 bit
  (microsoft/dion, Muon on FSDP2). States are counted as if every rank held the same share of them.
- a fused optimizer under a loss scale reads on the device whether any rank's gradients overflowed: one all-reduce.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cosim.graph import Category, OpGraph, Parameter, Phase
from cosim.trace.vocabulary import kind_bytes, kind_flops

Collective = tuple[str, float]
"""Kind, and bytes of its buffer."""
_ORTHOGONALISED_BYTES = 2  # Newton-Schulz runs in bf16, so that is what crosses (kellerjordan.github.io/posts/muon)
_FLOPS_PER_BYTE = 100.0  # weighs a matrix's products against its passes when matrices are dealt out; any accelerator's
#                          ratio gives about the same deal


@dataclass(frozen=True, slots=True)
class UpdateTraffic:
    """Collectives that a sharded update needs, before and after it."""

    before: tuple[Collective, ...] = ()
    after: tuple[Collective, ...] = ()


NO_TRAFFIC = UpdateTraffic()


def state_bytes(graph: OpGraph) -> float:
    """Bytes of optimizer state per parameter with a gradient, as the traced optimizer holds them, masters apart.

    AdamW 8, Lion 4, SGD with momentum 4, LAMB 8, Muon 4 on matrices, Adafactor 4 (rows + columns) per matrix. Step
    counts, one number per tensor, are left out.
    """
    held = (graph.storage_category == Category.OPTIMIZER) & (graph.storage_alloc < 0)
    scalar = np.array([not shape for shape in graph.shapes], dtype=np.bool_)
    total = int(graph.storage_bytes[held & ~scalar[graph.storage_spec]].sum())
    trained = sum(math.prod(graph.shapes[p.spec]) for p in _distinct(graph))
    recipe = graph.provenance.get("options", {})
    master = recipe.get("master_format")
    if master is not None and master != recipe.get("parameter_format"):
        total -= 4 * graph.parameter_count(trainable_only=True)  # masters are fp32
    return total / trained if trained else 0.0


def whole_ops(graph: OpGraph) -> NDArray[np.bool_]:
    """Which ops of the update belong to one matrix and are done whole by the rank that does them."""
    whole: NDArray[np.bool_] = (graph.op_phase == Phase.OPTIMIZER) & (graph.op_module != 0)
    return whole


def shard_update(graph: OpGraph, optimizer: str, zero: int, degree: int) -> tuple[OpGraph, UpdateTraffic]:
    """The step of the rank with the most whole matrices to update, and what the update sends; both as they are where
    it is not sharded.
    """
    if zero == 0 or degree == 1:
        return graph, NO_TRAFFIC
    overflow = _overflow(graph)
    shapes = [graph.shapes[p.spec] for p in _distinct(graph)]
    if optimizer == "lamb":
        norms = ("all_reduce", 4.0 * len(shapes))
        return graph, UpdateTraffic(before=(*overflow, norms, norms))
    if optimizer == "adafactor":
        columns = [4.0 * math.prod(shape[:-2]) * shape[-1] for shape in shapes if len(shape) > 1]
        return graph, UpdateTraffic(before=(*overflow, *(("all_reduce", size) for size in columns)))
    casts = np.array([kind.op_class == "quantize" for kind in graph.kinds], dtype=np.bool_)[graph.op_kind]
    whole = whole_ops(graph) & ~casts  # every rank casts every weight that it multiplies
    traffic = UpdateTraffic(overflow)
    if not whole.any():
        return graph, traffic
    if zero == 3:
        names = {graph.modules[module] for module in np.unique(graph.op_module[whole]).tolist()}
        elements = sum(math.prod(graph.shapes[p.spec]) for p in graph.parameters if p.name in names)
        crossing = (("all_to_all", _ORTHOGONALISED_BYTES * elements / degree),)
        traffic = UpdateTraffic((*overflow, *crossing), crossing)
    return _largest_share(graph, whole, degree), traffic


def _overflow(graph: OpGraph) -> tuple[Collective, ...]:
    """The all-reduce of whether gradients overflowed, where no number goes to the host (which has its own)."""
    targets = {
        graph.kinds[kind].target for kind in np.unique(graph.op_kind[graph.op_phase == Phase.OPTIMIZER]).tolist()
    }
    tested = "aten._amp_foreach_non_finite_check_and_unscale_" in targets
    return (("all_reduce", 4.0),) if tested and "aten._local_scalar_dense" not in targets else ()


def _distinct(graph: OpGraph) -> list[Parameter]:
    """Parameters with a gradient; a tied one once."""
    found = {p.storage: p for p in graph.parameters if p.trained}
    return list(found.values())


def _largest_share(graph: OpGraph, whole: NDArray[np.bool_], ranks: int) -> OpGraph:
    """The graph without the matrices of other ranks; matrices are dealt largest first to the rank with the least."""
    work = np.array([kind_flops(graph, kind) + _FLOPS_PER_BYTE * sum(kind_bytes(graph, kind)) for kind in graph.kinds])
    cost = np.bincount(graph.op_module[whole], weights=work[graph.op_kind[whole]], minlength=len(graph.modules))
    matrices = np.unique(graph.op_module[whole])
    held: list[tuple[float, int, list[int]]] = [(0.0, rank, []) for rank in range(min(ranks, len(matrices)))]
    for matrix in sorted(matrices.tolist(), key=lambda m: -cost[m]):
        load, rank, mine = heapq.heappop(held)
        heapq.heappush(held, (load + cost[matrix], rank, [*mine, matrix]))
    mine = max(held)[2]
    return _without(graph, whole & ~np.isin(graph.op_module, mine))


def _without(graph: OpGraph, gone: NDArray[np.bool_]) -> OpGraph:
    """The graph without some ops; what they made never exists, what they freed goes with the op before them."""
    kept = np.flatnonzero(~gone)
    last_kept = np.append(np.cumsum(~gone) - 1, len(kept))  # and "never within the step" stays that
    made_by_gone = (graph.storage_alloc >= 0) & gone[np.maximum(graph.storage_alloc, 0)]
    alloc = np.where(graph.storage_alloc < 0, -1, last_kept[np.maximum(graph.storage_alloc, 0)])
    free = np.where(graph.storage_free < 0, -1, last_kept[np.maximum(graph.storage_free, 0)])
    rows = kept.tolist()
    return dataclasses.replace(
        graph,
        op_kind=graph.op_kind[kept],
        op_phase=graph.op_phase[kept],
        op_module=graph.op_module[kept],
        op_layer=graph.op_layer[kept],
        op_inputs=graph.op_inputs.of([graph.op_inputs.row(op).tolist() for op in rows]),
        op_outputs=graph.op_outputs.of([graph.op_outputs.row(op).tolist() for op in rows]),
        storage_alloc=np.where(made_by_gone, -1, alloc).astype(np.int32),
        storage_free=np.where(made_by_gone, -1, free).astype(np.int32),
    )
