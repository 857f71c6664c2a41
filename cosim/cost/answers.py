"""What one kernel or collective costs: a row of the published tables' columns in, its cost out.

Columns are those of kernels.csv and collectives.csv (values may be text, as a csv file has them); those that say what
was measured (time_us, tflops, busbw_gbps, source, note, id) may stay.
"""

import json
from collections.abc import Mapping
from typing import Any

from cosim.cost.rows import ATTENTION, COLLECTIVES, algorithm_of, check_columns, collective, kernels, op_of, whole
from hwmodels.accelerator import Accelerator, load
from hwmodels.cluster import Cluster
from hwmodels.units import InputError
from hwmodels.work import Cost
from hwmodels.yaml_file import load_json


def answer(row: Mapping[str, Any], chips: dict[str, Accelerator]) -> dict[str, Any]:
    """The cost of a row's op: op, accelerator, time_us, flops, bytes per memory level, limited_by, energy_j,
    calibration; `id` if the row has one, `algorithm` where there is a choice, `cycles` on a systolic array.

    `chips` keeps the accelerators that were built, by what names them. Raises InputError: a column that is unknown, is
    missing, or has a value that cannot be.
    """
    check_columns(row)
    chip = _chip(row.get("accelerator"), chips)
    op = op_of(row)
    if op in COLLECTIVES:
        costs, algorithm = _collective(row, chip)
    elif op in ATTENTION:
        costs, algorithm = _attention(row, chip)
    else:
        costs, algorithm = [chip.cost(work) for work in kernels(row)], ""
    levels = dict.fromkeys(level for cost in costs for level in cost.bytes_per_level)
    found = {
        **({"id": row["id"]} if row.get("id") else {}),
        "op": op,
        "accelerator": chip.name,
        **({"algorithm": algorithm} if algorithm else {}),
        "time_us": sum(cost.time_s for cost in costs) * 1e6,
        "flops": sum(cost.flops for cost in costs),
        "bytes": {level: sum(cost.bytes_per_level.get(level, 0.0) for cost in costs) for level in levels},
        "limited_by": max(costs, key=lambda cost: cost.time_s).limited_by,
        "energy_j": sum(cost.energy_j for cost in costs),
    }
    cycles = [cost.cycles for cost in costs if cost.cycles is not None]
    if cycles:
        found["cycles"] = sum(cycles)
    return {**found, "calibration": chip.calibration_status}


def answer_line(line: bytes, where: str, chips: dict[str, Accelerator], default: str | None = None) -> dict[str, Any]:
    """The answer to one line of JSON, on the accelerator `default` where it names none; a line that has no answer
    becomes {"error": sentence}.
    """
    try:
        row = load_json(line, where)
        if not isinstance(row, dict):
            raise InputError(f"{where}: must be an object of columns, not {row!r:.80}")
        return answer(row if default is None or row.get("accelerator") else {**row, "accelerator": default}, chips)
    except InputError as error:
        sentence = " ".join(str(error).split())
        return {"error": sentence if sentence.startswith(where) else f"{where}: {sentence}"}


def _chip(reference: Any, chips: dict[str, Accelerator]) -> Accelerator:
    if not isinstance(reference, str | Mapping):
        raise InputError(
            f"accelerator: {reference!r:.80} must be a name, a .yaml file, or {{base: NAME, set: {{...}}}}"
        )
    key = json.dumps(reference, sort_keys=True, default=str)
    if key not in chips:
        chips[key] = load(reference)
    return chips[key]


def _attention(row: Mapping[str, Any], chip: Accelerator) -> tuple[list[Cost], str]:
    """Its kernels' costs; by the algorithm that the row names, or the one that is fastest on the chip."""
    named = algorithm_of(row)
    tried = {
        algorithm: [chip.cost(work) for work in kernels(row, algorithm)]
        for algorithm in ((named,) if named else chip.attention)
    }
    best = min(tried, key=lambda algorithm: sum(cost.time_s for cost in tried[algorithm]))
    return tried[best], best


def _collective(row: Mapping[str, Any], chip: Accelerator) -> tuple[list[Cost], str]:
    cluster = Cluster.build(chip, whole(row, "devices"), whole(row, "devices_per_node", 8), where="row")
    work = collective(row, cluster.domain)
    return [cluster.cost(work)], cluster.collective_cost(work).algorithm
