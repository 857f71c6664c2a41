"""More of what a chip has never makes it slower, over chips that do not exist."""

import copy
import functools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.accelerator import Accelerator, build, load_raw
from hwmodels.catalog import Written, si_value
from hwmodels.parameters import Section
from hwmodels.work import Attention, Gemm, Pass

RAW = functools.cache(load_raw)
BASES = ("h100-sxm-80gb", "gpu-like", "systolic-edge", "tpu-v5p", "a100-sxm-80gb")
# Path -> dimension (None: a plain number) of what a chip has more of.
MORE: dict[str, str | None] = {
    "clock": "frequency",
    "memory.hbm.bandwidth": "bandwidth",
    "memory.sram.bandwidth": "bandwidth",
    "memory.sram.size": "data",
    "vector.lanes": None,
    "vector.special_function_rate": None,
    "matrix.formats.bf16": None,
}
UNITS = {"frequency": "Hz", "bandwidth": "B/s", "data": "B"}


def value(data: Any, path: str) -> Any:
    for key in path.split("."):
        data = (data[0] if isinstance(data, list) else data).get(key)
        if data is None:
            return None
    return data["value"] if isinstance(data, dict) else data


def scaled(data: dict[str, Any], factors: dict[str, float]) -> dict[str, Any]:
    """The file with each of these numbers times its factor, where it has them."""
    changed = copy.deepcopy(data)
    for path, factor in factors.items():
        old, dimension = value(changed, path), MORE[path]
        if old is None:
            continue
        node: Any = changed
        *parents, last = path.split(".")
        for key in parents:
            node = node[key][0] if isinstance(node[key], list) else node[key]
        if dimension is None:
            new = float(old) * factor
            node[last] = max(1, round(new)) if path == "vector.lanes" else min(1.0, new) if "rate" in path else new
        else:
            number = si_value(old, dimension)
            assert number is not None
            node[last] = f"{number * factor:.9g} {UNITS[dimension]}"
    return changed


def chip_of(data: dict[str, Any]) -> Accelerator:
    plain = copy.deepcopy(data)
    plain["memory"]["hbm"].pop("stacks", None)
    plain["memory"]["hbm"]["bus_width"] = 10**6  # any bandwidth
    levels = plain["memory"]["sram"]
    for level in levels if isinstance(levels, list) else [levels]:
        level.pop("banks", None)  # any bandwidth here too
        level.pop("bank_width", None)
    return build(Section(plain, "chip"), Written(plain, "chip"))


SIZES = st.integers(0, 13).map(lambda power: 2**power) | st.integers(1, 9000)
GEMMS = st.builds(Gemm, SIZES, SIZES, SIZES, st.sampled_from([1, 3, 16]))
PASSES = st.builds(
    lambda size, operations, special, kind: Pass(size, size, operations * size, special * size, kind=kind),
    st.floats(1e3, 1e9),
    st.floats(0, 30),
    st.floats(0, 4),
    st.sampled_from(["stream", "row", "gather", "transpose"]),
)
ATTENTIONS = st.builds(
    lambda phase, heads, length, width, causal: Attention(
        "flash-2", phase, 2, 4 * heads, heads, length, length, width, causal
    ),
    st.sampled_from(["forward", "backward"]),
    st.integers(1, 16),
    st.integers(16, 8192),
    st.sampled_from([64, 128]),
    st.booleans(),
)
CHIPS = st.tuples(st.sampled_from(BASES), st.fixed_dictionaries({path: st.floats(0.3, 3.0) for path in MORE}))


@pytest.mark.parametrize("path", MORE)
@settings(max_examples=60, deadline=None)
@given(chip=CHIPS, work=GEMMS | PASSES | ATTENTIONS, factor=st.floats(1.05, 8.0))
def test_more_of_it_is_never_slower(
    path: str, chip: tuple[str, dict[str, float]], work: Gemm | Pass | Attention, factor: float
) -> None:
    data = scaled(RAW(chip[0]), chip[1])
    before, after = chip_of(data).cost(work), chip_of(scaled(data, {path: factor})).cost(work)
    assert after.time_s <= before.time_s * (1 + 1e-9)
    if path == "memory.sram.size":
        assert after.bytes_per_level["hbm"] <= before.bytes_per_level["hbm"] * (1 + 1e-9)


WORKS = (
    *(Gemm(8192, 8192, 8192), Gemm(8192, 8192, 64), Gemm(64, 8192, 8192)),
    *(Pass(1e9, 1e9), Pass(1e9, 1e9, 64e9, 0.0), Pass(1e9, 1e9, 0.0, 64e9)),
    Attention("flash-2", "forward", 2, 16, 16, 8192, 8192, 64, False),
)


@pytest.mark.parametrize("path", MORE)
def test_more_of_it_is_faster_for_some_work_on_some_chip(path: str) -> None:
    scarce = {path: 0.01 if path.endswith("size") else 0.2}
    pairs = [(chip_of(scaled(RAW(base), scarce)), chip_of(RAW(base))) for base in BASES]
    assert any(more.cost(work).time_s < less.cost(work).time_s for less, more in pairs for work in WORKS)
