"""Which constants of a device's links are fitted on which published collectives."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from cosim.calibrate.constants import Constant, Line, constant_of, line_of
from cosim.calibrate.fit import Free, Predict, fit
from cosim.calibrate.rows import Row
from hwmodels.accelerator import Accelerator
from hwmodels.cluster import Cluster
from hwmodels.work import Collective


def calibrate_links(rows: Sequence[Row], chip: Accelerator) -> tuple[list[Constant], list[Line]]:
    """Launch and local copying of collectives on the fast fabric, from all-reduces of at least 1 MiB inside a node;
    launch and efficiency of messages between two devices. The fabric's own efficiency is the packets' (see the file),
    not fitted.
    """
    inside = [r for r in rows if r.accelerator == chip.name and _inside(r)]
    reduces = [r for r in inside if r.op == "all_reduce" and _bytes(r) >= 2**20]
    messages = [r for r in inside if r.op == "send_recv" and _bytes(r) >= 2**20]
    constants: list[Constant] = []
    lines: list[Line] = []
    if not reduces and not messages:
        return constants, lines
    fabric = chip.links.fabric
    if fabric is not None and fabric.topology != "switch":  # without a switch only the full group has all links
        reduces = [r for r in reduces if isinstance(r.works[0], Collective) and r.works[0].devices == fabric.domain]
    sources = sorted({row.source for row in reduces})
    # nccl-tests runs kernels back to back; torch.distributed is kept as a second opinion where there are both.
    main = (
        [row for row in reduces if row.source == ("vtrain_nccl" if "vtrain_nccl" in sources else sources[0])]
        if sources
        else []
    )
    free = {"launch": Free(30.0, 0.0, 100.0)}
    reduce = {**free, "copy": Free(0.7, 0.1, 5.0)}
    message = {**free, "efficiency": Free(0.9, 0.3, 0.95)}
    units = {"launch": 1e-6, "copy": 1e12, "efficiency": 1.0}
    cluster = Cluster.build(chip, 8, 8)

    def model(names: Mapping[str, str]) -> Callable[[dict[str, float]], Predict]:
        def build(values: dict[str, float]) -> Predict:
            fabric = cluster.tiers["fabric"]
            changes = {names[key]: value * units[key] for key, value in values.items()}
            other = replace(cluster, tiers={**cluster.tiers, "fabric": replace(fabric, **changes)})  # type: ignore[arg-type]
            return lambda row: _collective_time(other, row)

        return build

    for kind, found, names, constant in (
        ("", main, {"copy": "copy_bytes_per_s", "launch": "launch_s"}, reduce),
        ("p2p_", messages, {"efficiency": "p2p_efficiency", "launch": "p2p_launch_s"}, message),
    ):
        if not found:
            continue
        one = fit(constant, model(names), found)
        basis = f"{found[0].source} {found[0].op} >= 1 MiB, {found[0].label}"
        for key, unit in (("efficiency", ""), ("copy", "TB/s"), ("launch", "us")):
            if key in constant:
                path = f"links.fabric.{kind}{key}"
                constants.append(constant_of(path, one.values[key], unit, basis, one, key))
        predict = model(names)(one.values)
        every = reduces if found is main else messages
        lines += [
            line_of(f"{found[0].op} >= 1 MiB", label, predict, [row for row in every if row.label == label])
            for label in sorted({row.label for row in every})
        ]
    return constants, lines


def _collective_time(cluster: Cluster, row: Row) -> float:
    work = row.works[0]
    assert isinstance(work, Collective)
    return cluster.collective_cost(work).time_s


def _inside(row: Row) -> bool:
    work = row.works[0]
    return isinstance(work, Collective) and work.devices == work.per_node <= 8


def _bytes(row: Row) -> float:
    work = row.works[0]
    return work.bytes if isinstance(work, Collective) else 0.0
