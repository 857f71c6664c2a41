"""Chakra traces, read back by protobuf from the published schema, hold what was simulated, and can be played."""

import importlib.util
import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from cosim.engine.program import PICOSECONDS_PER_S
from cosim.parallel.communication import communications
from cosim.report.chakra.files import check_folder, write_chakra
from cosim.result import Result
from cosim.simulate import simulate
from cosim.spec import RunSpec
from hwmodels.units import InputError


def _reader() -> ModuleType:
    """chakra_reader.py beside this file; tests are no package."""
    found = importlib.util.spec_from_file_location("chakra_reader", Path(__file__).with_name("chakra_reader.py"))
    assert found is not None
    assert found.loader is not None
    module = sys.modules[found.name] = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


chakra_reader = _reader()
GPT = {"family": "gpt", "layers": 4, "hidden": 512, "heads": 8, "vocab": 8192, "tied_embeddings": True}
MOE = {
    "family": "moe",
    "layers": 2,
    "hidden": 512,
    "heads": 8,
    "ffn": 1024,
    "vocab": 8192,
    "num_experts": 4,
    "experts_per_token": 2,
    "moe_ffn": 512,
}
RUNS: dict[str, dict[str, Any]] = {
    "data": {"zero": 1},
    "shards": {"zero": 3, "tensor": 2},
    "pipeline": {"tensor": 2, "pipeline": 2, "schedule": "1f1b", "zero": 1},
    "sharded messages": {"tensor": 2, "pipeline": 4, "schedule": "1f1b", "framework": "megatron-lm"},
    "interleaved": {"pipeline": 2, "virtual_stages": 2, "schedule": "interleaved-1f1b"},
    "gathered": {"pipeline": 2, "zero": 3, "framework": "torchtitan"},
    "experts": {"expert": 4, "model": MOE},
    "context": {"context": 2, "tensor": 2},
}
DEVICES = 8


def _run(parallel: dict[str, Any], micro_steps: int = 6) -> dict[str, Any]:
    parallel = dict(parallel)
    model, framework = parallel.pop("model", GPT), parallel.pop("framework", "megatron-core")
    replicas = DEVICES // math.prod(parallel.get(key, 1) for key in ("tensor", "pipeline", "context"))
    return {
        "workload": {"model": model, "seq_len": 512, "global_batch": replicas * micro_steps, "micro_batch": 1},
        "system": {"accelerator": "h100-sxm-80gb", "devices": DEVICES},
        "parallel": parallel,
        "training": {"framework": framework},
    }


def _simulated(parallel: dict[str, Any]) -> Result:
    return simulate(RunSpec.model_validate(_run(parallel)))


def test_a_step_whose_replicas_were_all_played_has_the_same_traces(tmp_path: Path) -> None:
    spec = RunSpec.model_validate(_run(RUNS["pipeline"]))
    found = []
    for name, result in (("folded", simulate(spec)), ("unfolded", simulate(spec, unfold=True))):
        write_chakra(result, tmp_path / name)
        found.append(chakra_reader.read_all(tmp_path / name, DEVICES))
    (folded, groups), (unfolded, same) = found
    assert {tuple(members) for members in groups.values()} == {tuple(members) for members in same.values()}
    for one, other in zip(folded, unfolded, strict=True):
        assert [(n.type, n.deps, n.start, n.duration) for n in one.nodes] == [
            (n.type, n.deps, n.start, n.duration) for n in other.nodes
        ]
    assert chakra_reader.replay(unfolded, False) == chakra_reader.replay(folded, False)


@pytest.fixture(scope="module", params=RUNS)
def written(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Result, list[Any], dict[int, list[int]]]:
    result = _simulated(RUNS[request.param])
    folder = tmp_path_factory.mktemp("traces")
    write_chakra(result, folder)
    return result, *chakra_reader.read_all(folder, DEVICES)


Written = tuple[Result, list[Any], dict[int, list[int]]]


def test_every_dependency_is_an_earlier_node_of_the_same_file(written: Written) -> None:
    for trace in written[1]:
        seen: set[int] = set()
        for node in trace.nodes:
            assert seen.issuperset(node.deps)  # so there is no cycle
            assert node.id not in seen
            seen.add(node.id)


def test_sends_match_receives_one_to_one(written: Written) -> None:
    result, traces, _ = written
    sends, receives = (
        Counter(
            tuple(node.attr[f"comm_{what}"] for what in ("src", "dst", "tag", "size"))
            for trace in traces
            for node in trace.nodes
            if node.type == kind
        )
        for kind in ("COMM_SEND_NODE", "COMM_RECV_NODE")
    )
    assert sends == receives
    assert set(sends.values()) <= {1}
    assert bool(sends) == (result.spec["parallel"]["pipeline"] > 1)
    for rank, trace in enumerate(traces):
        assert all(node.attr["comm_src"] == rank for node in trace.nodes if node.type == "COMM_SEND_NODE")
        assert all(node.attr["comm_dst"] == rank for node in trace.nodes if node.type == "COMM_RECV_NODE")


def test_all_members_of_a_communicator_do_the_same_collectives_in_the_same_order(written: Written) -> None:
    _, traces, groups = written
    done: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for rank, trace in enumerate(traces):
        for node in trace.nodes:
            if node.type == "COMM_COLL_NODE":
                call = node.attr["comm_type"], node.attr["comm_size"]
                done.setdefault((int(node.attr["pg_name"]), rank), []).append(call)
    assert {group for group, _ in done} == set(groups)
    assert all(group > 0 and len(members) > 1 for group, members in groups.items())
    for group, members in groups.items():
        first = done[group, members[0]]
        assert all(done[group, rank] == first for rank in members)
        assert {rank for number, rank in done if number == group} == set(members)


def test_bytes_are_those_of_the_program(written: Written) -> None:
    """Counted from the program's tasks and the ranks' graphs, as often as they happen, against the files."""
    result, traces, _ = written
    assert result.detail is not None
    program, detail = result.detail.program, result.detail
    sizes = _group_sizes(result)
    expected = 0
    middle = detail.micro_steps_played - 2
    for task in range(len(program)):
        label, device = program.labels[program.label[task]], program.streams[program.stream[task]].device
        repeats = detail.micro_steps - detail.micro_steps_played
        times = 1 + (repeats if repeats and program.micro_step[task] == middle else 0)
        sent = [(one.kind, one.group, one.bytes) for one in label.sent]
        inside = [c for c in communications(detail.ranks[device].graph) if label.ops[0] <= c.op < label.ops[1]]
        sent += [(one.kind, one.group, float(one.bytes)) for one in inside]
        for kind, group, size in sent:
            if sizes[group] > 1:
                share = sizes[group] if kind == "all_gather" else 1
                expected += times * math.ceil(size / share)
    kinds = ("COMM_COLL_NODE", "COMM_SEND_NODE")
    nodes = [node for trace in traces for node in trace.nodes if node.type in kinds and node.name != "agree"]
    assert sum(node.attr["comm_size"] for node in nodes) == expected * DEVICES // len(detail.ranks)


def _group_sizes(result: Result) -> dict[str, int]:
    degree = result.spec["parallel"]
    data = DEVICES // (degree["tensor"] * degree["pipeline"])  # context-parallel ranks hold the same parameters
    return {
        "tensor": degree["tensor"],
        "context": degree["context"],
        "expert": degree["expert"] * degree["expert_tensor"],
        "data": data,
        "expert_data": DEVICES // degree["pipeline"] // (degree["expert"] * degree["expert_tensor"]),
        "pipeline": degree["pipeline"],
        "tied": 2,
    }


def test_durations_add_up_to_those_of_the_tasks(written: Written) -> None:
    result, traces, _ = written
    assert result.detail is not None
    program, timeline, detail = result.detail.program, result.detail.timeline, result.detail
    stages = max(stream.device for stream in program.streams) + 1
    length = timeline.end_ps - timeline.start_ps
    repeats = detail.micro_steps - detail.micro_steps_played
    times = np.where((program.micro_step == detail.micro_steps_played - 2) & (repeats > 0), 1 + repeats, 1)
    device = np.array([stream.device for stream in program.streams])[program.stream]
    for rank, trace in enumerate(traces):
        mine = device == rank // (DEVICES // stages)
        # a message's arrival has the sender's time once more, and launches are not the device's
        nodes = [n for n in trace.nodes if n.type != "COMM_RECV_NODE" and not n.attr["is_cpu_op"]]
        expected_us, rounded = float((length * times)[mine].sum()) / 1e6, int(mine.sum() * times.max())
        assert sum(node.duration for node in nodes) == pytest.approx(expected_us, abs=rounded)


def test_flops_are_those_of_the_ranks_graph(written: Written) -> None:
    result, traces, _ = written
    assert result.detail is not None
    for rank, trace in enumerate(traces):
        step = result.detail.ranks[rank // (DEVICES // len(result.detail.ranks))]
        often = np.where(step.graph.op_phase == 3, 1, result.detail.micro_steps)
        expected = float((step.prices.flops * often).sum())
        assert sum(node.attr.get("num_ops", 0) for node in trace.nodes) == pytest.approx(expected, rel=1e-6, abs=2e4)


def test_a_simulator_that_plays_them_comes_to_the_same_step_time(written: Written) -> None:
    """Not to the same microsecond: one that computes one kernel at a time adds gradients up behind other kernels."""
    result, traces, _ = written
    assert chakra_reader.replay(traces, one_communication=False) / 1e6 == pytest.approx(result.step_time_s, rel=0.02)


def test_ranks_that_communicate_one_at_a_time_never_wait_for_each_other(written: Written) -> None:
    result, traces, _ = written
    assert chakra_reader.replay(traces, one_communication=True) / 1e6 >= 0.98 * result.step_time_s


def test_communicators_are_the_ranks_that_megatron_puts_together() -> None:
    """The example of Megatron-LM's initialize_model_parallel: 16 devices, tensor 2, pipeline 4."""
    from cosim.report.communicators import Communicators

    ranks = Communicators.of({"system": {"devices": 16}, "parallel": {"tensor": 2, "pipeline": 4}})
    assert {ranks.members("data", rank) for rank in range(16)} == {
        *((0, 2), (1, 3), (4, 6), (5, 7), (8, 10), (9, 11), (12, 14), (13, 15))
    }
    assert {ranks.members("tensor", rank) for rank in range(16)} == {(2 * i, 2 * i + 1) for i in range(8)}
    assert {ranks.members("pipeline", rank) for rank in range(16)} == {(i, i + 4, i + 8, i + 12) for i in range(4)}
    assert {ranks.members("tied", rank) for rank in range(16)} == {(i, i + 12) for i in range(4)}


def test_many_ops_are_joined_between_collectives_and_nothing_else_changes(tmp_path: Path) -> None:
    result = _simulated(RUNS["pipeline"])
    found = []
    for name, most in (("fine", 10**9), ("coarse", 0)):
        write_chakra(result, tmp_path / name, most_nodes=most)
        found.append(chakra_reader.read_all(tmp_path / name, DEVICES))
    (fine, groups), (coarse, same) = found
    assert groups == same
    assert [trace.metadata["level"] for trace in (fine[0], coarse[0])] == ["operators", "tasks"]
    assert len(coarse[0].nodes) < len(fine[0].nodes) / 3
    for one, other in zip(fine, coarse, strict=True):
        assert sum(node.duration for node in one.nodes) == pytest.approx(
            sum(node.duration for node in other.nodes), abs=len(other.nodes)
        )
        calls = [[node.attr for node in trace.nodes if node.type == "COMM_COLL_NODE"] for trace in (one, other)]
        assert calls[0] == calls[1]


def test_a_file_begins_as_chakras_own_generator_writes_it(tmp_path: Path) -> None:
    """GlobalMetadata(version="0.0.4") first (src/generator/generator.py of mlcommons/chakra)."""
    write_chakra(_simulated(RUNS["data"]), tmp_path)
    assert chakra_reader.read(tmp_path / "trace.0.et").version == "0.0.4"


def test_traces_replace_traces_and_nothing_else(tmp_path: Path, result: Result) -> None:
    (tmp_path / "trace.4711.et").write_bytes(b"")
    write_chakra(_simulated(RUNS["data"]), tmp_path)
    assert len(list(tmp_path.iterdir())) == DEVICES + 1
    assert [file.name for file in tmp_path.parent.iterdir() if file.name.startswith(f".{tmp_path.name}")] == []
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(InputError, match=r"holds thesis\.tex, which is no trace"):
        write_chakra(result, tmp_path)


@pytest.mark.parametrize(("place", "words"), [("file", "is a file"), ("missing/folder", "is no folder")])
def test_a_place_for_no_traces_is_refused(tmp_path: Path, place: str, words: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=words):
        check_folder(tmp_path / place)


def test_a_result_without_a_timeline_has_no_traces(tmp_path: Path, changed: Callable[..., Result]) -> None:
    with pytest.raises(InputError, match="no timeline"):
        write_chakra(changed(detail=None), tmp_path)


def test_times_are_microseconds_of_the_step(written: Written) -> None:
    result, traces, _ = written
    ends = [max(node.start + node.duration for node in trace.nodes) for trace in traces]
    assert max(ends) == pytest.approx(result.step_time_s * PICOSECONDS_PER_S / 1e6, abs=2)


def test_the_command_writes_them_and_refuses_a_bad_place_at_once(tmp_path: Path) -> None:
    run = tmp_path / "run.json"
    run.write_text(json.dumps(_run(RUNS["pipeline"])), encoding="utf-8")
    command = [sys.executable, "-m", "cosim.cli", "simulate", str(run), "--chakra"]
    subprocess.run([*command, str(tmp_path / "traces")], check=True, capture_output=True)
    assert len(chakra_reader.read_all(tmp_path / "traces", DEVICES)[0]) == DEVICES
    refused = subprocess.run([*command, str(run)], check=False, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "is a file; allowed: the name of a folder" in refused.stderr
