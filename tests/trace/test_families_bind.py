"""The graphs of every family bind to any batch and sequence length, so that one trace of them is enough."""

from collections.abc import Callable

import pytest

from cosim.graph import OpGraph
from cosim.trace import TraceOptions, trace
from workloads.model import ModelConfig, from_dimensions

WIDTHS = {"layers": 3, "hidden": 96, "heads": 4, "vocab": 500}
EXPERTS = {"family": "moe", "num_experts": 8, "experts_per_token": 2, "moe_ffn": 40, "dense_layers": 1}
MODELS = {
    "bert": {"family": "bert", "max_positions": 1024},
    "t5": {"family": "t5"},
    "t5, learned": {"family": "t5", "pos_emb": "learned"},
    "vit": {"family": "vit", "image_size": 32, "patch_size": 8},
    "moe": EXPERTS | {"kv_heads": 2, "shared_experts": 1, "biases": True},
    "moe, buffers": EXPERTS | {"capacity_factor": 1.5, "biases": True},
    "moe, latent": EXPERTS | {"mla": "q_lora=24;kv_lora=16;qk_nope=8;qk_rope=4;v=6"},
    "llama, qk norm": {"family": "llama", "qk_norm": True, "kv_heads": 2},
}


def model_of(name: str, sequence: int) -> ModelConfig:
    given = {key: value for key, value in (WIDTHS | MODELS[name]).items() if (key, name) != ("vocab", "vit")}
    return from_dimensions(given).for_workload(sequence, None, 48)


@pytest.mark.parametrize("attention", ["flash", "unfused"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sizes", [(1, 64), (7, 1024)])
def test_binding_equals_tracing_again(
    name: str, attention: str, sizes: tuple[int, int], bound_as_traced: Callable[..., OpGraph]
) -> None:
    graph = bound_as_traced(
        model_of(name, sizes[1]), TraceOptions(attention=attention, dropout=0.1, batch=sizes[0], sequence=sizes[1])
    )
    assert set(graph.provenance["fixed"]) <= {"batch"}


def test_the_axes_of_experts_are_named() -> None:
    graph = trace(model_of("moe", 64), TraceOptions(batch=2, sequence=64))
    assert graph.axes["experts"] == 8
    up = next(p for p in graph.parameters if p.name.endswith("experts.up"))
    assert graph.specs[up.spec].dims[0] == ("experts",)
