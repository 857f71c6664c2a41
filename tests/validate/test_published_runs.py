"""Every published row becomes the run file that it states, or says what is missing or not modelled yet."""

from collections import Counter

import pytest

from cosim.spec import NotModelledError, RunSpec
from cosim.validate.published_runs import PublishedRun, find, runs, to_run
from hwmodels.units import InputError

ALL = runs()


def spec_of(run: PublishedRun) -> RunSpec | None:
    """The row's RunSpec, None where it is refused."""
    try:
        return RunSpec.from_mapping(to_run(run), run.id)
    except InputError:
        return None


MODELLED = [(run, spec) for run in ALL if (spec := spec_of(run)) is not None]


def test_the_tables_are_complete() -> None:
    assert len(ALL) == 1892
    assert len({run.id for run in ALL}) == 1892


def test_every_modelled_row_is_read_back_from_its_own_echo() -> None:
    assert len(MODELLED) >= 1813
    for run, spec in MODELLED:
        assert RunSpec.from_mapping(spec.echo(), run.id) == spec, run.id


def test_mosaicml_rows_are_all_modelled() -> None:
    assert Counter(run.source for run, _ in MODELLED)["mosaicml"] == 105


def test_parameters_of_modelled_rows_are_those_that_the_table_computed() -> None:
    for run, spec in MODELLED:
        config = spec.dimensions()
        assert config is not None
        # The table counts weights without biases, norms and the position table, a few parts in a thousand; small models
        # with long sequences have larger position tables.
        matrices = config.layers * config.layer_matmul_parameters() + config.vocab * config.hidden * (
            1 if config.tied_embeddings else 2
        )
        if config.family == "moe":  # whose layers differ: the module's own count
            matrices = config.parameters()
        assert matrices / 1e9 == pytest.approx(float(run.columns["params_b"]), rel=0.05), run.id


def test_replicas_and_layout_are_the_rows_own() -> None:
    for run, spec in MODELLED:
        assert spec.data_parallel == int(run.columns["dp"]), run.id
        assert spec.workload.global_batch == spec.micro_steps * spec.data_parallel * spec.workload.micro_batch, run.id


def test_what_a_row_states_is_in_its_run_file() -> None:
    data = to_run(find("torchtitan-0001"))
    assert data["workload"]["model"]["kv_heads"] == 8
    assert data["workload"]["model"]["gated_mlp"] is True
    assert data["system"] == {
        "accelerator": "h100-sxm-96gb-hbm2e-500w",
        "devices": 8,
        "devices_per_node": 8,
        "nvlink_domain": 8,
        "network": {"inter_node": "400 Gb/s"},
    }
    assert data["parallel"]["zero"] == 3
    assert data["training"] == {
        "framework": "torchtitan",
        "precision": "bf16",
        "recompute": "selective_op",
        "optimizer": "adamw",
        "attention": "flash",
        "dropout": 0.0,
        "compile": False,
    }


def test_rows_of_all_frameworks_but_one_are_modelled() -> None:
    modelled = {run.columns["framework"] for run, _ in MODELLED}
    # MaxText's two rows keep every matrix product, which no policy of the run file does.
    assert {run.columns["framework"] for run in ALL} - modelled == {"maxtext"}


def test_interleaved_schedule_is_passed_with_its_virtual_stages() -> None:
    for run, spec in MODELLED:
        stated = run.columns["vpp"]
        assert spec.parallel.virtual_stages == (int(stated) if stated and spec.parallel.pipeline > 1 else 1), run.id


def test_embeddings_that_take_a_slot_of_the_partition_leave_the_outer_stages_a_layer_less() -> None:
    slots = [run for run in ALL if "embedding each take one layer slot" in run.columns["overlap"]]
    assert len(slots) == 18
    run = next(run for run in slots if run.columns["layers"] == "70" and run.columns["pp"] == "12")
    assert to_run(run)["parallel"]["stage_layers"] == [5, *[6] * 10, 5]


def test_context_parallelism_by_all_to_all_is_the_rows_word() -> None:
    by = {run.id: spec.parallel.context_by for run, spec in MODELLED if "CP by all-to-all" in run.columns["overlap"]}
    assert by
    assert set(by.values()) == {"all_to_all"}


def test_what_a_row_does_not_know_is_left_to_the_framework() -> None:
    tensorflow = next(run for run in ALL if run.columns["framework"] == "tensorflow")
    assert "compile" not in to_run(tensorflow)["training"]  # the table's false: no source says whether XLA ran
    bert = next(run for run in ALL if run.columns["family"] == "bert" and spec_of(run) is not None)
    assert "dropout" not in to_run(bert)["training"]


def test_decoupled_adamw_is_the_work_of_adamw() -> None:
    assert to_run(find("mosaicml-0027"))["training"]["optimizer"] == "adamw"


def refusal(run: PublishedRun) -> InputError | None:
    """Why the row is refused, None where it is not."""
    try:
        RunSpec.from_mapping(to_run(run), run.id)
    except InputError as error:
        return error
    return None


def test_a_refused_row_is_either_not_modelled_or_lacks_a_column() -> None:
    for error in filter(None, map(refusal, ALL)):
        known = isinstance(error, NotModelledError) and error.key
        assert known or "missing" in str(error) or "not known" in str(error), str(error)


def test_unknown_id_suggests_one() -> None:
    with pytest.raises(InputError, match="did you mean 'mosaicml-0027'"):
        find("mosaicm-0027")
