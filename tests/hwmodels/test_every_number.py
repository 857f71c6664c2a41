"""Every number of accelerator files of each kind changes what work costs, or stands here with a reason."""

import copy
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from hwmodels.accelerator import Accelerator, Work, build, load, load_raw
from hwmodels.catalog import Written, resolve
from hwmodels.cluster import Cluster
from hwmodels.number_formats import FORMATS
from hwmodels.parameters import NOTES, Section
from hwmodels.units import InputError
from hwmodels.work import Attention, Collective, Gemm, HostCopy, Pass

# A GPU, a systolic array on a torus, PCIe with pairs, two on-chip levels of another vendor, a processor.
CHIPS = ("h100-sxm-80gb", "tpu-v5p", "a100-pcie-80gb", "mi300x", "xeon-amx", "systolic-edge", "trn1")
# What the device holds, draws at rest, occupies and costs: no kernel's time, energy or traffic changes with it.
# (A file's own energies are not derived from its process; fp64 lanes beside matrix units that have fp64 take room.)
OF_THE_DEVICE = r"process|vector\.formats\.fp64|memory\.hbm\.capacity|price\..*|area\..*|power\.(idle|limit|lowest_.*)"
NO_EFFECT = {
    r"peaks\..*": "published, for cosim hw check",
    r"architecture|sources.*|title|name": "say what it is",
    r"calibration\.links\.host\.(?!p2p_).*": "of collectives over it, on chips whose file has no other links",
    r"vector\.formats\.(bf16|fp16)": "pointwise kernels compute in fp32, products in these formats on the matrix unit",
    r".*\.domain": "how many devices there are is the cluster's; a run decides how many it uses",
}


def works() -> Iterator[Work]:
    """Large, small, thin and ragged products, every attention, every walk through memory."""
    for format in FORMATS:
        for m, n, k in ((8192, 8192, 8192), (64, 4096, 4096), (300, 200, 129), (16384, 16384, 256)):
            yield Gemm(m, n, k, format=format)
    for format in ("bf16", "fp16"):
        yield Gemm(4096, 4096, 4096, format=format, layout="NN")
        yield Gemm(4096, 4096, 4096, format=format, layout="NT")
    yield Gemm(4096, 4096, 4096, sparsity="2:4")
    for algorithm in ("unfused", "flash-1", "flash-2", "flash-3", "flash-triton", "cudnn"):
        for phase in ("forward", "backward"):
            for head in (64, 128, 256):
                for causal in (False, True):
                    yield Attention(algorithm, phase, 2, 16, 4, 2048, 2048, head, causal)
    for kind in ("stream", "row", "gather", "transpose"):
        for size in (1e5, 1e9):
            for operations in ({}, {"vector_ops": 8 * size}, {"special_ops": 8 * size}):
                yield Pass(size, size, kind=kind, **operations)  # type: ignore[arg-type]
    for row in (2**14, 2**15, 2**16, 2**17):
        yield Pass(1e9, 1e9, kind="row", row_bytes=row, sweeps=3.0)
    yield HostCopy(1e9, "host_to_device")
    yield HostCopy(1e3, "device_to_host")


WORKS = tuple(works())


def of_the_device(chip: Accelerator) -> Iterator[Any]:
    """What the chip says of itself: room, price, power at rest, the clock under a load."""
    yield chip.memory.hbm.capacity_bytes, chip.price_usd_per_s, chip.area
    yield chip.power.idle_w, chip.power.limit_w
    yield [chip.power.sustained_clock(watts, chip.clock_hz) for watts in (1e3, 1e5)]


def costs(chip: Accelerator) -> Iterator[Any]:
    """Time, energy and traffic of all work and of collectives."""
    for work in WORKS:
        try:
            yield chip.cost(work)
        except InputError:
            yield None
    for devices, per_node in ((8, 8), (2, 2), (16, 8), (4, 1), (512, 8)):
        try:
            cluster = Cluster.build(chip, max(devices, 16), 8)
        except InputError:
            continue
        for kind in ("all_reduce", "all_gather", "all_to_all", "send_recv"):
            members, near = (2, min(2, per_node)) if kind == "send_recv" else (devices, per_node)
            for size in (1e4, 1e9):
                try:
                    found = cluster.collective_cost(Collective(kind, size, members, near))
                except InputError:
                    found = None
                yield found and (found.time_s, found.energy_j, found.core_share)


def numbers(node: object, path: str = "") -> Iterator[tuple[str, str]]:
    """Path and text of every number of a file."""
    if isinstance(node, Mapping) and "value" not in node:
        for key, inner in node.items():
            full = f"{path}.{key}" if path else str(key)
            if key not in NOTES or full == "matrix.rows":
                yield from numbers(inner, full)
    elif isinstance(node, list):
        for place, inner in enumerate(node):
            yield from numbers(inner, f"{path}.{place}")
    else:
        text = str(node["value"] if isinstance(node, Mapping) else node)
        if re.match(r"\d", text):
            yield path, text


def others(text: str) -> Iterator[str]:
    """Smaller and larger values in the same unit."""
    number = re.match(r"[\d.]+(?:e[-+]?\d+)?", text)
    assert number is not None
    old, unit = float(number[0]), text[len(number[0]) :]
    for new in (0.5 * old, 2.0 * old, 0.9 * old, old + 1.0, 10.0 * old, 0.05 * old):
        if new != old:
            yield f"{round(new) if new == int(new) or number[0].isdigit() and old > 1 else f'{new:.6g}'}{unit}"


def with_value(data: dict[str, Any], path: str, value: str) -> Accelerator:
    """The chip with another value at a path, through lists too."""
    changed = copy.deepcopy(data)
    node: Any = changed
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    for key in parents:
        node = node[key]
    node[last] = {**node[last], "value": value} if isinstance(node[last], dict) else value
    return build(Section(changed, "chip"), Written(changed, "chip"))


@functools.cache
def plain(name: str, answers: Callable[[Accelerator], Iterator[Any]]) -> tuple[Any, ...]:
    data = load_raw(name)
    return tuple(answers(build(Section(data, "chip"), Written(data, "chip"))))


def changes(name: str, path: str, text: str) -> bool:
    """Whether another value at `path` changes what work costs; of the device's own numbers, what it says of itself."""
    data = resolve(name).data
    answers = of_the_device if re.fullmatch(OF_THE_DEVICE, path) else costs
    for value in others(text):
        try:
            chip = with_value(data, path, value)
        except InputError:
            continue
        if any(one != other for one, other in zip(answers(chip), plain(name, answers), strict=True)):
            return True
    return False


@pytest.mark.parametrize("name", CHIPS)
def test_every_number_of_a_file_changes_some_answer(name: str) -> None:
    dead = [
        path
        for path, text in numbers(load_raw(name))
        if not any(re.fullmatch(pattern, path) for pattern in NO_EFFECT) and not changes(name, path, text)
    ]
    assert dead == []
    assert load(name).name == name
