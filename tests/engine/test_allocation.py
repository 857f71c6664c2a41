"""Blocks as PyTorch's allocator rounds them, and what is alive during each op."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosim.engine.allocation import lifetime_profile, round_allocation

GIB = 2**30


def test_blocks_are_whole_512_bytes_and_nothing_takes_nothing():
    assert round_allocation([0, 1, 511, 512, 513, 80 * GIB]).tolist() == [0, 512, 512, 512, 1024, 80 * GIB]
    assert round_allocation([1, 256, 257], 256).tolist() == [256, 256, 512]


ops_and_storages = st.integers(1, 6).flatmap(
    lambda ops: st.tuples(
        st.lists(st.integers(0, 5), min_size=ops, max_size=ops),
        st.lists(
            st.tuples(st.integers(-1, ops), st.integers(-1, ops), st.integers(0, 9), st.integers(3, 4)).filter(
                lambda s: s[0] <= s[1]
            ),
            max_size=8,
        ),
    )
)


@given(ops_and_storages)
@settings(max_examples=200, deadline=None)
def test_lifetimes_give_the_bytes_that_are_alive_during_each_op(drawn):
    times, storages = drawn
    rows = [list(column) for column in zip(*storages, strict=True)] if storages else [[], [], [], []]
    result = lifetime_profile(times, *rows)
    assert np.all(np.diff(result.fraction) >= 0)
    assert not len(result.fraction) or 0 <= result.fraction[0] <= result.fraction[-1] <= 1
    ends = np.concatenate([[0], np.cumsum(times)])
    before = sum(size for alloc, free, size, _ in storages if alloc < 0 <= free)
    for op, time in enumerate(times):
        if not time:
            continue  # a moment: what is alive in it cannot be read off the clock
        middle = (ends[op] + time / 2) / ends[-1]
        alive = sum(size for alloc, free, size, _ in storages if alloc <= op <= free and free >= 0)
        assert before + result.delta_bytes[result.fraction < middle].sum() == alive
    # All that happens, one event after another, never frees what is not there and reaches what an op of no time holds.
    level = before + np.concatenate([[0], np.cumsum(result.delta_bytes)])
    assert level.min() >= 0
    highest = max(sum(s for a, f, s, _ in storages if a <= op <= f and f >= 0) for op in range(len(times)))
    assert level.max() >= highest


def test_a_storage_freed_before_its_birth_is_refused():
    with pytest.raises(ValueError, match="storage 0 is freed by op 0, before op 1"):
        lifetime_profile([1, 1], [1], [0], [5], [3])
