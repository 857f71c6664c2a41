"""`cosim cost`: one op or a file of them, in the columns of the published tables, answered by the hardware models."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from cosim.cli import main
from cosim.cost import answer, answer_line
from hwmodels.accelerator import Accelerator, load
from hwmodels.cluster import Cluster
from hwmodels.units import InputError
from hwmodels.work import Attention, Gemm

SCALE_SIM = {
    "base": "systolic-edge",
    "set": {
        "matrix.rows": 32,
        "matrix.columns": 32,
        "matrix.count": 1,
        "matrix.dataflow": "output-stationary",
        "matrix.double_buffering": False,
    },
}


def cosim(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert isinstance(end.value.code, int)
    return end.value.code


def test_a_row_of_kernels_csv_is_answered_whatever_it_was_measured_to_be() -> None:
    """As the table has it: all values text, empty where a column is not the op's."""
    row = {
        "id": "k-1",
        "op": "gemm",
        "accelerator": "a100-sxm-80gb",
        "dtype": "fp16",
        "b": "1",
        "m": "4096",
        "n": "4096",
        "k": "1024",
        "layout": "TN",
        "heads": "",
        "kv_heads": "",
        "head_dim": "",
        "seq": "",
        "causal": "",
        "time_us": "65.0",
        "tflops": "1.5",
        "source": "vidur",
        "note": "forward",
    }
    cost = load("a100-sxm-80gb").cost(Gemm(4096, 4096, 1024, format="fp16", output_format="fp16"))
    found = answer(row, {})
    assert found["id"] == "k-1"
    assert found["time_us"] == cost.time_s * 1e6
    assert (found["flops"], found["bytes"]) == (cost.flops, cost.bytes_per_level)
    assert (found["limited_by"], found["energy_j"]) == (cost.limited_by, cost.energy_j)
    assert found["calibration"] == "calibrated"
    assert "cycles" not in found


def test_a_product_with_sparse_weights_is_a_column() -> None:
    row = {"op": "gemm", "accelerator": "h100-sxm-80gb", "m": 8192, "n": 8192, "k": 8192}
    dense, sparse = answer(row, {}), answer({**row, "sparsity": "2:4"}, {})
    assert sparse["flops"] == dense["flops"] / 2
    assert 1.7 < dense["time_us"] / sparse["time_us"] <= 2


def test_cycles_of_a_systolic_array_are_answered() -> None:
    assert answer({"op": "gemm", "accelerator": SCALE_SIM, "m": 1024, "n": 1024, "k": 1024}, {})["cycles"] == 1_112_064


def test_attention_goes_by_the_named_kernel_or_by_the_fastest_and_phases_add_up() -> None:
    row = {"accelerator": "h100-sxm-80gb", "heads": 16, "head_dim": 128, "seq": 4096, "causal": True, "dtype": "bf16"}
    phases = {op: answer({"op": f"attention_{op}", **row}, {}) for op in ("fwd", "fwd_bwd")}
    chip = load("h100-sxm-80gb")
    forward = {
        name: chip.cost(Attention(name, "forward", 1, 16, 16, 4096, 4096, 128, True)).time_s for name in chip.attention
    }
    assert phases["fwd"]["time_us"] == pytest.approx(min(forward.values()) * 1e6)
    assert phases["fwd_bwd"]["flops"] == 3.5 * phases["fwd"]["flops"]
    named = answer({"op": "attention_fwd", "note": "impl=flash2; read from a chart", **row}, {})
    assert named["algorithm"] == "flash-2"
    assert named["time_us"] == pytest.approx(forward["flash-2"] * 1e6)


def test_a_collective_is_named_in_op_or_in_its_own_column() -> None:
    row = {"accelerator": "tpu-v4", "devices": 64, "devices_per_node": 4, "bytes": 2**30}
    found = answer({"op": "all_reduce", **row}, {})
    assert answer({"collective": "all_reduce", **row}, {}) == found
    cost = Cluster.build(load("tpu-v4"), 64, 4).collective("all_reduce", 2.0**30, 64, 64)
    assert found["time_us"] == pytest.approx(cost.time_s * 1e6)
    assert found["bytes"]["link"] == cost.link_bytes["fabric"]


def test_every_op_format_and_kernel_of_the_published_tables_is_answered_or_refused_in_a_sentence() -> None:
    """One row of each; only xformers' attention, of which no algorithm is known here, has no answer."""
    folder = Path(__file__).parents[1] / "cosim" / "validate" / "published"
    kinds: dict[tuple[str, ...], dict[str, str]] = {}
    for name in ("kernels.csv", "collectives.csv"):
        with (folder / name).open(newline="") as file:
            for row in csv.DictReader(file):
                key = (row.get("op", ""), row.get("collective", ""), row.get("dtype", ""), row.get("layout", ""))
                kinds.setdefault((*key, row["note"].split(";")[0] if "impl=" in row["note"] else ""), row)
    chips: dict[str, Accelerator] = {}
    refused = []
    for row in kinds.values():
        try:
            found = answer(row, chips)
        except InputError as error:
            refused.append(str(error))
        else:
            assert found["time_us"] > 0
            assert found["limited_by"]
    assert len(kinds) > 40
    assert [sentence.split(";")[0] for sentence in refused] == ["a100-sxm-80gb has no attention kernel 'xformers'"]


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "op is missing; it is one of gemm"),
    ({"op": "sort"}, "op: 'sort' is not one of gemm"),
    ({"op": "gemm", "m": 8, "n": 8}, "k is missing"),
    ({"op": "gemm", "m": 8, "n": 8, "k": -1}, "k: -1 must be a whole number of at least 1"),
    ({"op": "gemm", "m": 8, "n": 8, "k": "x"}, "k: 'x' must be a whole number"),
    ({"op": "gemm", "m": 8, "n": 8, "k": float("nan")}, "k: nan must be a whole number"),
    ({"op": "gemm", "m": True, "n": 8, "k": 8}, "m: True must be a whole number"),
    ({"op": "gemm", "m": 8, "n": 8, "k": 8, "dtype": "fp17"}, "number format 'fp17' is not known"),
    ({"op": "gemm", "m": 8, "n": 8, "k": 8, "layout": "XY"}, "layout: 'XY' is not one of TN, NN, NT"),
    ({"op": "gemm", "m": 8, "n": 8, "k": 8, "sparsity": "1:4"}, "sparsity: '1:4' is not one of dense, 2:4"),
    ({"op": "gemm", "m": 8, "n": 8, "k": 8, "mm": 8}, "'mm' is not a known column"),
    ({"op": "attention_fwd", "heads": 8, "kv_heads": 3, "head_dim": 64, "seq": 64}, "kv_heads: 3 must divide heads, 8"),
    ({"op": "attention_fwd", "heads": 8, "head_dim": 64, "seq": 64, "causal": 2}, "causal: 2 must be true or false"),
    ({"op": "softmax", "m": 8, "dtype": "int8"}, "dtype: 'int8' is not one of fp32, bf16, fp16"),
    ({"op": "all_reduce", "devices": 8}, "bytes is missing"),
    ({"op": "gemm", "accelerator": "h100"}, "no accelerator is called 'h100'"),
    ({"op": "gemm", "accelerator": 7}, "accelerator: 7 must be a name"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_a_bad_row_is_one_sentence(row: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        answer({"accelerator": "a100-sxm-80gb", **row}, {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("line", [b"nope", b"[1]", b"\xff\xfe", b"", b"[" * 100_000])
def test_a_line_that_is_no_row_is_an_answer_with_an_error(line: bytes) -> None:
    assert answer_line(line, "ops.jsonl, line 3", {})["error"].startswith("ops.jsonl, line 3: ")


def test_accelerators_are_built_once() -> None:
    chips: dict[str, Accelerator] = {}
    for m in (8, 16):
        answer({"op": "gemm", "accelerator": SCALE_SIM, "m": m, "n": 8, "k": 8}, chips)
    assert len(chips) == 1


def test_the_command_prints_one_op_as_text_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("cost", "--hw", "tpu-v5p", "gemm", "--m", "4096", "--n", "4096", "--k", "4096", "--dtype", "bf16")
    assert cosim(*arguments, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cycles"] >= 4096**3 / 8 / 128**2
    assert cosim(*arguments) == 0
    text = capsys.readouterr().out
    assert f"cycles       {found['cycles']}" in text
    assert "limited_by   compute" in text


def test_a_batch_is_answered_in_order_and_a_bad_line_costs_the_others_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"op": "gemm", "m": 8 * i, "n": 512, "k": 512, "accelerator": "tpu-v4"} for i in (1, 2, 0, 3)]
    (tmp_path / "ops.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    assert cosim("cost", "--batch", tmp_path / "ops.jsonl", "--json", tmp_path / "out.jsonl") == 0
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert ["error" in one for one in found] == [False, False, True, False, True]
    assert [one.get("flops") for one in found[:2]] == [2 * 8 * 512**2, 2 * 16 * 512**2]
    assert "2 of 5 ops have no cost" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ("cost", "gemm", "--m", "8", "--n", "8", "--k", "8"),
        ("cost", "--hw", "tpu-v4"),
        ("cost", "--hw", "tpu-v9", "gemm", "--m", "8", "--n", "8", "--k", "8"),
        ("cost", "--hw", "tpu-v4", "gemm", "--m", "8", "--n", "8"),
        ("cost", "--hw", "tpu-v4", "--json", "out.json", "gemm", "--m", "8", "--n", "8", "--k", "8"),
        ("cost", "--batch", "missing.jsonl"),
    ],
)
def test_a_wrong_command_is_status_2_and_one_line(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cosim(*arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "peak", "bandwidth"), [("tpu-v5p", "459 TFLOP/s", "2.765 TB/s"), ("tpu-v4", "275.3 TFLOP/s", "1.228 TB/s")]
)
def test_hw_show_prints_parts_and_the_datasheet_s_peaks(
    name: str, peak: str, bandwidth: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cosim("hw", "show", name) == 0
    printed = capsys.readouterr().out
    assert f"# bf16     {peak}" in printed
    assert bandwidth in printed
    assert "8 systolic arrays of 128 x 128 cells" in printed
    assert "torus-3d" in printed


@pytest.mark.parametrize("op", ["host_to_device", "device_to_host"])
def test_a_copy_over_the_host_interface_is_an_op(op: str) -> None:
    found = answer({"op": op, "accelerator": "h100-sxm-80gb", "bytes": 10**9}, {})
    assert found["bytes"] == {"hbm": 1e9, "link": 1e9}
    assert found["time_us"] * 1e-6 > 1e9 / load("h100-sxm-80gb").links.host.bandwidth_bytes_per_s
