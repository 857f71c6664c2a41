"""The JSON Schema accepts what RunSpec accepts and refuses what it refuses, judged by a validator of its own."""

import re
from typing import Any

import pytest
import yaml

from cosim.spec import RunSpec

SCHEMA = RunSpec.model_json_schema()
DESIGN_EXAMPLE = """
workload: {model: llama3-8b, seq_len: 8192, global_batch: 512, micro_batch: 1, task: pretrain, tokens: 1.0e+12}
system:
  {accelerator: h100-sxm-80gb, devices: 64, devices_per_node: 8, nvlink_domain: 8, network: {inter_node: 400 Gb/s},
   anchor: measurement.json}
parallel: {tensor: 2, pipeline: 4, context: 1, expert: 1, expert_tensor: 1, zero: 1, hybrid_shard: false,
           sequence: true, schedule: interleaved-1f1b, virtual_stages: 2, stage_layers: [8, 8, 8, 8],
           overlap: {gradients: true, parameters: true, tensor: false}}
training: {framework: pytorch, precision: bf16, optimizer: adamw, gradient_format: fp32, recompute: none,
           compile: false, attention: flash, dropout: 0.0, techniques: [{lora: {rank: 8}}]}
"""
_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Whether `value` satisfies the part of JSON Schema that pydantic writes."""
    if "$ref" in schema:
        return fits(value, SCHEMA["$defs"][schema["$ref"].split("/")[-1]])
    if "anyOf" in schema or "oneOf" in schema:
        return any(fits(value, option) for option in schema.get("anyOf", schema.get("oneOf")))
    kind = schema.get("type")
    if kind and (not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind in ("integer", "number"))):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if isinstance(value, dict):
        known = schema.get("properties", {})
        others = schema.get("additionalProperties", True)
        return all(key in value for key in schema.get("required", [])) and all(
            fits(item, known[key]) if key in known else others is True or (bool(others) and fits(item, others))
            for key, item in value.items()
        )
    if isinstance(value, list):
        return all(fits(item, schema.get("items", {})) for item in value)
    if isinstance(value, str):
        return re.search(schema.get("pattern", ""), value) is not None
    if isinstance(value, int | float):
        low, high = schema.get("minimum", value), schema.get("maximum", value)
        return low <= value <= high and value < schema.get("exclusiveMaximum", value + 1)
    return True


def test_schema_accepts_the_whole_run_file_also_where_it_is_not_modelled_yet() -> None:
    assert fits(yaml.safe_load(DESIGN_EXAMPLE), SCHEMA)


@pytest.mark.parametrize(
    "model",
    [
        {"family": "gpt", "layers": 2, "hidden": 64, "heads": 2, "vocab": 100},
        {"huggingface": "LlamaForCausalLM", "config": {"hidden_size": 64}},
        {"python": "package.module:build", "arguments": {"depth": 2}},
    ],
)
def test_schema_accepts_each_way_to_name_a_model(model: dict[str, Any]) -> None:
    data = yaml.safe_load(DESIGN_EXAMPLE)
    data["workload"]["model"] = model
    assert fits(data, SCHEMA)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("training", "precison", "bf16"),
        ("training", "precision", "bf61"),
        ("training", "dropout", 1.0),
        ("system", "devices", 0),
        ("system", "devices", "8"),
        ("parallel", "zero", 4),
        ("workload", "model", {"family": "gpt"}),
    ],
)
def test_schema_refuses_what_is_wrong(section: str, key: str, value: Any) -> None:
    data = yaml.safe_load(DESIGN_EXAMPLE)
    data[section][key] = value
    assert not fits(data, SCHEMA)


def test_every_field_has_a_description() -> None:
    for name, definition in {**SCHEMA["$defs"], "RunSpec": SCHEMA}.items():
        for key, field in definition["properties"].items():
            assert field.get("description"), f"{name}.{key}"
