"""What a result says, against closed forms and against what its own parts add up to."""

import importlib
import itertools
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from cosim.played import Played
from cosim.result import Result
from cosim.simulate import _played, simulate
from cosim.spec import RunSpec

TINY = {"family": "llama", "layers": 3, "hidden": 128, "heads": 4, "kv_heads": 2, "ffn": 352, "vocab": 1024}
MEDIUM = {"family": "gpt", "layers": 4, "hidden": 2048, "heads": 16, "vocab": 50304, "max_positions": 4096}
BASE: dict[str, Any] = {
    "workload": {"model": TINY, "seq_len": 256, "global_batch": 16, "micro_batch": 1},
    "system": {"accelerator": "h100-sxm-80gb", "devices": 8},
    "parallel": {"zero": 3},
    "training": {"framework": "torchtitan"},
}


def spec(*overrides: str, model: Mapping[str, object] = TINY) -> RunSpec:
    base = {**BASE, "workload": {**BASE["workload"], "model": dict(model)}}
    return RunSpec.from_mapping(base, overrides=overrides)


def run(*overrides: str, model: Mapping[str, object] = TINY) -> Result:
    return simulate(spec(*overrides, model=model))


def total(times: Mapping[str, Any]) -> float:
    parts = [value for item in times.values() for value in (item.values() if isinstance(item, Mapping) else [item])]
    assert all(part >= 0 for part in parts)
    return math.fsum(parts)


VARIANTS = [
    (),
    ("parallel.zero=0",),
    ("parallel.zero=1", "training.framework=pytorch"),
    ("parallel.zero=2", "training.framework=composer", "workload.global_batch=64"),
    ("training.framework=composer",),
    ("training.compile=true", "training.recompute=full"),
    ("system.devices=1", "training.precision=tf32", "training.attention=unfused"),
    ("system.devices=64", "workload.global_batch=640", "parallel.overlap.gradients=false"),
]


@pytest.mark.parametrize("overrides", VARIANTS)
@pytest.mark.parametrize("model", [TINY, MEDIUM])
def test_the_breakdown_adds_up_to_the_step(overrides: tuple[str, ...], model: Mapping[str, object]) -> None:
    """To the picosecond that each op is rounded to."""
    result = run(*overrides, model=model)
    assert result.detail is not None
    ops = len(result.detail.program) * 100 * result.detail.micro_steps
    assert total(result.time_breakdown_s) == pytest.approx(result.step_time_s, abs=ops * 1e-12, rel=1e-6)


SMALL = {"layers": 3, "hidden": 128, "heads": 4, "vocab": 1024}
FAMILIES: list[Mapping[str, object]] = [
    TINY,
    MEDIUM,
    {"family": "bert", **SMALL},
    {"family": "t5", **SMALL, "decoder_layers": 2},
    {"family": "t5", **SMALL, "pos_emb": "learned"},
    {"family": "moe", **SMALL, "num_experts": 4, "experts_per_token": 2, "moe_ffn": 128},
    {
        "family": "moe",
        **SMALL,
        "mla": "q_lora=48;kv_lora=32;qk_nope=16;qk_rope=8;v=12",
        "num_experts": 4,
        "experts_per_token": 2,
        "moe_ffn": 64,
    },
]


@pytest.mark.parametrize("attention", ["flash-2", "unfused"])
@pytest.mark.parametrize(
    "model", FAMILIES, ids=lambda m: "-".join(str(m[k]) for k in m if k in ("family", "hidden", "pos_emb", "mla"))
)
def test_model_flops_are_the_closed_form_and_mfu_follows(attention: str, model: Mapping[str, object]) -> None:
    """6 per matmul weight and token, and attention's scores, of which a causal mask leaves half, whichever kernel
    runs it (arXiv 2205.05198).
    """
    spec_ = spec(f"training.attention={attention}", "workload.seq_len=512", "training.framework=pytorch", model=model)
    result = simulate(spec_)
    config = spec_.dimensions()
    assert config is not None
    closed = config.model_flops_per_token(512) * spec_.tokens_per_step
    assert result.model_flops == pytest.approx(closed, rel=0.01)
    peak = 989.4e12 * 8  # NVIDIA H100 datasheet, dense bf16
    assert result.mfu == pytest.approx(closed / peak / result.step_time_s, rel=0.01)
    assert result.hfu == pytest.approx(result.mfu)
    assert result.tokens_per_s * result.step_time_s == pytest.approx(spec_.tokens_per_step)
    assert result.tokens_per_s_per_device * 8 == pytest.approx(result.tokens_per_s)


def test_tokens_of_an_encoder_decoder_are_its_encoders() -> None:
    """Raffel et al., arXiv 1910.10683, section 3.1.2: 128 sequences of 512 tokens, 2^19 steps, 2^35 tokens."""
    overrides = ("workload.global_batch=128", "workload.seq_len=512", "workload.decoder_seq_len=114")
    spec_ = spec(*overrides, "workload.tokens=34359738368.0", model={"family": "t5", **SMALL})
    result = simulate(spec_)
    assert result.run is not None
    assert result.run["time_s"] == pytest.approx(2**19 * result.step_time_s)
    assert result.tokens_per_s * result.step_time_s == pytest.approx(2**16)


def test_copies_of_grouped_keys_and_values_are_no_flops_of_the_model() -> None:
    """torchtitan copies them out to all heads and adds up their gradients; products are those of any framework."""
    model = {**TINY, "heads": 8, "kv_heads": 2}
    titan, plain = (spec(f"training.framework={name}", model=model) for name in ("torchtitan", "pytorch"))
    config = titan.dimensions()
    assert config is not None
    closed = config.model_flops_per_token(256) * titan.tokens_per_step
    results = [simulate(one) for one in (titan, plain)]
    assert [result.model_flops for result in results] == pytest.approx([closed, closed], rel=1e-12)
    assert [result.hfu for result in results] == pytest.approx([result.mfu for result in results])


def test_recomputation_raises_hfu_and_lowers_mfu() -> None:
    """Full recomputation runs all of a block's forward again but its last product: close to 4/3."""
    none, full = (run(f"training.recompute={policy}", model=MEDIUM) for policy in ("none", "full"))
    assert full.model_flops == none.model_flops
    assert full.mfu < none.mfu == pytest.approx(none.hfu)
    head = 6 * 2048 * 50304 * 16 * 256 / none.model_flops
    assert 1 + (1 - head) / 3 * 0.6 < full.hfu / full.mfu < 1 + (1 - head) / 3
    assert 0 < full.mfu < full.hfu < 1


@pytest.mark.parametrize("model", [TINY, MEDIUM])
@pytest.mark.parametrize("limit", ["700 W", "350 W", "250 W"])
def test_mean_power_lies_between_idle_and_the_limit(limit: str, model: Mapping[str, object]) -> None:
    """The clock falls until it does; 2 % is what three rounds leave."""
    overrides = [f"system.accelerator.set.power.limit={limit}", "workload.seq_len=2048", "workload.global_batch=32"]
    result = run(*overrides, model=model)
    watts = result.energy_j / result.step_time_s / 8
    assert 80 <= watts <= float(limit.removesuffix(" W")) * 1.02


def test_a_lower_power_limit_lowers_the_clock_and_lengthens_the_step() -> None:
    results = [
        run(f"system.accelerator.set.power.limit={limit} W", "workload.seq_len=2048", model=MEDIUM)
        for limit in (700, 350, 250)
    ]
    for high, low in itertools.pairwise(results):
        assert low.clock_hz < high.clock_hz
        assert low.step_time_s > high.step_time_s
        assert low.energy_j < high.energy_j  # slower, at a lower voltage


def test_a_whole_run_is_its_tokens_worth_of_steps() -> None:
    assert run().run is None
    tokens = 16 * 256
    once, thousand = (run(f"workload.tokens={tokens * n}.0") for n in (1, 1000))
    assert once.run is not None
    assert thousand.run is not None
    assert once.run["time_s"] == pytest.approx(once.step_time_s)
    assert once.run["energy_j"] == pytest.approx(once.energy_j)
    assert once.cost_usd is not None
    assert once.run["cost_usd"] == pytest.approx(once.cost_usd)
    for key, value in once.run.items():
        assert thousand.run[key] == pytest.approx(1000 * value)
    assert once.cost_usd == pytest.approx(3.0 / 3600 * once.step_time_s * 8)  # the file's dollars per device and hour


REMEDY = re.compile(r"((?:[a-z_]+: [a-z0-9]+(?:, )?)+) \(([\d.]+) ([MG]iB)\)")
SECTION = {
    "zero": "parallel", "recompute": "training", "devices": "system",
    "micro_batch": "workload", "seq_len": "workload", "global_batch": "workload",
}  # fmt: skip


@pytest.mark.parametrize(
    ("capacity", "overrides"),
    [
        ("6 GiB", ("workload.micro_batch=4", "workload.seq_len=2048", "workload.global_batch=64")),
        ("4 GiB", ("parallel.zero=0", "training.framework=pytorch")),
        ("3500 MiB", ("parallel.zero=1", "training.framework=pytorch", "workload.micro_batch=2")),
        ("3650 MiB", ("parallel.zero=3", "training.recompute=full", "workload.seq_len=2048")),
        ("1 KiB", ()),
    ],
)
def test_every_remedy_of_a_run_that_does_not_fit_makes_it_fit(capacity: str, overrides: tuple[str, ...]) -> None:
    """Each change that is named is simulated here: it fits, in the memory that was said."""
    small = (f"system.accelerator.set.memory.hbm.capacity={capacity}", *overrides)
    result = run(*small, model=MEDIUM)
    assert not result.feasible
    assert result.infeasible_reason is not None
    if capacity == "1 KiB":
        assert "nothing that was tried makes it fit; least with " in result.infeasible_reason
        return
    fits = result.infeasible_reason.split("; it fits with ")[1]
    named = REMEDY.findall(fits)
    assert len(named) == fits.count(" or ") + 1
    for changes, size, unit in named:
        stated = dict(change.split(": ") for change in changes.split(", "))
        changed = run(*small, *(f"{SECTION[key]}.{key}={value}" for key, value in stated.items()), model=MEDIUM)
        assert changed.feasible, changes
        said = float(size) * {"MiB": 2**20, "GiB": 2**30}[unit]
        assert changed.device_memory_bytes["total"] == pytest.approx(said, rel=1e-3)


def test_a_run_that_fits_says_nothing() -> None:
    result = run()
    assert result.feasible
    assert result.infeasible_reason is None
    assert result.peak_memory_bytes == pytest.approx(sum(result.memory_bytes.values()))


@pytest.mark.parametrize("overrides", VARIANTS)
@pytest.mark.parametrize("model", [TINY, MEDIUM])
def test_micro_steps_that_are_not_played_repeat_the_one_before_the_last(
    overrides: tuple[str, ...], model: Mapping[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Playing four and repeating one is what playing all of them gives."""
    many = (*overrides, "workload.global_batch=640")
    folded = run(*many, model=model)
    monkeypatch.setattr(importlib.import_module("cosim.replicas"), "MICRO_STEPS_PLAYED", 10**6)
    played = run(*many, model=model)
    assert folded.detail is not None
    assert played.detail is not None
    assert played.detail.micro_steps_played == played.detail.micro_steps == folded.detail.micro_steps > 4
    assert folded.step_time_s == pytest.approx(played.step_time_s, rel=1e-3)
    assert folded.energy_j == pytest.approx(played.energy_j, rel=1e-3)
    assert folded.peak_memory_bytes == pytest.approx(played.peak_memory_bytes, rel=1e-3)
    for part in ("compute", "exposed_communication"):
        keys = {*folded.time_breakdown_s[part], *played.time_breakdown_s[part]}
        for key in keys:
            pair = [times.time_breakdown_s[part].get(key, 0.0) for times in (folded, played)]
            assert pair[0] == pytest.approx(pair[1], rel=1e-2, abs=1e-3 * played.step_time_s)
    assert folded.time_breakdown_s["host"] == pytest.approx(
        played.time_breakdown_s["host"], abs=1e-3 * played.step_time_s
    )


def test_what_torch_counts_and_what_is_on_the_device_are_apart() -> None:
    """Contexts and communicators are beside the allocator's memory; a device that sends nothing has no communicator."""
    many, one = run(), run("system.devices=1", "parallel.zero=0")
    for result, communicators in ((many, 447 * 2**20), (one, 0)):
        device = result.device_memory_bytes
        assert device["allocated"] == result.peak_memory_bytes
        assert 0 <= device["reserved"] - device["allocated"] < 2 * 2**20
        assert device["communicators"] == communicators
        assert device["context"] == 676 * 2**20
        assert device["total"] == device["reserved"] + device["context"] + device["communicators"]
        assert device["offered"] == pytest.approx(79.22 * 2**30, rel=1e-3)  # what torch says that an H100 has


def test_a_run_fits_where_all_that_is_on_the_device_does() -> None:
    """Between what torch counts and what is there, more than a GiB: a device that has only the first is too small."""
    result = run()
    device = result.device_memory_bytes
    hidden = result.memory_capacity_bytes - device["offered"]
    for size, fits in ((device["total"] + hidden + 2**20, True), (device["total"] + hidden - 2**20, False)):
        at_the_edge = run(f"system.accelerator.set.memory.hbm.capacity={size:.0f} B")
        assert at_the_edge.feasible is fits
        assert at_the_edge.peak_memory_bytes < at_the_edge.memory_capacity_bytes


BUSY = ("system.devices=8", "workload.seq_len=2048", "workload.micro_batch=2", "parallel.zero=0")


def test_only_the_cores_save_energy_at_a_lower_clock() -> None:
    """The same bytes go through memory and over links at any clock, and at the same voltage."""
    base = (*BUSY, "training.framework=pytorch")
    fast, slow = (
        _played(spec(*base, f"system.accelerator.set.power.limit={limit}", model=MEDIUM), None)
        for limit in ("2000 W", "300 W")
    )
    assert slow.accelerator.clock_hz < 0.95 * fast.accelerator.clock_hz
    assert slow.moved_energy_j == pytest.approx(fast.moved_energy_j, rel=1e-9)
    assert slow.core_energy_j < 0.95 * fast.core_energy_j
    # every gradient goes over the fabric twice, 7/8 of it each time
    plan, prices = fast.ranks[0].plan, fast.ranks[0].prices
    gradients = plan.trainable * plan.formats.reduce
    per_byte = fast.accelerator.power.energy_per_byte_j
    links = float(fast.moved_j.sum()) - fast.moved_j[np.array(kinds_of(fast)) == "copy"].sum()
    assert links >= 2 * 7 / 8 * gradients * per_byte["link"]
    assert fast.moved_energy_j >= links + float(prices.hbm_bytes.sum()) * per_byte["hbm"]


def kinds_of(played: Played) -> list[str]:
    return [played.program.labels[label].kind for label in played.program.label.tolist()]


def test_a_clock_that_does_not_settle_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    limited = (*BUSY, "system.accelerator.set.power.limit=400 W")
    settled = run(*limited, model=MEDIUM)
    assert 1 < settled.clock_rounds <= 3
    monkeypatch.setattr(importlib.import_module("cosim.simulate"), "CLOCK_ROUNDS", 1)
    unsettled = run(*limited, model=MEDIUM)
    assert unsettled.clock_rounds == 1
    assert any(warning.startswith("clock: it has not settled after 1 rounds") for warning in unsettled.warnings)
    assert unsettled.clock_hz > settled.clock_hz
    free = run(*BUSY, "system.accelerator.set.power.limit=5 kW", model=MEDIUM)
    assert free.clock_rounds == 1
    assert free.warnings == ()
