"""Published training runs, row by row, and each row as a run file that states what the row states and nothing more."""

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cosim.spec.errors import closest
from cosim.spec.modelled import NotModelledError
from hwmodels.units import InputError
from workloads import named

FOLDER = Path(__file__).parent / "published"

_MODEL_NUMBERS: tuple[str, ...] = ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab")
_MODEL_NUMBERS += ("dense_layers", "num_experts", "experts_per_token", "moe_ffn", "shared_experts")
_MODEL_FLAGS = ("gated_mlp", "tied_embeddings")
_MODEL_WORDS = ("pos_emb", "attn_type", "mla")
# What a row cannot state but its model's published configuration does, if the library has a model of that name.
_FROM_LIBRARY = (
    "activation",
    "norm",
    "biases",
    "qkv_bias",
    "embedding_norm",
    "rope_theta",
    "norm_eps",
    "max_positions",
)
_PARALLEL = {"tensor": "tp", "pipeline": "pp", "context": "cp", "expert": "ep", "expert_tensor": "etp", "zero": "zero"}
_OVERLAP = {"gradients": "overlap_gradients", "parameters": "overlap_parameters", "tensor": "overlap_tensor"}
_UNKNOWN_COMPILED = (
    "tensorflow",
)  # their rows carry false, although whether XLA ran is not printed: the stack says it
_NO_DROPOUT = ("llama", "moe")  # families whose published configurations have none, whatever the framework's default
_EMBEDDING_SLOTS = "input and output embedding each take one layer slot of the pipeline partition"
_ALL_TO_ALL = "CP by all-to-all"
_OPTIMIZERS = {"decoupled_adamw": "adamw"}  # weight decay not scaled by the learning rate: the same work
# Details of recomputation that say no more than the column `recompute` does.
_PLAIN_RECOMPUTE = ("", "full/uniform/1", "core attention only", "per-op selective: every second matmul output saved")


@dataclass(frozen=True, slots=True)
class PublishedRun:
    """A row of training_runs.csv: what was run (`columns`, as text, by name), and what was measured."""

    id: str
    source: str
    group: str
    step_time_s: float | None
    peak_memory_gib: float | None
    score_time: bool
    score_memory: bool
    quality: str  # A everything stated, B one or two named assumptions, C several
    composed: bool  # a sum of profiled parts, not a timing: never scored as a measurement
    verbatim: bool  # the same number printed again
    columns: Mapping[str, str]


@cache
def runs() -> tuple[PublishedRun, ...]:
    """All published runs, in the order of the file."""
    return tuple(_read())


def find(identifier: str) -> PublishedRun:
    """The run with this id; raises InputError with the closest ids."""
    by_id = {run.id: run for run in runs()}
    if identifier not in by_id:
        hint = closest(identifier, list(by_id)) or f"; they look like {next(iter(by_id))}"
        raise InputError(f"there is no published run {identifier[:80]!r}{hint}")
    return by_id[identifier]


def to_run(run: PublishedRun) -> dict[str, Any]:
    """The run file of a row: a mapping for `RunSpec.from_mapping`, with what the row leaves open left out.

    Raises InputError if the row lacks what a run needs, NotModelledError for what a run file cannot say yet.
    """
    columns = run.columns
    system: dict[str, Any] = {"accelerator": columns["accelerator"], "devices": _number(run, "devices")}
    system |= _present(columns, ("devices_per_node", "nvlink_domain"))
    if columns["internode_gbps_per_device"]:
        system["network"] = {"inter_node": f"{float(columns['internode_gbps_per_device']):g} Gb/s"}
    workload: dict[str, Any] = {"model": _model(columns)} | {
        key: _number(run, key) for key in ("seq_len", "global_batch", "micro_batch")
    }
    if columns["task"]:
        workload["task"] = columns["task"]
    return {"workload": workload, "system": system, "parallel": _parallel(columns), "training": _training(run)}


def _read() -> Iterator[PublishedRun]:
    with (FOLDER / "training_runs.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            yield PublishedRun(
                id=row["id"],
                source=row["source"],
                group=row["group"],
                step_time_s=float(row["step_time_s"]) if row["step_time_s"] else None,
                peak_memory_gib=float(row["peak_memory_gib"]) if row["peak_memory_gib"] else None,
                score_time=row["score_time"] == "true",
                score_memory=row["score_memory"] == "true",
                quality=row["config_quality"],
                composed="composed" in row["flag"],
                verbatim=row["repeat_kind"] == "verbatim",
                columns=MappingProxyType(row),
            )


def _model(columns: Mapping[str, str]) -> dict[str, Any]:
    model: dict[str, Any] = {"family": columns["family"]}
    model |= _present(columns, _MODEL_NUMBERS)
    model |= {key: columns[key] == "true" for key in _MODEL_FLAGS if columns[key]}
    model |= {key: columns[key] for key in _MODEL_WORDS if columns[key]}
    try:
        config = named.load(columns["model"])
    except InputError:
        return model
    known = {key: getattr(config, key) for key in _FROM_LIBRARY}
    if model.get("gated_mlp", config.gated_mlp) != config.gated_mlp:
        del known["activation"]
    return known | model if config.family == columns["family"] else model


def _parallel(columns: Mapping[str, str]) -> dict[str, Any]:
    parallel: dict[str, Any] = {key: int(columns[column]) for key, column in _PARALLEL.items() if columns[column]}
    if columns["hsdp"] == "true":
        parallel["hybrid_shard"] = True
    if columns["sequence_parallel"]:
        parallel["sequence"] = columns["sequence_parallel"] == "true"
    if parallel.get("pipeline", 1) > 1:
        if columns["pipeline_schedule"]:
            parallel["schedule"] = columns["pipeline_schedule"].replace("_", "-")
        if columns["vpp"]:
            parallel["virtual_stages"] = int(columns["vpp"])
        if _EMBEDDING_SLOTS in columns["overlap"]:
            parallel["stage_layers"] = _with_embedding_slots(int(columns["layers"]), parallel["pipeline"])
    if _ALL_TO_ALL in columns["overlap"]:
        parallel["context_by"] = "all_to_all"
    overlap = {key: columns[column] == "true" for key, column in _OVERLAP.items() if columns[column]}
    return parallel | ({"overlap": overlap} if overlap else {})


def _with_embedding_slots(layers: int, stages: int) -> list[int]:
    """Layers per stage where the embeddings before the first and after the last one are counted as one each."""
    slots, rest = divmod(layers + 2, stages)
    counts = [slots + (stage < rest) for stage in range(stages)]
    return [counts[0] - 1, *counts[1:-1], counts[-1] - 1]


def _training(run: PublishedRun) -> dict[str, Any]:
    columns = run.columns
    if columns["recompute_detail"] not in _PLAIN_RECOMPUTE:
        detail = columns["recompute_detail"]
        raise NotModelledError(
            f"training.recompute: '{detail}' is not modelled yet ({run.id})", "training.recompute", detail
        )
    training: dict[str, Any] = {key: columns[key] for key in ("framework", "precision", "recompute") if columns[key]}
    if columns["optimizer"]:
        training["optimizer"] = _OPTIMIZERS.get(columns["optimizer"], columns["optimizer"])
    if columns["attention"] == "unfused":
        training["attention"] = "unfused"
    elif columns["attention"] == "flash":
        training["attention"] = "flash"  # no source prints the version (column attention_impl); the stack's fact holds
    if columns["family"] in _NO_DROPOUT:
        training["dropout"] = 0.0
    if columns["compiled"] and columns["framework"] not in _UNKNOWN_COMPILED:
        training["compile"] = columns["compiled"] == "true"
    return training


def _present(columns: Mapping[str, str], names: tuple[str, ...]) -> dict[str, int]:
    return {name: int(columns[name]) for name in names if columns[name]}


def _number(run: PublishedRun, column: str) -> int:
    if not run.columns[column]:
        raise InputError(f"published run {run.id}: {column} is not known, so it cannot be simulated")
    return int(run.columns[column])
