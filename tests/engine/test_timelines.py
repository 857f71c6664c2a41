"""Timelines in closed form: what each engine must answer where anyone can work it out."""

import numpy as np
import pytest

from cosim.engine import DeadlockError, play
from cosim.engine.program import PICOSECONDS_PER_S, Label
from cosim.engine.task import Task, program_of

pytestmark = pytest.mark.usefixtures("each_engine")


def ends(tasks, streams=("compute",), resources=()):
    return play(program_of(tasks, streams, resources)).end_ps.tolist()


def test_an_empty_program_takes_no_time():
    assert play(program_of([], ["compute"])).makespan_ps == 0
    assert play(program_of([], [])).makespan_ps == 0


def test_a_stream_runs_one_task_after_another():
    assert ends([Task(0, 5), Task(0, 0), Task(0, 7)]) == [5, 5, 12]


def test_two_streams_run_side_by_side():
    assert ends([Task(0, 5), Task(1, 7)], ["compute", "communication"]) == [5, 7]


def test_a_task_waits_for_all_that_it_depends_on():
    tasks = [Task(0, 5), Task(1, 9), Task(2, 1, depends=(0, 1))]
    assert ends(tasks, ["a", "b", "c"]) == [5, 9, 10]


def test_tasks_may_depend_on_later_rows():
    assert ends([Task(0, 5, depends=(1,)), Task(1, 9)], ["a", "b"]) == [14, 9]


def test_days_of_picoseconds_are_exact():
    day = 24 * 3600 * PICOSECONDS_PER_S
    assert ends([Task(0, 10 * day + 1), Task(0, 10 * day + 1)]) == [10 * day + 1, 20 * day + 2]


def test_a_host_bound_chain_takes_all_its_launches_and_the_last_kernel():
    chain = [Task(0, 2, host=1, launch_ps=5) for _ in range(100)]
    assert ends(chain, ["compute", "host"])[-1] == 100 * 5 + 2


def test_a_device_bound_chain_takes_the_first_launch_and_all_its_kernels():
    chain = [Task(0, 7, host=1, launch_ps=5) for _ in range(100)]
    assert ends(chain, ["compute", "host"])[-1] == 5 + 100 * 7


def test_one_host_thread_launches_for_all_its_streams():
    chain = [Task(i % 2, 1, host=2, launch_ps=5) for i in range(10)]
    assert ends(chain, ["a", "b", "host"])[-1] == 10 * 5 + 1


def test_after_a_synchronising_task_the_host_goes_on_when_it_has_ended():
    tasks = [Task(0, 100, host=1, launch_ps=5, synchronises=True), Task(0, 10, host=1, launch_ps=5)]
    timeline = play(program_of(tasks, ["compute", "host"]))
    assert timeline.issue_ps.tolist() == [0, 105]
    assert timeline.end_ps.tolist() == [105, 120]


def test_a_synchronising_task_that_ends_early_does_not_shorten_its_own_launch():
    tasks = [Task(0, 1, host=1, launch_ps=5, span_ps=0, synchronises=True), Task(0, 1, host=1)]
    assert play(program_of(tasks, ["compute", "host"])).issue_ps.tolist() == [0, 5]


def test_a_task_of_many_kernels_cannot_end_before_its_last_launch():
    tasks = [Task(0, 10, host=1, launch_ps=50, span_ps=52), Task(0, 1, host=1, launch_ps=1)]
    assert ends(tasks, ["compute", "host"]) == [52, 53]


def test_without_a_host_thread_launch_and_span_mean_nothing():
    assert ends([Task(0, 10, launch_ps=50, span_ps=99, synchronises=True)]) == [10]


def test_members_of_a_collective_start_together_when_the_last_one_is_there():
    tasks = [Task(0, 5), Task(1, 8), Task(0, 3, rendezvous=0), Task(1, 4, rendezvous=0)]
    timeline = play(program_of(tasks, ["rank 0", "rank 1"]))
    assert timeline.start_ps.tolist() == [0, 0, 8, 8]
    assert timeline.end_ps.tolist() == [5, 8, 11, 12]


def test_a_rendezvous_waits_for_a_slow_host():
    tasks = [Task(3, 1, host=2, launch_ps=30), Task(0, 3, host=2, launch_ps=2, rendezvous=7), Task(1, 3, rendezvous=7)]
    assert play(program_of(tasks, ["rank 0", "rank 1", "host", "copy"])).start_ps.tolist() == [0, 30, 30]


def test_two_flows_share_a_link_equally():
    link = 50e9
    flows = [Task(0, 100, demands=((0, link),)), Task(1, 100, demands=((0, link),))]
    assert ends(flows, ["a", "b"], [link]) == [200, 200]


def test_a_flow_has_the_link_to_itself_when_the_other_is_done():
    flows = [Task(0, 100, demands=((0, 1.0),)), Task(1, 300, demands=((0, 1.0),))]
    # Both at a half until 200, when the second has 200 left and goes on alone.
    assert ends(flows, ["a", "b"], [1.0]) == [200, 400]


def test_compute_loses_the_cores_that_urgent_communication_holds():
    compute = Task(0, 1000, demands=((0, 1.0),))
    collective = Task(1, 400, priority=1, demands=((0, 0.15),))
    # 400 ps at speed 0.85 do 340; the other 660 run alone.
    assert ends([compute, collective], ["compute", "communication"], [1.0]) == [400 + 660, 400]


def test_compute_waits_while_something_urgent_needs_all_cores():
    tasks = [Task(0, 1000, demands=((0, 1.0),)), Task(1, 5), Task(1, 400, priority=1, demands=((0, 1.0),))]
    assert ends(tasks, ["compute", "communication"], [1.0]) == [1400, 5, 405]


def test_a_third_takes_three_times_as_long_to_the_picosecond():
    flows = [Task(i, 100, demands=((0, 1.0),)) for i in range(3)]
    assert ends(flows, ["a", "b", "c"], [1.0]) == [300, 300, 300]


def test_a_flow_that_waits_for_its_last_launch_holds_nothing():
    sparse = Task(0, 100, host=2, launch_ps=0, span_ps=1000, demands=((0, 1.0),))
    dense = Task(1, 300, demands=((0, 1.0),))
    # The sparse one has done its work at 200 (half speed); from then on the dense one is alone.
    assert ends([sparse, dense], ["a", "b", "host"], [1.0]) == [1000, 400]


def test_demands_of_nothing_are_no_demands():
    assert ends([Task(0, 10, demands=((0, 0.0),)), Task(1, 10, demands=((0, 1.0),))], ["a", "b"], [1.0]) == [10, 10]


def test_a_demanding_task_without_work_disturbs_nobody():
    tasks = [Task(0, 99, demands=((0, 1.0),)), Task(1, 33), Task(1, 0, priority=3, demands=((0, 1.0),))]
    assert ends(tasks, ["a", "b"], [1.0]) == [99, 33, 33]


def test_a_flow_that_is_replaced_at_once_by_an_equal_one_changes_no_speed():
    # At 14, 28, ... a flow ends and its twin starts: one change, after which the long flow's speed is what it was.
    short = [Task(0, 7, demands=((0, 1.0),)) for _ in range(40)]
    assert ends([*short, Task(1, 1000, demands=((0, 1.0),))], ["a", "b"], [1.0])[-1] == 2 * 280 + (1000 - 280)


def test_a_collective_hidden_behind_compute_costs_nothing():
    layers, compute, reduce = 10, 50, 30
    tasks = []
    for layer in range(layers):
        tasks += [Task(0, compute), Task(1, reduce, depends=(2 * layer,))]
    assert ends(tasks, ["compute", "communication"])[-1] == layers * compute + reduce


def test_a_pipeline_of_stages_takes_micro_batches_and_stages_less_one():
    stages, micro_batches, work = 4, 9, 11
    tasks = []
    for micro_batch in range(micro_batches):
        for stage in range(stages):
            before = () if stage == 0 else (micro_batch * stages + stage - 1,)
            tasks.append(Task(stage, work, depends=before))
    assert max(ends(tasks, [f"stage {i}" for i in range(stages)])) == (micro_batches + stages - 1) * work


def test_a_deadlock_names_the_tasks_that_wait():
    gemm, reduce = Label("gemm", "matmul", "forward", 3), Label("all-reduce", "all-reduce", "backward")
    tasks = [Task(0, 5, depends=(1,), label=gemm), Task(1, 5, depends=(0,), label=reduce)]
    with pytest.raises(DeadlockError, match=r"task 0 \(gemm, layer 3\) waits for task 1 \(all-reduce\) to end"):
        ends(tasks, ["compute", "communication"])


def test_collectives_in_opposite_order_deadlock_as_they_do_in_nccl():
    tasks = [Task(0, 1, rendezvous=0), Task(0, 1, rendezvous=1), Task(1, 1, rendezvous=1), Task(1, 1, rendezvous=0)]
    with pytest.raises(DeadlockError, match="rendezvous"):
        ends(tasks, ["rank 0", "rank 1"])


def test_a_host_that_synchronises_on_what_it_has_yet_to_issue_deadlocks():
    tasks = [Task(0, 1, host=1, synchronises=True, depends=(1,)), Task(0, 1, host=1)]
    with pytest.raises(DeadlockError):
        ends(tasks, ["compute", "host"])
    tasks = [Task(0, 1, host=2, synchronises=True, depends=(1,)), Task(1, 1, host=2)]
    with pytest.raises(DeadlockError, match="its host thread, which waits for task 0"):
        ends(tasks, ["compute", "communication", "host"])


@pytest.mark.parametrize(
    ("task", "resources", "message"),
    [
        (Task(1, 5), (), "stream of task 1.* is 1; it must be 0 to 0"),
        (Task(0, -5), (), "work_ps of task 1.* is -5"),
        (Task(0, 5, host=3), (), "host of task 1"),
        (Task(0, 5, rendezvous=-2), (), "rendezvous of task 1"),
        (Task(0, 5, depends=(2,)), (), "depends of task 1"),
        (Task(0, 5, demands=((0, 1.0),)), (), "demands.resource of task 1"),
        (Task(0, 5, demands=((0, 1.0),)), (0.0,), "capacity"),
        (Task(0, 5, demands=((0, 1.0),)), (float("nan"),), "capacity"),
        (Task(0, 5, demands=((0, -1.0),)), (1.0,), "amount"),
        (Task(0, 5, demands=((0, float("inf")),)), (1.0,), "amount"),
        (Task(0, 2**62), (), "add up"),
    ],
)
def test_a_program_that_means_nothing_is_refused(task, resources, message):
    with pytest.raises(ValueError, match=message):
        ends([Task(0, 1), task], ["compute"], resources)


def test_columns_of_different_lengths_are_refused():
    program = program_of([Task(0, 1), Task(0, 2)], ["compute"])
    object.__setattr__(program, "work_ps", np.array([1]))
    with pytest.raises(ValueError, match="work_ps has 1 rows, stream has 2"):
        play(program)
