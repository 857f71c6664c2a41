"""Which ranks of the cluster a group of a program's device stands for: the replicas that were folded, unfolded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cosim.parallel.groups import Group, Groups, groups
from cosim.parallel.layout import Sharding
from cosim.report import words

TIED = "tied"


@dataclass(frozen=True)
class Communicators:
    """The ranks of a run, `stage_ranks` for each of its pipeline stages.

    Device d of its program is stage d, and stands for the ranks from `d * stage_ranks` on.
    `numbers` has the groups that were asked for: members -> number, from 1 on (0 is ASTRA-sim's group of all ranks).
    """

    groups: Groups
    stages: int
    stage_ranks: int
    numbers: dict[tuple[int, ...], int] = field(default_factory=dict)

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> Communicators:
        """Those of an echoed run file."""
        stages = int(words.looked_up(spec, "parallel.pipeline", 1))
        stage_ranks = int(words.looked_up(spec, "system.devices", 1)) // stages
        tensor, context, expert, expert_tensor = (
            int(words.looked_up(spec, f"parallel.{key}", 1)) for key in ("tensor", "context", "expert", "expert_tensor")
        )
        sharding = Sharding(tensor, context=context, expert=expert, expert_tensor=expert_tensor)
        data = stage_ranks // (tensor * context)
        node = int(words.looked_up(spec, "system.nvlink_domain") or words.looked_up(spec, "system.devices_per_node", 8))
        within = node if words.looked_up(spec, "parallel.hybrid_shard") else None
        return cls(groups(sharding, data, stages, stage_ranks, within), stages, stage_ranks)

    @property
    def ranks(self) -> range:
        return range(self.stages * self.stage_ranks)

    def size(self, name: str) -> int:
        """How many ranks a group has."""
        return min(2, self.stages) if name == TIED else self._group(name).size

    def members(self, name: str, rank: int) -> tuple[int, ...]:
        """The ranks of a rank's group, in order."""
        if name == TIED:
            first = rank % self.stage_ranks
            return (first, first + (self.stages - 1) * self.stage_ranks)
        group = self._group(name)
        first = rank - rank // group.stride % group.size * group.stride
        return tuple(first + i * group.stride for i in range(group.size))

    def number(self, name: str, rank: int) -> int:
        """The number of a rank's group."""
        return self.numbers.setdefault(self.members(name, rank), len(self.numbers) + 1)

    def replica(self, rank: int, stage: int) -> int:
        """The rank at the same place of another stage."""
        return stage * self.stage_ranks + rank % self.stage_ranks

    def _group(self, name: str) -> Group:
        found: Group = getattr(self.groups, name)
        return found
