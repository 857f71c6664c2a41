"""Which constants of a device's links are fitted on which published collectives."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cosim.calibrate.constants import Constant, Line, constant_of, line_of
from cosim.calibrate.fit import Free, Predict, fit
from cosim.calibrate.rows import Row
from hwmodels.accelerator import Accelerator
from hwmodels.cluster import Cluster
from hwmodels.work import Collective


@dataclass(frozen=True, slots=True)
class LinkFit:
    """One fit: the constants `free` of `tier` (key in the file's `calibration.links.TIER` -> field of its `Link`), on
    `rows`; errors are reported for `reported`.
    """

    tier: str
    free: Mapping[str, str]
    rows: Sequence[Row]
    reported: Sequence[Row]


_BOUNDS = {"launch": Free(30.0, 0.0, 100.0), "copy": Free(0.7, 0.1, 5.0), "efficiency": Free(0.9, 0.3, 0.95)}
_UNITS = {"launch": (1e-6, "us"), "copy": (1e12, "TB/s"), "efficiency": (1.0, "")}
_REDUCE = {"copy": "copy_bytes_per_s", "launch": "launch_s"}
_MESSAGE = {"p2p_efficiency": "p2p_efficiency", "p2p_launch": "p2p_launch_s"}


def calibrate_links(rows: Sequence[Row], chip: Accelerator) -> tuple[list[Constant], list[Line]]:
    """Launch and local copying of collectives on the fast fabric, from all-reduces of at least 1 MiB inside a node;
    launch and efficiency of messages between two devices, of one node and of two. The fabric's own efficiency is the
    packets' (see the file), not fitted.
    """
    large = [row for row in rows if row.accelerator == chip.name and _bytes(row) >= 2**20]
    constants: list[Constant] = []
    lines: list[Line] = []
    for one in _fits(large, chip):
        found, line = _fitted(one, chip)
        constants += found
        lines += line
    return constants, lines


def _fits(rows: Sequence[Row], chip: Accelerator) -> list[LinkFit]:
    reduces = [row for row in rows if row.op == "all_reduce" and _nodes(row) == 1]
    near = [row for row in rows if row.op == "send_recv" and _nodes(row) == 1]
    far = [row for row in rows if row.op == "send_recv" and _nodes(row) == 2]
    if chip.links.fabric is not None and chip.links.fabric.topology == "pairs":
        reduces = [row for row in reduces if _work(row).devices == chip.links.fabric.domain]
    # nccl-tests runs kernels back to back; torch.distributed is kept as a second opinion where there are both.
    sources = sorted({row.source for row in reduces}, key=lambda source: (source != "vtrain_nccl", source))
    main = [row for row in reduces if row.source == sources[0]]
    # Of a network less than half as fast as the file's: another one.
    network = chip.links.network
    fastest = max((_bytes(row) / row.time_s for row in far), default=0.0)
    if network is None or fastest < 0.5 * network.bandwidth_bytes_per_s:
        far = []
    fits = [LinkFit("fabric", _REDUCE, main, reduces)]
    fits += [LinkFit("fabric", _MESSAGE, near, near), LinkFit("network", _MESSAGE, far, far)]
    return [one for one in fits if one.rows]


def _fitted(one: LinkFit, chip: Accelerator) -> tuple[list[Constant], list[Line]]:
    nodes = 2 if one.tier == "network" else 1
    bridged = chip.links.fabric is not None and chip.links.fabric.topology == "pairs"
    largest = max(_work(row).per_node for row in one.reported)
    size = chip.links.fabric.domain if bridged and chip.links.fabric else max(8, largest)
    cluster = Cluster.build(chip, size * nodes, size)
    tier = "host" if one.tier == "fabric" and chip.links.fabric is None else one.tier  # what the file calls it
    short = {key: key.removeprefix("p2p_") for key in one.free}

    def model(values: dict[str, float]) -> Predict:
        changes = {field: values[key] * _UNITS[short[key]][0] for key, field in one.free.items()}
        link = replace(cluster.tiers[one.tier], **changes)  # type: ignore[arg-type]
        other = replace(cluster, tiers={**cluster.tiers, one.tier: link})
        return lambda row: other.collective_cost(_work(row)).time_s

    found = fit({key: _BOUNDS[short[key]] for key in one.free}, model, one.rows)
    op = f"{one.rows[0].op}{' between nodes' if nodes == 2 else ''} >= 1 MiB"
    basis = f"{one.rows[0].source} {op}, {one.rows[0].label}"
    constants = [
        constant_of(f"links.{tier}.{key}", found.values[key], _UNITS[short[key]][1], basis, found, key)
        for key in one.free
    ]
    predict = model(found.values)
    labels = sorted({row.label for row in one.reported})
    lines = [line_of(op, label, predict, [row for row in one.reported if row.label == label]) for label in labels]
    return constants, lines


def _work(row: Row) -> Collective:
    work = row.works[0]
    assert isinstance(work, Collective)
    return work


def _nodes(row: Row) -> int:
    return -(-_work(row).devices // _work(row).per_node)


def _bytes(row: Row) -> float:
    return _work(row).bytes
