"""A run file is read as meant, or refused in one sentence that names file, key, value and what is allowed."""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosim.spec import NotModelledError, RunSpec
from cosim.spec.modelled import MODELLED
from hwmodels.units import InputError

EXAMPLE = """
workload:
  model: {family: gpt, layers: 32, hidden: 4096, heads: 32, ffn: 16384, vocab: 50368, tied_embeddings: true}
  seq_len: 2048
  global_batch: 512
  micro_batch: 2
  tokens: 1.0e12
system: {accelerator: h100-sxm-80gb, devices: 64, devices_per_node: 8, network: {inter_node: 400 Gb/s}}
parallel: {zero: 3, overlap: {gradients: true}}
training: {framework: composer, precision: bf16, recompute: {every: 2}, dropout: 0.1}
"""


def test_example_is_read_with_units_and_defaults() -> None:
    spec = RunSpec.from_text(EXAMPLE)
    assert spec.system.network.inter_node == 50e9  # 400 Gb/s in bytes/s
    assert spec.system.network.overrides() == {"inter_node": 50e9}
    assert (spec.data_parallel, spec.micro_steps, spec.nodes) == (64, 4, 8)
    assert spec.tokens_per_step == 512 * 2048
    dimensions = spec.dimensions()
    assert dimensions is not None
    assert dimensions.head_dim == 128
    assert spec.workload.task == "pretrain"
    assert spec.system.nvlink_domain is None  # the accelerator's own


def test_echo_is_a_run_file_of_the_same_run() -> None:
    spec = RunSpec.from_text(EXAMPLE)
    assert RunSpec.from_mapping(spec.echo()) == spec


@given(
    devices=st.sampled_from([1, 2, 4, 8, 16, 1024]),
    accumulation=st.integers(1, 50),
    micro_batch=st.integers(1, 64),
    inter_node=st.floats(1e-3, 1e6),
    framework=st.sampled_from(["pytorch", "composer", "torchtitan"]),
)
def test_echo_round_trips(devices: int, accumulation: int, micro_batch: int, inter_node: float, framework: str) -> None:
    spec = RunSpec.from_mapping(
        {
            "workload": {
                "model": "gpt2",
                "seq_len": 1024,
                "global_batch": devices * accumulation * micro_batch,
                "micro_batch": micro_batch,
            },
            "system": {
                "accelerator": "h100-sxm-80gb",
                "devices": devices,
                "network": {"inter_node": f"{inter_node:.6g} Gb/s"},
            },
            "training": {"framework": framework},
        }
    )
    again = RunSpec.from_mapping(spec.echo())
    assert again.echo() == spec.echo()
    assert again.micro_steps == accumulation
    assert again.system.network.inter_node == pytest.approx(spec.system.network.inter_node, rel=1e-11)


def test_fsdp_frameworks_shard_by_default_and_an_override_derives_it_anew() -> None:
    spec = RunSpec.from_text(EXAMPLE.replace("zero: 3, ", ""))
    assert spec.parallel.zero == 3
    assert spec.override(["training.framework=pytorch"]).parallel.zero == 0
    assert spec.override(["parallel.zero=1", "training.framework=pytorch"]).parallel.zero == 1


def test_override_reads_yaml_and_leaves_the_original_alone() -> None:
    spec = RunSpec.from_text(EXAMPLE)
    other = spec.override(["training.recompute=none", "system.network={inter_node: 100 GB/s}", "workload.model=gpt2"])
    assert other.training.recompute == "none"
    assert other.system.network.inter_node == 100e9
    assert spec.training.recompute != "none"


def test_override_of_an_accelerators_number_makes_a_variation() -> None:
    other = RunSpec.from_text(EXAMPLE).override(["system.accelerator.set.matrix.cores=264"])
    assert other.echo()["system"]["accelerator"] == {"base": "h100-sxm-80gb", "set": {"matrix.cores": 264}}


def test_a_run_smaller_than_a_node_uses_some_of_it() -> None:
    spec = RunSpec.from_text(EXAMPLE).override(["system.devices=4"])
    assert (spec.nodes, spec.data_parallel) == (1, 4)


def test_files_are_looked_for_beside_the_run_file(tmp_path: Path) -> None:
    (tmp_path / "chip.yaml").write_text("name: chip")
    (tmp_path / "run.yaml").write_text(EXAMPLE.replace("h100-sxm-80gb", "chip.yaml"))
    assert RunSpec.load(tmp_path / "run.yaml").system.accelerator == str(tmp_path / "chip.yaml")


def test_python_model_is_named_and_not_imported() -> None:
    spec = RunSpec.from_text(EXAMPLE).override(["workload.model={python: 'no.such.module:build', arguments: {n: 2}}"])
    assert spec.dimensions() is None
    assert spec.model().target == "no.such.module:build"  # type: ignore[union-attr]


BAD = {
    "training.precison=fp16": "training.precison is not a key of the run file; did you mean 'precision'?",
    "workload.model.headz=2": "did you mean 'heads'?",
    "training.precision=bf61": "did you mean 'bf16'?",
    "training.dropout=.nan": "training.dropout: nan must be a finite number",
    "training.dropout=1": "less than 1",
    "training.dropout=-0.1": "at least 0",
    "workload.tokens=.inf": "finite",
    "system.devices=0": "system.devices: 0 must be at least 1",
    "system.devices=-8": "at least 1",
    "system.devices=100000000": "at most 10000000",
    "system.devices='8'": "must be a whole number",
    "system.devices=8.5": "must be a whole number",
    "system.devices=true": "must be a whole number",
    "system.devices=60": "must be a multiple of system.devices_per_node 8",
    "parallel.zero=4": "at most 3",
    "parallel.zero=true": "must be a whole number",
    "workload.global_batch=500": "for example 384 or 512",
    "workload.model.heads=33": "does not divide hidden 4096",
    "workload.model.kv_heads=5": "does not divide heads 32",
    "workload.model.layers=99999999999": "workload.model.layers",
    "workload.model=gpt-2": "workload.model: there is no model 'gpt-2'; did you mean gpt2",
    "workload.model=[1]": "workload.model: a list must be a name or a mapping",
    "workload.model={python: 'a b'}": "package.module:function",
    "workload.model={huggingface: '../x'}": "LlamaForCausalLM",
    "workload.model={huggingface: X, confg: 1}": "did you mean 'config'?",
    "system.network.inter_node=400": "has no unit",
    "system.network.inter_node=400 GHz": "is not a unit of bandwidth",
    "system.network.inter_node=-4 Gb/s": "must be finite and positive",
    "system.network.inter_node=nan Gb/s": "is not a bandwidth",
    "system.network.inter_node=0": "must be finite and positive",
    "system.network.internode=4 Gb/s": "did you mean 'inter_node'?",
    "system.accelerator.set.matrix.cores=.nan": "finite",
    "training.recompute={every: 0}": "at least 1",
    "training.compile=maybe": "training.compile: 'maybe' must be true or false, or captured",
    "training.recompute=some": "allowed: none, selective, selective_op, full",
    "training.techniques=[3]": "training.techniques.0",
    "workload.model.heads.x=3": "workload.model.heads is 32, which has no keys",
    "training.precision=": "is empty",
    "training": "must be written like training.precision=bf16",
    "training..x=1": "must be written like",
    "training=3": "training: 3 must be a mapping",
    "sistem.devices=3": "did you mean 'system'?",
}


@pytest.mark.parametrize("change", BAD)
def test_bad_value_is_one_sentence(change: str) -> None:
    with pytest.raises(InputError) as error:
        RunSpec.from_text(EXAMPLE, "run.yaml", [change])
    assert BAD[change] in str(error.value)
    assert not isinstance(error.value, NotModelledError)
    assert str(error.value).startswith(("run.yaml: ", "--set "))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


NOT_MODELLED = {
    "training.optimizer=rmsprop": "adamw, adam, sgd, lion, lamb, adafactor, muon",
    "training.techniques=[lora]": "[]",
    "training.techniques=[{lora: {rank: 8}}]": "[]",
    "workload.task=sft": "pretrain",
    "system.anchor=measured.json": "leaving it out",
}


@pytest.mark.parametrize("change", NOT_MODELLED)
def test_what_is_not_modelled_says_what_is(change: str) -> None:
    with pytest.raises(NotModelledError, match="is not modelled yet; modelled today: ") as error:
        RunSpec.from_text(EXAMPLE, "run.yaml", [change])
    assert str(error.value).endswith(f"modelled today: {NOT_MODELLED[change]}")
    assert error.value.key == change.split("=")[0] or change.startswith("workload.model=")


def test_every_row_of_the_table_of_what_is_modelled_is_a_field() -> None:
    def field(schema: dict[str, Any], path: list[str]) -> dict[str, Any]:
        for name in path:
            for part in [schema, *schema.get("anyOf", []), *schema.get("oneOf", [])]:
                resolved = definitions[part["$ref"].split("/")[-1]] if "$ref" in part else part
                if name in resolved.get("properties", {}):
                    schema = resolved["properties"][name]
                    break
            else:
                raise AssertionError(path)
        return schema

    root = RunSpec.model_json_schema()
    definitions = root["$defs"]
    for path in MODELLED:
        assert "description" in field(root, path.split("."))


@pytest.mark.parametrize("text", ["a: 1", "[1]", "3", "workload: {}", "workload: 3\nsystem: 4", "{}"])
def test_shapeless_file_is_one_sentence(text: str) -> None:
    with pytest.raises(InputError, match=re.escape("run.yaml: ")):
        RunSpec.from_text(text, "run.yaml")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b"", "is empty"),
        (b"{", "is not valid JSON"),
        (b'{"workload": 1, "workload": 2}', "is there twice"),
        (b"[" * 100_000, "is nested too deeply"),
        (b"\xff", "UTF-8"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b'{"workload": {"model": "\\ud800"}}', "(?i)unicode"),
        (b"null", "must be a mapping"),
        (b'{"workload": {"seq_len": NaN}}', "run 1: "),
    ],
)
def test_bad_json_is_one_sentence(line: bytes, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        RunSpec.from_json(line, "run 1")


_SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.sampled_from(["gpt2", "400 Gb/s"])
)
_VALUES = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


def _paths(data: dict[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for key, value in data.items():
        found.append((*prefix, key))
        if isinstance(value, dict):
            found += _paths(value, (*prefix, key))
    return found


@given(path=st.sampled_from(_paths(RunSpec.from_text(EXAMPLE).echo())), value=_VALUES)
def test_any_value_anywhere_is_echoed_or_one_sentence(path: tuple[str, ...], value: Any) -> None:
    data = RunSpec.from_text(EXAMPLE).echo()
    section = data
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = value
    with suppress(InputError):
        spec = RunSpec.from_mapping(data)
        assert RunSpec.from_mapping(json.loads(json.dumps(spec.echo(), allow_nan=False))) == spec


@given(st.text(max_size=60))
def test_any_text_is_a_run_or_one_sentence(text: str) -> None:
    with pytest.raises(InputError):
        RunSpec.from_text(text)
    with pytest.raises(InputError):
        RunSpec.from_text(EXAMPLE, "run.yaml", [text])
