"""Chips and runs at the edges of what a run file may say: an answer that makes sense, or one sentence."""

from typing import Any

import pytest

from cosim.result import Result
from cosim.simulate import simulate
from cosim.spec import RunSpec
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
