"""How fast tasks run that share resources: max-min fair, higher priorities first.

The function is pure, and its floating-point order is part of the contract, so that engines in other languages give the
same bits (IEEE double, round to nearest, no fused multiply-add, no reassociation):

    left[r] = capacity[r]
    for each priority, highest first; its tasks, in the order given, are the rising ones; level = 0:
        while tasks are rising:
            load[r]  = 0 + amount + amount + ...   over the rising tasks in order, and each one's demands in order
            reach[r] = left[r] / load[r]           where load[r] > 0
            level    = min(1, max(level, the least reach[r]))
            those that stop: all that rise if level is 1, else those with a demand on an r with reach[r] <= level
            for each that stops, in order, its speed is level, and for each of its demands, in order:
                left[r] = left[r] - amount * level, and 0 if that is <= USED_UP * capacity[r]

Bertsekas and Gallager, Data Networks (1992), section 6.5.2: progressive filling is the max-min fair allocation.
"""

from __future__ import annotations

from collections.abc import Sequence

USED_UP = 1e-9
"""A resource with at most this share of its capacity left is used up: no task crawls on what rounding left over."""

Demand = tuple[int, float]
"""Resource, and how much of its capacity the task uses at speed 1 (> 0)."""


def speeds(demands: Sequence[Sequence[Demand]], priority: Sequence[int], capacity: Sequence[float]) -> list[float]:
    """The speed of each task, from 0 (starved by higher priorities) to 1 (has all that it demands)."""
    result = [0.0] * len(demands)
    left = list(capacity)
    for urgency in sorted(set(priority), reverse=True):
        rising = [task for task, its in enumerate(priority) if its == urgency]
        level = 0.0
        while rising:
            load: dict[int, float] = {}
            for task in rising:
                for resource, amount in demands[task]:
                    load[resource] = load.get(resource, 0.0) + amount
            reach = {resource: left[resource] / total for resource, total in load.items()}
            level = min(1.0, max(level, min(reach.values(), default=1.0)))
            stopped = {task for task in rising if level == 1.0 or any(reach[r] <= level for r, _ in demands[task])}
            for task in rising:
                if task not in stopped:
                    continue
                result[task] = level
                for resource, amount in demands[task]:
                    left[resource] -= amount * level
                    if left[resource] <= USED_UP * capacity[resource]:
                        left[resource] = 0.0
            rising = [task for task in rising if task not in stopped]
    return result
