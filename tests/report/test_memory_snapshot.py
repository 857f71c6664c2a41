"""The memory snapshot is one that PyTorch's own readers take, and replaying it gives the memory that was predicted."""

import dataclasses
import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

import pytest

import cosim
from cosim.report.memory_snapshot import BASE_ADDRESS, FirstFit, memory_snapshot, write_memory_snapshot
from cosim.result import Result

RUN = """
workload:
  model: {family: gpt, layers: 3, hidden: 256, heads: 4, vocab: 512}
  seq_len: 256
  global_batch: 64
system: {accelerator: h100-sxm-80gb, devices: 8}
"""
VARIANTS = {
    "FSDP": ["parallel.zero=3"],
    "replicated": ["parallel.zero=0"],
    "recomputed": ["parallel.zero=3", "training.recompute=full"],
    "one device": ["system.devices=1", "training.attention=unfused"],
    "torchtitan": ["parallel.zero=3", "training.framework=torchtitan"],
}
# What unpickle() of pytorch's torch/utils/viz/MemoryViz.js knows; it refuses protocols above 4.
KNOWN_TO_PAGE = {
    *("APPENDS", "BINGET", "BININT", "BININT1", "BININT2", "EMPTY_DICT", "EMPTY_LIST", "FRAME", "LONG1", "LONG_BINGET"),
    *("MARK", "MEMOIZE", "PROTO", "SETITEMS", "SHORT_BINUNICODE", "STOP", "TUPLE2", "APPEND", "NEWFALSE", "BINPUT"),
    *("BINUNICODE", "EMPTY_TUPLE", "NEWTRUE", "NONE", "BINFLOAT", "TUPLE", "TUPLE1", "TUPLE3", "LONG_BINPUT", "LIST"),
    *("DICT", "SETITEM"),
}


@pytest.fixture(scope="module", params=VARIANTS)
def simulated(request: pytest.FixtureRequest) -> Result:
    return cosim.simulate(cosim.RunSpec.from_text(RUN).override(VARIANTS[request.param]))


@pytest.fixture(scope="module")
def snapshot(simulated: Result) -> dict[str, Any]:
    return memory_snapshot(simulated)


def replay(snapshot: dict[str, Any]) -> tuple[int, dict[int, int]]:
    """(highest sum of sizes, what is alive at the end by address); no two blocks share a byte."""
    alive: dict[int, int] = {}
    total = peak = 0
    for entry in snapshot["device_traces"][0]:
        address, size = entry["addr"], entry["size"]
        if entry["action"] == "alloc":
            assert all(address + size <= a or a + s <= address for a, s in alive.items())
            alive[address], total = size, total + size
            peak = max(peak, total)
        elif entry["action"] == "free_completed":
            assert alive.pop(address) == size
            total -= size
    return peak, alive


def test_replayed_peak_is_the_predicted_one(simulated: Result, snapshot: dict[str, Any]) -> None:
    allocated = simulated.peak_memory_bytes - simulated.memory_bytes["framework"]
    assert replay(snapshot)[0] == pytest.approx(allocated, abs=8)


def test_peak_by_category_is_the_predicted_one(simulated: Result, snapshot: dict[str, Any]) -> None:
    held: dict[str, int] = {}
    peak: dict[str, int] = {}
    for entry in snapshot["device_traces"][0]:
        sign = {"alloc": 1, "free_completed": -1}.get(entry["action"], 0)
        held[entry["category"]] = held.get(entry["category"], 0) + sign * entry["size"]
        if sign > 0 and sum(held.values()) > sum(peak.values()):
            peak = dict(held)
    peak["activations"] = peak.get("activations", 0) + peak.pop("unknown")  # the batch
    predicted = {name: size for name, size in simulated.memory_bytes.items() if name != "framework" and size}
    assert {name: size for name, size in peak.items() if size} == pytest.approx(predicted, abs=8)


def test_segment_at_the_end_holds_what_is_alive(snapshot: dict[str, Any]) -> None:
    [segment] = snapshot["segments"]
    blocks, cursor = {}, segment["address"]
    for block in segment["blocks"]:
        assert block["address"] == cursor
        cursor += block["size"]
        if block["state"] == "active_allocated":
            blocks[block["address"]] = block["size"]
    assert cursor == segment["address"] + segment["total_size"]
    assert blocks == replay(snapshot)[1]
    assert all(e["addr"] >= BASE_ADDRESS and e["addr"] + e["size"] <= cursor for e in snapshot["device_traces"][0])


def test_times_do_not_run_backwards(snapshot: dict[str, Any]) -> None:
    times = [entry["time_us"] for entry in snapshot["device_traces"][0]]
    assert times == sorted(times)


def test_pytorchs_readers_take_the_file(simulated: Result, snapshot: dict[str, Any], tmp_path: Path) -> None:
    viz = pytest.importorskip("torch.cuda._memory_viz")
    write_memory_snapshot(simulated, tmp_path / "step.pickle")
    read = pickle.loads((tmp_path / "step.pickle").read_bytes())
    assert read == snapshot
    [segment] = read["segments"]
    summary = viz.segsum(read)
    assert f"total_allocated: {viz.Bytes(segment['allocated_size'])}" in summary
    assert f"{len(read['device_traces'][0])} entries" in viz.trace(read)
    flames = viz.memory(read, format_flamegraph=lambda lines: lines)
    counted = sum(int(line.rpartition(" ")[2]) for line in flames.splitlines() if "active_allocated" in line)
    assert counted == segment["allocated_size"]
    assert "wte" in flames or "embed" in flames
    assert viz.segments(read, format_flamegraph=lambda lines: lines).startswith("stream_0;seg_")
    for page in (viz.trace_plot(read), viz.trace_plot(read, plot_segments=True), viz.segment_plot(read)):
        assert "snapshot.pickle" in page


def test_the_page_knows_every_opcode_of_the_file(simulated: Result, tmp_path: Path) -> None:
    """And it holds nothing but plain data: no opcode that looks up or calls a name."""
    write_memory_snapshot(simulated, tmp_path / "step.pickle")
    with (tmp_path / "step.pickle").open("rb") as file:
        used = {opcode.name: argument for opcode, argument, _ in pickletools.genops(io.BytesIO(file.read()))}
    assert used.keys() <= KNOWN_TO_PAGE
    assert used["PROTO"] == 4


def test_categories_have_one_without_a_name(snapshot: dict[str, Any]) -> None:
    """The page fails on files whose categories lack "unknown"."""
    assert "unknown" in {entry["category"] for entry in snapshot["device_traces"][0]}


def test_frames_say_which_op_of_which_module(snapshot: dict[str, Any]) -> None:
    frames = [entry["frames"] for entry in snapshot["device_traces"][0] if entry["category"] == "activations"]
    assert {frozenset(frame) for stack in frames for frame in stack} == {frozenset({"name", "filename", "line"})}
    made = {(stack[0]["name"], stack[0]["filename"]) for stack in frames}
    assert any(name.startswith(("aten.", "cosim.")) and ".1." in module for name, module in made)


def test_first_fit_reuses_the_lowest_hole_and_joins_neighbours() -> None:
    memory = FirstFit()
    a, b, c, d = (memory.allocate(512) for _ in range(4))
    assert [x - BASE_ADDRESS for x in (a, b, c, d)] == [0, 512, 1024, 1536]
    memory.free(b, 512)
    memory.free(a, 512)
    assert memory.allocate(1024) == a
    memory.free(c, 512)
    memory.free(d, 512)
    assert memory.allocate(4096) == c
    assert memory.top == c + 4096


def test_a_result_without_detail_writes_nothing(simulated: Result, tmp_path: Path) -> None:
    with pytest.raises(cosim.InputError, match="no traced step"):
        write_memory_snapshot(dataclasses.replace(simulated, detail=None), tmp_path / "step.pickle")
    assert list(tmp_path.iterdir()) == []
