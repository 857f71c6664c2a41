"""A task that stands for many kernels ends exactly when they would."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cosim.engine import play
from cosim.engine.kernels import merge_kernels
from cosim.engine.task import Task, program_of

kernels = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=12)


@given(kernels, kernels, st.integers(0, 60), st.integers(0, 60))
@settings(max_examples=200, deadline=None)
def test_a_chain_of_kernels_and_their_merged_task_end_alike(chain, after, busy_stream, busy_host):
    """Whatever the stream and the host thread were doing before, and for those that come after it too."""

    def play_with(*tasks):
        before = [Task(0, busy_stream), Task(2, 0, host=1, launch_ps=busy_host)]
        return play(program_of([*before, *tasks], ["compute", "host", "other"])).end_ps.tolist()

    def single(rows):
        return [Task(0, work, host=1, launch_ps=launch) for work, launch in rows]

    def merged(rows):
        work, launch, span = merge_kernels(np.array([w for w, _ in rows]), np.array([x for _, x in rows]))
        return Task(0, work, host=1, launch_ps=launch, span_ps=span)

    apart = play_with(*single(chain), *single(after))
    together = play_with(merged(chain), merged(after))
    assert together[-1] == max(apart)
    if chain:
        assert together[2] == apart[1 + len(chain)]


def test_merged_kernels_in_closed_form():
    assert merge_kernels(np.array([7, 7, 7]), np.array([5, 5, 5])) == (21, 15, 5 + 21)  # device-bound
    assert merge_kernels(np.array([2, 2, 2]), np.array([5, 5, 5])) == (6, 15, 15 + 2)  # host-bound
    assert merge_kernels(np.array([]), np.array([])) == (0, 0, 0)
