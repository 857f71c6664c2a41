"""Collectives among a rank's ops: who sends how much, after what."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cosim.graph import OpGraph

COLLECTIVE = "collective"
"""The op class of a collective; its kind's attributes are `group` and `streamed`."""


@dataclass(frozen=True, slots=True)
class Communication:
    """Op `op` of the rank's graph sends what op `after` made (-1: what was there before the step).

    `kind` is as in `hwmodels.work.Collective`, and `bytes` is the full buffer as it counts it. `group` is "tensor",
    "context", "expert" or "expert_tensor". `streamed`: it is taken apart into as many messages as the group has
    members, which travel under the op that reads or made the data (a ring around attention).
    """

    op: int
    after: int
    kind: str
    group: str
    bytes: int
    streamed: bool


def communications(graph: OpGraph) -> tuple[Communication, ...]:
    """The collectives of a rank's graph, in order."""
    collective = np.array([kind.op_class == COLLECTIVE for kind in graph.kinds], dtype=np.bool_)
    wanted = np.flatnonzero(collective[graph.op_kind]) if len(graph.kinds) else np.zeros(0, dtype=np.int64)
    if not len(wanted):
        return ()
    made: dict[int, int] = {}  # storage -> the op that last wrote it
    found: list[Communication] = []
    ends = set(wanted.tolist())
    storage = graph.tensor_storage
    for op in range(len(graph)):
        kind = graph.kinds[graph.op_kind[op]]
        inputs = storage[graph.op_inputs.row(op)].tolist()
        if op in ends:
            read = sum(int(graph.spec_bytes[spec]) for spec in kind.inputs)
            written = sum(int(graph.spec_bytes[spec]) for spec in kind.outputs)
            after = max((made.get(s, op - 1 if graph.storage_alloc[s] >= 0 else -1) for s in inputs), default=-1)
            name, group = kind.target.removeprefix("cosim."), str(kind.attribute("group"))
            found.append(Communication(op, after, name, group, max(read, written), bool(kind.attribute("streamed"))))
        for s in storage[graph.op_outputs.row(op)].tolist():
            if kind.op_class != "view":
                made[s] = op
        for place in kind.mutated:
            made[inputs[place]] = op
    return tuple(found)
