"""Every number of every part changes results in the direction that physics demands, over chips that do not exist.

A chip is drawn from one of several compositions, some of its numbers are scaled at random, then one number grows, and
the question it is about is asked of both chips.
"""

import copy
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from hwmodels.accelerator import Accelerator, build, load_raw, names
from hwmodels.catalog import Written, resolve
from hwmodels.cluster import Cluster
from hwmodels.parameters import NOTES, Section
from hwmodels.units import InputError
from hwmodels.work import Attention, Collective, Gemm, HostCopy, Pass
from hwmodels.yaml_file import load_yaml

ALLOWED = ("ring", "tree", "grouped", "in-network")


def plain(node: Any) -> Any:
    """A file without provenance, notes and what says where it is from."""
    if isinstance(node, Mapping):
        if "value" in node:
            return node["value"]
        return {
            key: plain(inner)
            for key, inner in node.items()
            if key not in (*NOTES, "peaks") or key == "rows" and "columns" in node
        }
    return [plain(inner) for inner in node] if isinstance(node, list) else node


@functools.cache
def chips() -> dict[str, dict[str, Any]]:
    """Compositions by name, as plain files."""
    written: Any = load_yaml(Path(__file__).parent / "compositions.yaml", "compositions.yaml")
    return {name: plain(resolve(file, name).data) for name, file in written.items()}


def numbers(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Path and text of every number."""
    if isinstance(node, Mapping):
        for key, inner in node.items():
            yield from numbers(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for place, inner in enumerate(node):
            yield from numbers(inner, f"{path}[{place}]")
    elif re.match(r"\d", str(node)) and not isinstance(node, bool) and path != "process":
        yield path, str(node)


@functools.cache
def paths(name: str) -> tuple[str, ...]:
    return tuple(path for path, _ in numbers(chips()[name]))


def scaled(data: dict[str, Any], path: str, factor: float) -> dict[str, Any]:
    """The chip with the number at `path` times `factor`; whole numbers stay whole, shares at most one."""
    result: Any = dict(data)
    node: Any = result
    *parents, last = [int(key) if key.isdigit() else key for key in re.findall(r"[^.\[\]]+", path)]
    for key in parents:
        node[key] = copy.copy(node[key])
        node = node[key]
    number = re.match(r"[\d.]+(?:e[-+]?\d+)?", str(node[last]))
    assert number is not None
    old, unit = float(number[0]), str(node[last])[len(number[0]) :]
    new = old * factor
    if not unit and old <= 1.0 and not _MAY_EXCEED_ONE.fullmatch(path):
        new = min(1.0, new)
    if not unit and re.fullmatch(_WHOLE, path):
        new = float(max(1, round(new)))
    node[last] = f"{new:.12g}{unit}" if unit else (int(new) if new == int(new) else new)
    return result  # type: ignore[no-any-return]


_MAY_EXCEED_ONE = re.compile(r".*formats\.\w+|.*(instructions|overhead|prologue_k).*|.*dgrad|.*wgrad|.*head_\d+")
_WHOLE = (
    r"matrix.*\.(cores|rows|columns|count)|vector.*\.(lanes|issue_slots)|.*\.(banks|stacks|channels|bus_width|radix|"
    r"domain|links|wrap|collective_cores|devices_per_port|cores_made|dies)"
)


def chip_of(data: dict[str, Any]) -> Accelerator:
    return build(Section(data, "chip"), Written(data, "chip"))


# The questions. Each answers with what should not grow (a time, an energy, a price).

SIZES = st.integers(0, 13).map(lambda power: 2**power) | st.integers(1, 9000)
LAYOUTS = st.sampled_from(["TN", "NN", "NT"])
GEMMS = st.builds(
    lambda m, n, k, batch, format, layout: Gemm(m, n, k, batch, format, layout=layout),
    *(
        SIZES,
        SIZES,
        SIZES,
        st.sampled_from([1, 3, 16]),
        st.sampled_from(["bf16", "bf16", "fp8", "fp32", "mxfp8"]),
        LAYOUTS,
    ),
)
PASSES = st.builds(
    lambda size, operations, special, kind, row: Pass(
        *(size, size, operations * size, special * size), kind=kind, row_bytes=row, sweeps=3.0 if row else 1.0
    ),
    *(st.floats(1e3, 1e9), st.floats(0, 30), st.floats(0, 4)),
    st.sampled_from(["stream", "row", "gather", "transpose"]),
    st.sampled_from([0.0, 2.0**15, 2.0**18]),
)
ATTENTIONS = st.builds(
    lambda algorithm, phase, heads, length, width, causal: Attention(
        algorithm, phase, 2, 4 * heads, heads, length, length, width, causal
    ),
    st.sampled_from(["flash-2", "flash-2", "flash-3", "cudnn"]),
    st.sampled_from(["forward", "backward"]),
    *(st.integers(1, 16), st.integers(16, 8192), st.sampled_from([64, 128, 256]), st.booleans()),
)
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send_recv")


def collective(kind: str, size: float, members: int, per_node: int, stride: int) -> Collective:
    members, per_node = (2, min(per_node, 2)) if kind == "send_recv" else (members, min(per_node, members))
    return Collective(kind, size, members, per_node, stride if per_node == 1 else 1)  # type: ignore[arg-type]


COLLECTIVES = st.builds(
    collective,
    *(st.sampled_from(KINDS), st.floats(1e2, 1e10), st.sampled_from([2, 4, 8, 16, 64]), st.sampled_from([1, 2, 8])),
    st.sampled_from([1, 8]),
)
ALL = st.builds(collective, st.sampled_from(KINDS[:5]), st.floats(1e8, 1e10), st.just(8), st.just(8), st.just(1))
INSIDE = st.builds(collective, st.sampled_from(KINDS), st.floats(1e2, 1e10), st.just(8), st.just(8), st.just(1))


def kernel_s(chip: Accelerator, work: Any) -> float:
    return chip.cost(work).time_s


def energy_j(chip: Accelerator, work: Any) -> float:
    return chip.cost(work).energy_j


def cluster(chip: Accelerator) -> Cluster:
    return Cluster.build(chip, 64, 8, network={"algorithms": list(ALLOWED)})


def collective_s(chip: Accelerator, work: Collective) -> float:
    return cluster(chip).collective_cost(work).time_s


def over_all_s(chip: Accelerator, work: Collective) -> float:
    """The same kind and size over all devices, as many of them on one fabric as it joins."""
    whole = Cluster.build(chip, 64, 4)
    return whole.collective(work.kind, work.bytes, 64, whole.domain).time_s


def collective_j(chip: Accelerator, work: Collective) -> float:
    return cluster(chip).collective_cost(work).energy_j


def copy_s(chip: Accelerator, work: HostCopy) -> float:
    return chip.cost(work).time_s


def cores_held(chip: Accelerator, work: Collective) -> float:
    return cluster(chip).collective_cost(work).core_share


def slowness(chip: Accelerator, watts: float) -> float:
    return chip.clock_hz / chip.power.sustained_clock(watts, chip.clock_hz)


def idle_w(chip: Accelerator, _: Any) -> float:
    return chip.idle_power_w


def area_mm2(chip: Accelerator, _: Any) -> float:
    assume(chip.area is not None)
    assert chip.area is not None
    return chip.area.total_mm2


def device_usd(chip: Accelerator, _: Any) -> float:
    assume(chip.area is not None)
    assert chip.area is not None
    return chip.area.device_usd


def silicon_mm2(chip: Accelerator, _: Any) -> float:
    assume(chip.area is not None)
    assert chip.area is not None
    return chip.area.dies * chip.area.die_mm2


def usd_per_s(chip: Accelerator, _: Any) -> float:
    return chip.price_usd_per_s


def cycles(chip: Accelerator, work: Gemm) -> float:
    found = chip.cost(work).cycles
    assume(found is not None)
    return float(found or 0)


KERNELS: st.SearchStrategy[Any] = GEMMS | PASSES | ATTENTIONS
COPIES = st.builds(HostCopy, st.floats(0, 1e10), st.sampled_from(["host_to_device", "device_to_host"]))
WATTS = st.floats(1.0, 1e5)
NOTHING = st.none()


@dataclass(frozen=True)
class Claim:
    """More of what is at `paths` (a pattern; all of `together` grow at once) makes the answer to `question` never
    larger (`less`), or never smaller. `why` it is asked in this way only.
    """

    paths: str
    question: Callable[[Accelerator, Any], float]
    work: st.SearchStrategy[Any]
    less: bool = True
    chips: tuple[str, ...] = ()
    together: str = ""
    factors: tuple[float, ...] = (1.1, 1.5, 2.0, 3.7, 8.0)
    why: str = ""


def less(paths: str, question: Callable[[Accelerator, Any], float], work: Any, **more: Any) -> Claim:
    return Claim(paths, question, work, True, **more)


def greater(paths: str, question: Callable[[Accelerator, Any], float], work: Any, **more: Any) -> Claim:
    return Claim(paths, question, work, False, **more)


BF16 = GEMMS.map(lambda work: dataclasses.replace(work, format="bf16"))
FP8 = GEMMS.map(lambda work: dataclasses.replace(work, format="fp8"))
SCALED = GEMMS.map(lambda work: dataclasses.replace(work, format="mxfp8"))
SPARSE = GEMMS.map(lambda work: dataclasses.replace(work, format="bf16", sparsity="2:4"))
WHOLE = st.builds(lambda m, n, k: Gemm(4096 * m, 4096 * n, 4096 * k), *[st.integers(1, 3)] * 3)
MANY = st.builds(
    lambda phase, length, width, causal: Attention("flash-2", phase, 8, 32, 32, length, length, width, causal),
    *(st.sampled_from(["forward", "backward"]), st.sampled_from([2048, 4096, 8192]), st.sampled_from([64, 128])),
    st.booleans(),
)
STREAMS = PASSES.map(lambda work: dataclasses.replace(work, kind="stream", row_bytes=0.0, sweeps=1.0))
ONE_SOCKET = ("gpu", "gpu-pins", "amd", "scaled", "rack", "bridged", "arrays", "torus", "dragonfly")
TWICE = (2.0, 4.0)

CLAIMS: tuple[Claim, ...] = (
    # Clock, matrix units
    less(r"clock|matrix(\[\d\])?\.clock", kernel_s, KERNELS),
    less(
        *(r"matrix(\[0\])?\.cores", kernel_s, KERNELS),
        together=r"matrix(\[0\])?\.cores|vector\.(lanes|issue_slots)|memory\.sram(\[\d\])?\.size",
        factors=TWICE,
        why="lanes and caches are the whole chip's: with the same ones more cores have fewer each, and more in flight",
    ),
    less(r"matrix(\[\d\])?\.formats\.bf16", kernel_s, BF16 | ATTENTIONS),
    less(r"matrix(\[\d\])?\.formats\.fp8", kernel_s, FP8),
    less(r"matrix\.block_scaled\.mxfp8", kernel_s, SCALED),
    less(r"matrix(\[\d\])?\.structured_sparsity", kernel_s, SPARSE, chips=("gpu", "amd", "scaled")),
    less(
        *(r"matrix(\[\d\])?\.shared_memory", kernel_s, GEMMS),
        why="fewer, larger attention blocks may fill the last wave of cores worse, and cover more of what is masked",
    ),
    less(
        *(r"matrix(\[\d\])?\.(rows|columns)", cycles, WHOLE),
        chips=("arrays",),
        factors=TWICE,
        why="a product that does not fill the larger array waits for its skew; so for two arrays that share few folds",
    ),
    less(
        *(r"matrix(\[\d\])?\.count", kernel_s, WHOLE | PASSES | MANY),
        together=r"matrix(\[\d\])?\.count|vector\.lanes|memory\.sram(\[\d\])?\.(size|bandwidth)",
        factors=TWICE,
        why="arrays share lanes and SRAM, of which each has its part, and of few folds some get none",
    ),
    # Lanes and special functions
    less(r"vector\.(lanes|clock|special_function_rate|issue_slots|formats\.fp32)", kernel_s, KERNELS),
    less(r"special_function\.(per_cycle|clock)", kernel_s, KERNELS),
    # Memory on the chip and beside it
    less(r"memory\.sram(\[\d\])?\.(size|bandwidth|core_bytes_per_cycle|multicast)", kernel_s, KERNELS),
    less(
        r"memory\.sram(\[\d\])?\.(banks|bank_width)",
        kernel_s,
        KERNELS,
        factors=TWICE,
        why="strides fall on banks by divisors",
    ),
    less(r"memory\.hbm\.(bandwidth|stacks|pin_rate|bus_width|channels|in_flight)", kernel_s, KERNELS),
    greater(r"memory\.hbm\.latency", kernel_s, KERNELS),
    less(r"memory\.hbm\.bandwidth", collective_s, COLLECTIVES),
    less(r"memory\.hbm\.bandwidth", copy_s, COPIES),
    greater(r"memory\.hbm\.capacity", device_usd, NOTHING),
    # Links
    less(r"links\.(fabric|network|host)\.bandwidth", collective_s, COLLECTIVES),
    less(r"links\.host\.bandwidth", copy_s, COPIES),
    greater(r"links\.host\.latency", copy_s, COPIES),
    greater(r"links\.\w+\.(latency|switch_latency)", collective_s, COLLECTIVES),
    greater(
        *(r"links\.network\.oversubscription", collective_s, COLLECTIVES),
        chips=("dragonfly",),
        why="a fat tree's leaves have more ports down where fewer go up, so more devices are below one",
    ),
    less(r"links\.network\.devices_per_port", collective_s, COLLECTIVES, why="one port of all their bandwidths"),
    less(r"links\.network\.radix", collective_s, COLLECTIVES),
    less(r"links\.\w+\.collective_cores", collective_s, COLLECTIVES),
    greater(r"links\.\w+\.collective_cores", cores_held, COLLECTIVES),
    greater(r"links\.fabric\.links", collective_s, COLLECTIVES, why="more of them share the same bandwidth"),
    greater(r"links\.fabric\.wrap", collective_s, COLLECTIVES, why="fewer dimensions are long enough to be rings"),
    less(
        r"links\.fabric\.domain",
        over_all_s,
        ALL,
        chips=("rack",),
        why="a switch; a short message's chain has more steps",
    ),
    greater(r"links\.fabric\.domain", collective_s, INSIDE, chips=("amd",), why="links are divided among more"),
    greater(r"links\.\w+\.energy_per_byte", collective_j, COLLECTIVES),
    # Power, area, price
    greater(r"power\.energy_per_(flop|byte)\.\w+|power\.active", energy_j, KERNELS),
    greater(r"power\.energy_per_byte\.(hbm|link)", collective_j, COLLECTIVES),
    less(r"power\.(limit|lowest_clock)", slowness, WATTS),
    greater(r"power\.(idle|lowest_voltage)", slowness, WATTS),
    greater(r"power\.idle", idle_w, NOTHING),
    greater(
        r"(matrix|vector|memory\.sram|links)\b.*\.(rows|columns|lanes|size|shared_memory)",
        area_mm2,
        NOTHING,
    ),
    greater(r"links\.(fabric|host)\.bandwidth|memory\.hbm\.stacks|area\.cores_made", area_mm2, NOTHING),
    greater(r"area\.die", silicon_mm2, NOTHING, why="past the reticle it is two dies, of which more are good: cheaper"),
    greater(r"area\.dies", device_usd, NOTHING, chips=("gpu-pins", "arrays"), why="of a published size; else it falls"),
    greater(
        *(r"matrix(\[\d\])?\.(cores|count)", area_mm2, NOTHING),
        together=r".*\.(cores|count|lanes|cores_made)",
        factors=TWICE,
        why="lanes are the sold cores', and spare ones have theirs",
    ),
    greater(r"price\.device_hour", usd_per_s, NOTHING),
    # Fitted constants
    less(
        r"calibration\.gemm\.(efficiency|last_wave|dgrad|wgrad|unaligned|simd_efficiency|formats\.\w+)", kernel_s, GEMMS
    ),
    greater(r"calibration\.gemm\.(tile_loss|prologue_k|fixed_time)", kernel_s, GEMMS),
    less(r"calibration\.attention\..*\.(forward|backward|overlap|causal|head_\d+)", kernel_s, ATTENTIONS),
    greater(r"calibration\.attention\..*_overhead", kernel_s, ATTENTIONS),
    less(r"calibration\.memory\.\w+|calibration\.pass\.row_cache", kernel_s, KERNELS),
    greater(r"calibration\.pass\.(fixed_time|instructions.*|row_instructions.*)", kernel_s, PASSES),
    less(r"calibration\.links\.\w+\.(efficiency|p2p_efficiency|copy|reduction_efficiency)", collective_s, COLLECTIVES),
    greater(r"calibration\.links\.\w+\.(latency|launch|p2p_launch)", collective_s, COLLECTIVES),
)
NO_DIRECTION = {
    r"matrix(\[\d\])?\.formats\.(?!bf16$|fp8$)\w+": "as bf16 and fp8",
    r"matrix\.block_scaled\.(?!mxfp8$)\w+": "as mxfp8",
    r"vector\.formats\.(?!fp32$)\w+": "as fp32; asked of products in that format",
}


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: f"{claim.question.__name__} {claim.paths}"[:80])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(data=st.data())
def test_more_of_it_changes_results_in_one_direction(claim: Claim, data: st.DataObject) -> None:
    having = [name for name in claim.chips or chips() if any(re.fullmatch(claim.paths, path) for path in paths(name))]
    name = data.draw(st.sampled_from(having), "chip")
    path = data.draw(st.sampled_from([path for path in paths(name) if re.fullmatch(claim.paths, path)]), "path")
    chip = chips()[name]
    for other in data.draw(st.lists(st.sampled_from(paths(name)), max_size=5, unique=True), "others"):
        chip = scaled(chip, other, data.draw(st.sampled_from([0.25, 0.5, 0.8, 1.3, 2.0, 4.0]), other))
    factor = data.draw(st.sampled_from(claim.factors), "factor")
    lowered = data.draw(st.booleans(), "lowered")  # some numbers are as large as they may be
    grown = chip
    for one in [path] if not claim.together else [one for one in paths(name) if re.fullmatch(claim.together, one)]:
        grown = scaled(grown, one, 1.0 / factor if lowered else factor)
    if lowered:
        chip, grown = grown, chip
    work = data.draw(claim.work, "work")
    try:
        before, after = claim.question(chip_of(chip), work), claim.question(chip_of(grown), work)
    except InputError:
        assume(False)
    if claim.less:
        assert after <= before * (1 + 1e-9)
    else:
        assert after >= before * (1 - 1e-9)


def test_every_number_of_the_library_has_a_direction() -> None:
    patterns = [claim.paths for claim in CLAIMS] + list(NO_DIRECTION)
    silent = {
        path
        for name in names()
        for path, _ in numbers(plain(load_raw(name)))
        if not any(re.fullmatch(pattern, path) for pattern in patterns)
    }
    assert silent == set()
