"""Finds the blocks that a model repeats: numbered modules whose operators are the same, in forward and in backward.

Any numbered container counts (`layers.3`, `h.3`, `encoder.layer.3`); the outermost one whose instances repeat is
taken. Two instances are the same when the sequence of op kinds under them is, for each phase. Nothing repeats, no
blocks: nobody minds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cosim.graph import Block, Phase

Layers = Mapping[str, int]  # module path of an instance -> its number


@dataclass(slots=True)
class _Instance:
    """The op kinds under one numbered module, in the order in which they ran."""

    forward: list[int] = field(default_factory=list)
    backward: list[int] = field(default_factory=list)
    recompute: list[int] = field(default_factory=list)
    first: int = -1

    def signature(self) -> tuple[tuple[int, ...], ...]:
        return tuple(self.forward), tuple(self.backward), tuple(self.recompute)


def find_blocks(
    modules: Sequence[str], op_module: NDArray[np.int32], op_kind: NDArray[np.int32], op_phase: NDArray[np.int8]
) -> tuple[tuple[Block, ...], NDArray[np.int32], Layers]:
    """(blocks, the layer of each op, the layer of each instance's module path); -1 and empty where nothing repeats."""
    containers = _containers(modules)
    for depth in sorted({prefix.count(".") for prefix in containers}):
        chosen = {prefix for prefix in containers if prefix.count(".") == depth}
        instance_of = _instances(modules, chosen)
        seen = _collect(instance_of, op_module, op_kind, op_phase)
        groups = _groups(seen)
        if any(len(paths) > 1 for paths in groups.values()):
            return _number(groups, seen, instance_of, len(modules), op_module, op_phase)
    return (), np.full(len(op_kind), -1, dtype=np.int32), {}


def layer_of_path(name: str, layers: Layers) -> int:
    """The layer that owns a parameter or module of this qualified name; -1 if none does."""
    parts = name.split(".")
    return next((layers[path] for i in range(len(parts)) if (path := ".".join(parts[: i + 1])) in layers), -1)


def _containers(modules: Sequence[str]) -> set[str]:
    """Paths of modules that have numbered children, outermost first on each path."""
    found = set()
    for path in modules:
        parts = path.split(".")
        for i, part in enumerate(parts):
            if part.isdigit():
                found.add(".".join(parts[:i]))
    return found


def _instances(modules: Sequence[str], containers: set[str]) -> dict[int, str]:
    """Module row -> path of the numbered child of one of the containers under which it lives."""
    found: dict[int, str] = {}
    for row, path in enumerate(modules):
        parts = path.split(".")
        for i, part in enumerate(parts):
            if part.isdigit() and ".".join(parts[:i]) in containers:
                found[row] = ".".join(parts[: i + 1])
                break
    return found


def _collect(
    instance_of: Mapping[int, str], op_module: NDArray[np.int32], op_kind: NDArray[np.int32], op_phase: NDArray[np.int8]
) -> dict[str, _Instance]:
    seen: dict[str, _Instance] = {}
    rows = zip(op_module.tolist(), op_kind.tolist(), op_phase.tolist(), strict=True)
    for op, (module, kind, phase) in enumerate(rows):
        path = instance_of.get(module)
        if path is None or phase == Phase.OPTIMIZER:
            continue
        instance = seen.setdefault(path, _Instance(first=op))
        (instance.forward, instance.backward, instance.recompute)[phase].append(kind)
    return seen


def _groups(seen: Mapping[str, _Instance]) -> dict[tuple[str, tuple[tuple[int, ...], ...]], list[str]]:
    """Instances of one container with the same operators, in forward order."""
    groups: dict[tuple[str, tuple[tuple[int, ...], ...]], list[str]] = {}
    for path, instance in sorted(seen.items(), key=lambda item: item[1].first):
        groups.setdefault((path.rpartition(".")[0], instance.signature()), []).append(path)
    return groups


def _number(
    groups: Mapping[tuple[str, tuple[tuple[int, ...], ...]], list[str]],
    seen: Mapping[str, _Instance],
    instance_of: Mapping[int, str],
    module_count: int,
    op_module: NDArray[np.int32],
    op_phase: NDArray[np.int8],
) -> tuple[tuple[Block, ...], NDArray[np.int32], Layers]:
    """Layers are numbered in forward order; a container none of whose instances repeat has no layers."""
    repeating = {container for (container, _), paths in groups.items() if len(paths) > 1}
    kept = sorted((p for (c, _), paths in groups.items() if c in repeating for p in paths), key=lambda p: seen[p].first)
    layers = {path: number for number, path in enumerate(kept)}
    blocks = tuple(
        Block(
            f"{container}.*" if container else "*",
            tuple(layers[path] for path in paths),
            len(seen[paths[0]].forward),
            len(seen[paths[0]].backward),
        )
        for (container, _), paths in groups.items()
        if container in repeating
    )
    of_module = np.full(module_count, -1, dtype=np.int32)
    for module, path in instance_of.items():
        of_module[module] = layers.get(path, -1)
    op_layer = np.where(op_phase == Phase.OPTIMIZER, -1, of_module[op_module]) if len(op_module) else op_module
    return blocks, op_layer.astype(np.int32), layers
