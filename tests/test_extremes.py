"""Chips and runs at the edges of what a run file may say: an answer that makes sense, or one sentence."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from cosim.result import Result
from cosim.simulate import simulate
from cosim.spec import RunSpec
from hwmodels.accelerator import load_raw
from hwmodels.units import InputError

RUN: dict[str, Any] = {
    "workload": {
        "model": {"family": "gpt", "layers": 2, "hidden": 256, "heads": 4, "vocab": 1024},
        "seq_len": 256,
        "global_batch": 32,
    },
    "system": {"accelerator": "h100-sxm-80gb", "devices": 8},
    "parallel": {"zero": 3},
}


def played(*changes: str) -> Result:
    """The result of the small run with `changes`."""
    return simulate(RunSpec.from_mapping(RUN, "run.yaml", changes))


def chip(**values: Any) -> str:
    """The change of the accelerator's numbers, dots written as two underscores."""
    inner = ", ".join(f"{key.replace('__', '.')}: {value}" for key, value in values.items())
    return f"system.accelerator={{base: h100-sxm-80gb, set: {{{inner}}}}}"


@pytest.mark.parametrize("zero", [0, 3])
def test_slower_memory_is_a_slower_step_down_to_a_trickle(zero: int) -> None:
    """Through the place where collectives ask for half, and for all, of the memory bandwidth."""
    rates = [3350, 1200, 900, 700, 600, 500, 300, 30, 3]
    times = [
        played(
            chip(memory__hbm__bandwidth=f"{rate} GB/s"), f"parallel.zero={zero}", "workload.micro_batch=4"
        ).step_time_s
        for rate in rates
    ]
    assert times == sorted(times)
    assert times[-1] == pytest.approx(10 * times[-2], rel=0.15)


def test_fewer_cores_are_a_slower_step_down_to_one() -> None:
    times = [
        played(chip(matrix__cores=cores), "workload.micro_batch=4").step_time_s for cores in (132, 40, 20, 12, 4, 1)
    ]
    assert times == sorted(times)


def test_cards_in_slots_are_not_on_one_nvlink() -> None:
    """Eight PCIe cards with bridged pairs: their ring goes through the host's switches, unless the run denies it."""
    cards = ("system.accelerator=a100-pcie-80gb", "workload.model.hidden=2048", "workload.micro_batch=4")
    in_slots, all_bridged = played(*cards), played(*cards, "system.nvlink_domain=8")
    assert in_slots.step_time_s > 2 * all_bridged.step_time_s
    assert in_slots.spec["system"]["nvlink_domain"] is None


@pytest.mark.parametrize(("domain", "good"), [(2, True), (4, True), (8, True), (16, True), (3, False), (12, False)])
def test_a_fast_fabric_joins_a_part_of_each_node_or_whole_nodes(domain: int, good: bool) -> None:
    def read() -> RunSpec:
        return RunSpec.from_mapping(RUN, "run.yaml", ["system.devices=32", f"system.nvlink_domain={domain}"])

    if good:
        assert read().system.nvlink_domain == domain
    else:
        with pytest.raises(InputError, match=f"run.yaml: system.nvlink_domain: {domain} must divide"):
            read()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("system.network.intra_node_latency=10000000000 s", "system.network: .* one all-gather over 8 devices: 7e"),
        ("system.network.intra_node=1e-9 B/s", "system.network: .* one all-gather over 8 devices"),
        (chip(clock="1e300 GHz"), "clock: '1e300 GHz' is out of range; allowed are 0.001 to 1e.18 Hz"),
        (chip(memory__hbm__bandwidth="1 B/s"), "system.accelerator: the step is too long .* limited by memory"),
        ("training.recompute={every: 7}", "training.recompute.every: 7 is more than the 2 blocks of the model"),
        ("system.accelerator=v100-sxm2-16gb", "training.precision: v100-sxm2-16gb does not compute in bf16"),
        ("workload.model={python: 'nowhere:build'}", "workload.model.python: 'nowhere:build': no module 'nowhere'"),
        ("workload.model={huggingface: NoSuchModel}", "workload.model.huggingface: 'NoSuchModel' is not a model class"),
    ],
)
def test_what_cannot_be_simulated_names_its_key(change: str, sentence: str) -> None:
    with pytest.raises(InputError, match=f"^(run.yaml: )?.*{sentence}"):
        played(change)


def test_a_batch_beyond_counting_is_one_sentence() -> None:
    sizes = ("workload.micro_batch=1000000", "workload.seq_len=1000000", "workload.global_batch=8000000")
    with pytest.raises(InputError, match=r"too long to simulate: .*attention.* at this workload's sizes: 9"):
        played(*sizes)


def test_selective_recomputation_beside_a_fused_kernel_says_that_it_does_nothing() -> None:
    (warning,) = played("training.recompute=selective").warnings
    assert warning == "training.recompute: selective recomputes nothing: the attention kernel keeps no scores"
    assert played("training.recompute=selective", "training.attention=unfused").warnings == ()
    assert played("training.recompute=full").warnings == ()


def test_a_chip_without_energies_says_so(tmp_path: Path) -> None:
    data = load_raw("h100-sxm-80gb")
    del data["process"]  # from which energies would follow
    for key in ("energy_per_flop", "energy_per_byte"):
        del data["power"][key]
    (tmp_path / "chip.yaml").write_text(yaml.safe_dump(data))
    result = played(f"system.accelerator={tmp_path / 'chip.yaml'}")
    assert any("no energies: energy is that of an idle chip" in said for said in result.extrapolated)
    assert not any("no energies" in said for said in played().extrapolated)
