"""Every accelerator of the library can be shown, priced and trained on; one that is faster on paper is faster here."""

import pytest
from typer.testing import CliRunner

from cosim.cli import app
from cosim.simulate import simulate
from cosim.spec import RunSpec
from hwmodels.accelerator import load, names
from hwmodels.number_formats import bytes_of
from hwmodels.work import Gemm

# What each chip's successor or larger sibling does at least as fast, and strictly faster where products are large.
FASTER = [
    ("p4", "p100-pcie-16gb"),
    ("v100-pcie-32gb", "v100-sxm2-32gb"),
    ("v100-sxm3-32gb", "v100-sxm3-32gb-dgx2h"),
    ("a10g", "a40"),
    ("rtx-4090", "l40s"),
    ("h100-pcie-80gb", "h100-sxm-80gb"),
    ("b200-sxm", "gb200"),
    ("b300", "gb300"),
    ("mi100", "mi210"),
    ("mi210", "mi250"),
    ("mi300x", "mi355x"),
    ("tpu-v3", "tpu-v4"),
    ("tpu-v5e", "tpu-v6e"),
    ("tpu-v5p", "tpu-v7x"),
    ("trn1", "trn2"),
    ("gaudi2", "gaudi3"),
]


def widest_training_format(name: str) -> str:
    """bf16 where the chip multiplies it, else fp16, else fp32."""
    return next(format for format in ("bf16", "fp16", "fp32") if format in (*load(name).matrix.formats, "fp32"))


@pytest.mark.parametrize("name", names())
def test_hw_show_prints_parts_peaks_and_the_file(name: str) -> None:
    shown = CliRunner().invoke(app, ["hw", "show", name])
    assert shown.exit_code == 0
    assert f"name: {name}" in shown.output
    assert "FLOP per byte" in shown.output


@pytest.mark.parametrize("name", names())
def test_no_gemm_runs_above_the_peak_or_moves_less_than_its_operands(name: str) -> None:
    chip, format = load(name), widest_training_format(name)
    work = Gemm(4096, 4096, 4096, format=format)
    cost = chip.cost(work)
    assert cost.flops / cost.time_s <= chip.peak_flops(format)
    assert cost.bytes_per_level["hbm"] >= 2 * 4096 * 4096 * bytes_of(format)
    assert 0.0 < cost.energy_j / cost.time_s < 2.0 * chip.power_limit_w


@pytest.mark.parametrize(("slow", "fast"), FASTER)
def test_a_chip_with_more_of_everything_multiplies_faster(slow: str, fast: str) -> None:
    work = Gemm(8192, 8192, 8192, format=widest_training_format(slow))
    assert load(fast).cost(work).time_s < load(slow).cost(work).time_s


def test_a_small_gpt_trains_on_every_accelerator() -> None:
    model = {"family": "gpt", "layers": 1, "hidden": 128, "heads": 2, "ffn": 512, "vocab": 256}
    for name in names():
        spec = {
            "workload": {"model": model, "seq_len": 128, "global_batch": 8, "micro_batch": 4},
            "system": {"accelerator": name, "devices": 2, "devices_per_node": 2},
            "training": {"framework": "pytorch", "precision": widest_training_format(name)},
        }
        result = simulate(RunSpec.model_validate(spec))
        assert result.feasible, name
        assert 0.0 < result.mfu < 1.0, name
        assert result.calibration["status"] == load(name).calibration_status, name
