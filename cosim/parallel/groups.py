"""Which ranks talk to each other: the groups of every kind of parallelism, and where their members sit.

Ranks are numbered with tensor parallelism fastest, then context, data and pipeline (Megatron-LM's order tp-cp-dp-pp),
so that the groups that talk most share a node. Experts fold the ranks of one pipeline stage anew: expert tensor
parallelism fastest, then experts, then the replicas of experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cosim.parallel.layout import Sharding
from hwmodels.units import InputError
from hwmodels.work import Collective


@dataclass(frozen=True, slots=True)
class Group:
    """`size` ranks, `stride` from one to the next; `per_node` of them on one fast fabric, where `concurrent` groups
    alike share the ports of a node.
    """

    size: int
    per_node: int
    stride: int = 1
    concurrent: int = 1

    def collective(self, kind: str, bytes: float) -> Collective:
        """The work of one collective of this group; `bytes` is the full buffer."""
        return Collective(kind, bytes, self.size, self.per_node, self.stride, self.concurrent)  # type: ignore[arg-type]


def group(size: int, stride: int, domain: int, devices: int) -> Group:
    """The group of `size` ranks that are `stride` apart, on fabrics of `domain` devices."""
    per_node = min(size, max(1, domain // stride))
    return Group(size, per_node, stride, max(1, min(stride, domain, devices // size) if per_node < size else 1))


@dataclass(frozen=True, slots=True)
class Groups:
    """The groups of one rank."""

    tensor: Group
    context: Group
    expert: Group  # those that hold different experts: rows of tokens travel among them
    expert_tensor: Group  # those that share each expert's matrices
    data: Group  # those that hold the same parameters: replicas, and context-parallel ranks
    expert_data: Group  # those that hold the same experts
    pipeline: Group
    replicate: Group  # with hybrid sharding, those that hold the same shards; else this rank alone

    @property
    def distinct(self) -> tuple[Group, ...]:
        """All groups that a rank has a communicator for; those of experts count where experts are divided."""
        parted = self.expert.size * self.expert_tensor.size > 1
        experts = (self.expert, self.expert_tensor, self.expert_data) if parted else ()
        return (self.tensor, self.context, self.data, self.pipeline, self.replicate, *experts)

    def of(self, name: str) -> Group:
        """The group that a collective of a rank's graph names."""
        found: Group = getattr(self, name)
        return found


def groups(sharding: Sharding, data: int, pipeline: int, domain: int, shard_within: int | None = None) -> Groups:
    """The groups of a run with `data` replicas and `pipeline` stages, on fabrics of `domain` devices.

    With hybrid sharding parameters are sharded over the ranks of a node of `shard_within` devices, and replicated
    across nodes: gathers and reduce-scatters stay inside, then each rank's shard of the gradients is all-reduced over
    those that hold the same (pytorch/torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py, foreach_reduce with an
    all_reduce_group; Zhao et al. 2023, arXiv 2304.11277).

    Raises InputError: experts over more ranks than a stage has, or over a number that does not divide them.
    """
    tensor, context = sharding.tensor, sharding.context
    stage = tensor * context * data
    devices = stage * pipeline
    experts = sharding.expert * sharding.expert_tensor
    if stage % experts:
        raise InputError(
            f"parallel.expert: {sharding.expert} x expert_tensor {sharding.expert_tensor} must divide the {stage} "
            "devices of a pipeline stage"
        )
    same = context * data
    inside = same if shard_within is None else min(same, shard_within // tensor)
    if shard_within is not None and (inside < 2 or same % inside):
        raise InputError(
            f"parallel.hybrid_shard: of the {same} ranks that hold the same parameters {inside} are in one node; a "
            "node shards over two or more, as many in each; leave it out"
        )
    made: Mapping[str, Group] = {
        "tensor": group(tensor, 1, domain, devices),
        "context": group(context, tensor, domain, devices),
        "expert": group(sharding.expert, sharding.expert_tensor, domain, devices),
        "expert_tensor": group(sharding.expert_tensor, 1, domain, devices),
        "data": group(inside, tensor, domain, devices),
        "replicate": group(same // inside, tensor * inside, domain, devices),
        "expert_data": group(stage // experts, experts, domain, devices),
        "pipeline": group(pipeline, stage, domain, devices),
    }
    return Groups(**made)
