"""Replicas beside each other: every rank gives what one gives where all are alike, and the slowest sets the pace."""

import functools
from typing import Any

import numpy as np
import pytest

from cosim.footprint import resident
from cosim.mapping.jitter import Jitter, expected_maximum
from cosim.memory import check_periodic
from cosim.played import STRAGGLERS, Played
from cosim.result import Result
from cosim.simulate import _played, simulate
from cosim.spec import RunSpec
from cosim.summary import summarize
from hwmodels.units import InputError

MODEL = {"family": "llama", "layers": 4, "hidden": 1024, "heads": 16, "ffn": 2816, "vocab": 8192}
SLOW = "system.variation.slow_device={factor: 1.5}"
ALIKE = (
    ("parallel.zero=3",),
    ("parallel.zero=2", "parallel.tensor=2"),
    ("parallel.zero=1", "training.framework=megatron-core", "parallel.tensor=4"),
    ("parallel.zero=0", "training.framework=pytorch"),
    ("parallel.zero=1", "parallel.pipeline=4"),
    ("parallel.zero=3", "parallel.pipeline=2", "parallel.virtual_stages=2"),
    ("parallel.zero=1", "parallel.pipeline=2", "parallel.schedule=zb-h1", "parallel.context=2"),
)


def _spec(overrides: tuple[str, ...]) -> RunSpec:
    base: dict[str, Any] = {
        "workload": {"model": MODEL, "seq_len": 1024, "global_batch": 64, "micro_batch": 2},
        "system": {"accelerator": "h100-sxm-80gb", "devices": 16},
        "training": {"framework": "torchtitan"},
    }
    return RunSpec.from_mapping(base, overrides=overrides)


@functools.cache
def _step(*overrides: str, unfold: bool = False) -> Played:
    return _played(_spec(overrides), None, unfold)


@pytest.mark.parametrize("overrides", ALIKE)
def test_every_rank_played_gives_what_one_gives(overrides: tuple[str, ...]) -> None:
    """To the picosecond, task by task."""
    folded, unfolded = _step(*overrides), _step(*overrides, unfold=True)
    replicas = folded.spec.data_parallel
    assert unfolded.replicas == replicas > 1
    assert len(unfolded.program) == replicas * len(folded.program)
    for name in ("issue_ps", "start_ps", "end_ps"):
        one = getattr(folded.timeline, name)
        assert np.array_equal(getattr(unfolded.timeline, name), np.tile(one, replicas))
    first, second = (summarize(played).to_json() for played in (folded, unfolded))
    for key in ("step_time_s", "energy_j", "mfu", "peak_memory_bytes", "bubble"):
        if key in first:
            assert second[key] == pytest.approx(first[key], rel=1e-12), key
    for key, value in first["time_breakdown_s"].items():
        assert second["time_breakdown_s"][key] == pytest.approx(value, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("overrides", [ALIKE[0], ALIKE[2], ALIKE[3], ALIKE[4]])
def test_a_slow_device_sets_the_pace_of_all_replicas(overrides: tuple[str, ...]) -> None:
    """Played alone, its replica takes as long as beside all the others, which wait for it."""
    slow = (*overrides, "system.variation.slow_device={factor: 1.3}")
    usual, folded, unfolded = _step(*overrides), _step(*slow), _step(*slow, unfold=True)
    assert usual.step_time_s < folded.step_time_s <= 1.3 * usual.step_time_s
    assert unfolded.step_time_s == pytest.approx(folded.step_time_s, rel=5e-3)
    waits = summarize(unfolded).time_breakdown_s["exposed_communication"]
    assert waits[STRAGGLERS] > 0.3 * (folded.step_time_s - usual.step_time_s)
    assert STRAGGLERS not in summarize(folded).time_breakdown_s["exposed_communication"]


def test_compute_of_a_slow_device_is_stretched_and_its_collectives_are_not() -> None:
    alone = ("system.devices=1", "workload.global_batch=8", "parallel.zero=0")
    usual, slow = (_step(*alone, *more).stages[0].prices.time_s.sum() for more in ((), (SLOW,)))
    assert slow == pytest.approx(1.5 * usual)
    shared = ("system.devices=4", "parallel.tensor=4", "workload.global_batch=8", "parallel.zero=0")
    sent = [
        sum(summarize(_step(*shared, *more)).time_breakdown_s["exposed_communication"].values())
        for more in ((), (SLOW,))
    ]
    assert sent[0] == pytest.approx(sent[1])
    assert sent[0] > 0


def test_a_slow_rank_costs_a_pipeline_nearly_its_time_in_every_micro_batch() -> None:
    """1F1B in its steady state goes at the pace of its slowest rank, whichever that is."""
    wide = ("workload.model.vocab=512", "workload.model.hidden=4096", "workload.model.ffn=11008")  # no head, no host
    base = ("parallel.zero=1", "parallel.pipeline=4", "system.devices=4", "workload.global_batch=64", *wide)
    usual = _step(*base).step_time_s
    for rank in range(4):
        slow = _step(*base, f"system.variation.slow_device={{pipeline_rank: {rank}, factor: 1.5}}").step_time_s
        assert 1.25 * usual < slow < 1.5 * usual


def test_a_slow_link_is_a_slower_network() -> None:
    base = ("parallel.zero=3",)
    usual, slow = _step(*base), _step(*base, "system.variation.slow_link={factor: 4}")
    assert slow.step_time_s > usual.step_time_s
    rates = [played.cluster.tiers["network"].bandwidth_bytes_per_s for played in (usual, slow)]
    assert rates[1] == pytest.approx(rates[0] / 4)
    with pytest.raises(InputError, match=r"system\.variation\.slow_link\.tier: there is no network"):
        _step("system.devices=8", "system.variation.slow_link={factor: 4}")


@pytest.mark.parametrize(("count", "known"), [(1, 0.0), (2, 0.56419), (3, 0.84628), (10, 1.53875), (100, 2.50759)])
def test_the_expected_largest_of_normal_numbers(count: int, known: float) -> None:
    """Mean extremes as Tippett tabulated them (Biometrika 17, 1925); of 2, 1 / sqrt(pi)."""
    assert expected_maximum(count) == pytest.approx(known, abs=1e-5)


def test_factors_have_their_mean_their_spread_and_the_largest_of_those_that_share() -> None:
    alone = Jitter(0.1, 1, 1, 1, 1).factors(100_000)
    assert alone.mean() == pytest.approx(1.0, abs=2e-3)
    assert np.log(alone).std() == pytest.approx(0.1, rel=0.02)
    shared = Jitter(0.1, 1, 8, 1, 1).factors(20_000)
    brute = np.exp(0.1 * np.random.default_rng(2).standard_normal((20_000, 8)) - 0.005).max(axis=1)
    assert shared.mean() == pytest.approx(brute.mean(), rel=2e-3)
    assert np.quantile(shared, 0.9) == pytest.approx(np.quantile(brute, 0.9), rel=5e-3)


def test_few_replicas_stand_for_many() -> None:
    """The latest of 8 that stand for 512 is as late as the latest of 512; each takes a sum of many tasks."""

    def latest(replicas: int, played: int) -> float:
        drawn = [Jitter(0.1, seed, 1, replicas, played).factors(100 * played) for seed in range(200)]
        return float(np.mean([one.reshape(played, 100).sum(axis=1).max() for one in drawn]))

    assert latest(512, 8) - 100 == pytest.approx(latest(512, 512) - 100, rel=0.1)


def test_jitter_costs_time_is_reproducible_and_adds_up() -> None:
    spec = _spec(("parallel.zero=3", "system.variation.jitter=0.1"))
    result = simulate(spec)
    assert result.step_time_s > _step("parallel.zero=3").step_time_s
    assert result.step_time_s == simulate(spec).step_time_s
    assert result.step_time_s != simulate(spec.override(["system.variation.seed=5"])).step_time_s
    assert _total(result) == pytest.approx(result.step_time_s)
    assert simulate(spec, unfold=True).step_time_s == pytest.approx(result.step_time_s, rel=0.05)


def test_more_replicas_wait_longer_for_the_latest() -> None:
    def lost(devices: int) -> float:
        size = (f"system.devices={devices}", f"workload.global_batch={8 * devices}", "parallel.zero=0")
        varied = [_step(*size, f"system.variation={{jitter: 0.2, seed: {seed}}}").step_time_s for seed in range(4)]
        return sum(varied) / len(varied) - _step(*size).step_time_s

    assert 0 < lost(2) < lost(64)


def test_too_many_ranks_to_unfold_is_one_sentence() -> None:
    with pytest.raises(InputError, match=r"--unfold: 128 replicas of 1 pipeline ranks are 128 to play, and 64"):
        _step("system.devices=128", "workload.global_batch=256", unfold=True)


def _total(result: Result) -> float:
    times = result.time_breakdown_s
    parts = sum(times["compute"].values()) + sum(times["exposed_communication"].values())
    return parts + times["bubble"] + times["host"] + times["optimizer"]


def test_hybrid_sharding_sends_over_the_network_what_a_node_has_reduced() -> None:
    """Per rank and step of P bytes over n nodes of 8: gathers and reduce-scatters of P inside the node, all-reduces of
    P / 8 across (arXiv 2304.11277, section 3.2.2); every rank holds 1/8 of all states, not 1/16.
    """
    base = ("parallel.zero=3", "system.devices=16", "workload.global_batch=32")
    whole, both = _step(*base), _step(*base, "parallel.hybrid_shard=true")
    plan = both.stages[0].plan
    assert (plan.group.size, plan.group.per_node) == (8, 8)
    assert plan.replicas is not None
    assert (plan.replicas.size, plan.replicas.per_node, plan.replicas.stride) == (2, 1, 8)
    sent: dict[tuple[str, str], float] = {}
    for label in both.program.label.tolist():
        for one in both.program.labels[label].sent:
            sent[one.kind, one.group] = sent.get((one.kind, one.group), 0.0) + one.bytes
    assert sent["all_reduce", "replicate"] == pytest.approx(sent["reduce_scatter", "data"] / 8)
    for category, size in whole.stages[0].plan.resident_bytes().items():
        if size:
            assert plan.resident_bytes()[category] == pytest.approx(2 * size, rel=0.05)
    unfolded = _step(*base, "parallel.hybrid_shard=true", unfold=True)
    assert np.array_equal(unfolded.timeline.end_ps, np.tile(both.timeline.end_ps, 16))


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_hybrid_sharding_pays_on_a_slow_network(zero: int) -> None:
    base = (f"parallel.zero={zero}", "system.devices=16", "system.network.inter_node=10 Gb/s")
    whole, both = _step(*base), _step(*base, "parallel.hybrid_shard=true")
    assert both.step_time_s < whole.step_time_s
    for played in (whole, both):
        check_periodic(played.program, played.timeline, 0, resident(played, played.stages[0]))


def test_hybrid_sharding_needs_two_ranks_in_a_node_and_something_to_shard() -> None:
    with pytest.raises(InputError, match=r"parallel\.hybrid_shard: of the 2 ranks .* 1 are in one node"):
        _step("parallel.zero=3", "parallel.tensor=8", "parallel.hybrid_shard=true")
    with pytest.raises(InputError, match=r"parallel\.hybrid_shard: is of parallel\.zero 1 to 3"):
        _spec(("parallel.zero=0", "parallel.hybrid_shard=true"))
