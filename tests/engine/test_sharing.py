"""Max-min fairness, checked by its definition.

Nobody can be faster without slowing somebody who is no faster, or more urgent.
"""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosim.engine.sharing import speeds

RESOURCES = 3
demand_rows = st.lists(
    st.lists(
        st.tuples(st.integers(0, RESOURCES - 1), st.sampled_from([0.1, 0.25, 0.5, 1.0, 3.0])), min_size=1, max_size=3
    ),
    max_size=7,
)


@given(
    demand_rows,
    st.lists(st.integers(-1, 1), min_size=7, max_size=7),
    st.lists(st.floats(0.2, 4.0), min_size=3, max_size=3),
)
def test_every_task_below_full_speed_has_a_used_up_resource_where_it_is_among_the_fastest(demands, priority, capacity):
    priority = priority[: len(demands)]
    given_speeds = speeds(demands, priority, capacity)
    used = [0.0] * RESOURCES
    for row, speed in zip(demands, given_speeds, strict=True):
        assert 0.0 <= speed <= 1.0
        for resource, amount in row:
            used[resource] += amount * speed
    assert all(use <= limit * (1 + 1e-9) for use, limit in zip(used, capacity, strict=True))
    for task, row in enumerate(demands):
        if given_speeds[task] == 1.0:
            continue
        bottlenecks = []
        for resource in {resource for resource, _ in row}:
            # Less urgent tasks would have to yield, so they do not count as use.
            rivals = [t for t, other in enumerate(demands) if any(r == resource for r, _ in other)]
            taken = sum(
                amount * given_speeds[t]
                for t in rivals
                for r, amount in demands[t]
                if r == resource and priority[t] >= priority[task]
            )
            equals = [given_speeds[t] for t in rivals if priority[t] == priority[task]]
            full = taken >= capacity[resource] * (1 - 1e-8)
            bottlenecks.append(full and given_speeds[task] >= max(equals) - 1e-8)
        assert any(bottlenecks), (task, given_speeds)


def test_equal_flows_share_a_link_equally_and_to_the_last_bit_alike():
    for flows in range(1, 50):
        result = speeds([[(0, 1.0)]] * flows, [0] * flows, [1.0])
        assert result == [pytest.approx(1 / flows)] * flows
        assert len(set(result)) == 1


def test_a_flow_limited_elsewhere_leaves_its_share_to_the_others():
    # Bertsekas and Gallager's figure 6.10 in small: one flow crosses both links, link 0 carries two others.
    crossing, first, second, alone = speeds(
        [[(0, 1.0), (1, 1.0)], [(0, 1.0)], [(0, 1.0)], [(1, 1.0)]], [0] * 4, [0.9, 1.0]
    )
    assert (crossing, first, second) == (pytest.approx(0.3),) * 3
    assert alone == pytest.approx(0.7)


def test_the_urgent_take_what_they_need_and_the_rest_share_what_is_left():
    assert speeds([[(0, 1.0)], [(0, 0.25)], [(0, 1.0)]], [0, 5, 0], [1.0]) == [0.375, 1.0, 0.375]


def test_nothing_is_left_when_the_urgent_use_it_all():
    for flows in range(1, 30):  # 1/3 + 1/3 + 1/3 leaves 1e-16 by rounding, on which nobody may crawl
        assert speeds([[(0, 1.0)]] * flows + [[(0, 0.1)]], [1] * flows + [0], [1.0])[-1] == 0.0


def test_a_task_that_demands_more_than_there_is_runs_at_the_ratio():
    assert speeds([[(0, 4.0)]], [0], [1.0]) == [0.25]


def test_tasks_and_their_speeds_can_be_reordered_together():
    tasks = [[(0, 0.5)], [(0, 1.0), (1, 1.0)], [(1, 0.25)], [(0, 2.0)]]
    expected = speeds(tasks, [0, 0, 1, 1], [1.0, 0.5])
    for order in itertools.permutations(range(4)):
        result = speeds([tasks[i] for i in order], [[0, 0, 1, 1][i] for i in order], [1.0, 0.5])
        assert result == [pytest.approx(expected[i]) for i in order]
