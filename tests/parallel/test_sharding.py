"""What one rank of a divided step computes, holds and sends, against closed forms and against the whole step."""

import functools
from collections import Counter
from typing import Any

import numpy as np
import pytest

from cosim.graph import Category, OpGraph, Phase
from cosim.parallel.communication import Communication, communications
from cosim.parallel.groups import groups
from cosim.parallel.layout import Sharding
from cosim.parallel.sharding import replicated, shard
from cosim.techniques.fusion import fuse
from cosim.techniques.recompute import recompute
from cosim.trace import TraceOptions, trace
from cosim.trace.vocabulary import kind_flops
from hwmodels.units import InputError
from workloads.model import from_dimensions

BATCH, SEQUENCE, HIDDEN, LAYERS, VOCAB, FP32 = 2, 64, 96, 3, 512, 4
ROWS = BATCH * SEQUENCE * HIDDEN * FP32
_SMALL = {"layers": LAYERS, "hidden": HIDDEN, "vocab": VOCAB}
_EXPERTS = {"num_experts": 8, "experts_per_token": 2, "moe_ffn": 64, "ffn": 224, "dense_layers": 1}
MODELS: dict[str, dict[str, Any]] = {
    "gpt": {"family": "gpt", **_SMALL, "heads": 4, "max_positions": 1024},
    "llama": {"family": "llama", **_SMALL, "heads": 8, "head_dim": 16, "kv_heads": 4, "ffn": 224},
    "normed heads": {"family": "llama", **_SMALL, "heads": 8, "head_dim": 16, "kv_heads": 4, "ffn": 224,
                     "qk_norm": True},
    "bert": {"family": "bert", **_SMALL, "heads": 4, "max_positions": 1024},
    "t5": {"family": "t5", **_SMALL, "heads": 4, "head_dim": 32, "ffn": 224},
    "moe": {"family": "moe", **_SMALL, **_EXPERTS, "heads": 8, "kv_heads": 4, "shared_experts": 1},
    "moe with capacity": {"family": "moe", **_SMALL, **_EXPERTS, "heads": 8, "kv_heads": 4, "capacity_factor": 1.5},
    "moe with biases": {"family": "moe", **_SMALL, **_EXPERTS, "heads": 8, "kv_heads": 4, "biases": True},
    "latent attention": {"family": "moe", **_SMALL, **_EXPERTS, "heads": 4,
                         "mla": "q_lora=48;kv_lora=40;qk_nope=16;qk_rope=8;v=20"},
}  # fmt: skip
DENSE = ["gpt", "llama", "normed heads", "bert", "t5"]
SPARSE = [name for name in MODELS if name.startswith("moe")]
TENSOR = [Sharding(tensor=2), Sharding(tensor=4, sequence=True), Sharding(tensor=2, sequence=True, keeps_gathered=True)]
CONTEXT = [Sharding(context=4, context_by=by) for by in ("ring", "all_gather", "all_to_all")]
EXPERT = [
    Sharding(expert=4),
    Sharding(tensor=2, sequence=True, expert=4, expert_tensor=2),
    Sharding(tensor=2, sequence=True, context=2, expert=8, imbalance=1.5),
    Sharding(tensor=2, expert=4),
    Sharding(tensor=2, expert=2, expert_tensor=2),
    Sharding(tensor=2, expert_tensor=2),
]
CASES = [(name, how) for name in MODELS for how in TENSOR]
CASES += [(name, how) for name in MODELS if name != "t5" for how in CONTEXT]
_ON_EXPERTS = [(name, how) for name in SPARSE for how in EXPERT]
CASES += _ON_EXPERTS


@functools.cache
def whole(name: str, **options: Any) -> OpGraph:
    return trace(from_dimensions(MODELS[name]), TraceOptions(batch=BATCH, sequence=SEQUENCE, **options))


def sent(graph: OpGraph, group: str, phase: Phase | None = None) -> list[Communication]:
    found = [each for each in communications(graph) if each.group == group]
    return [each for each in found if phase is None or graph.op_phase[each.op] == phase]


def counted(found: list[Communication]) -> Counter[tuple[str, int]]:
    return Counter((each.kind, each.bytes) for each in found)


def all_messages(graph: OpGraph) -> Counter[tuple[Any, ...]]:
    return Counter((each.kind, each.group, each.bytes, int(graph.op_phase[each.op])) for each in communications(graph))


def products(graph: OpGraph) -> dict[int, float]:
    """FLOP of every op of forward, recomputation and backward that has any."""
    of_kind = [kind_flops(graph, kind) for kind in graph.kinds]
    in_step = graph.op_phase != Phase.OPTIMIZER
    return {op: of_kind[graph.op_kind[op]] for op in np.flatnonzero(in_step).tolist() if of_kind[graph.op_kind[op]]}


# conservation


@pytest.mark.parametrize(("name", "how"), CASES)
def test_every_tensor_is_in_memory_whenever_it_is_read_or_written(name: str, how: Sharding) -> None:
    graph = shard(whole(name), how)
    alloc, free = graph.storage_alloc, graph.storage_free
    assert (graph.storage_bytes >= 0).all()
    assert (alloc <= free)[free >= 0].all()
    assert ((alloc < 0) | (free >= 0)).all()
    for rows in (graph.op_inputs, graph.op_outputs):
        ops = np.repeat(np.arange(len(graph)), np.diff(rows.indptr))
        storages = graph.tensor_storage[rows.indices]
        kept = (alloc[storages] < 0) & (free[storages] < 0)  # there before the step, and nobody frees it
        assert ((alloc[storages] <= ops) & (ops <= free[storages]) | kept).all()


@pytest.mark.parametrize(("name", "how"), CASES)
def test_an_ops_operands_are_shaped_as_its_kind_says(name: str, how: Sharding) -> None:
    graph = shard(whole(name), how)
    for op, kind in enumerate(graph.kinds[number] for number in graph.op_kind.tolist()):
        rows = ((graph.op_inputs, kind.inputs), (graph.op_outputs, kind.outputs))
        for tensors, specs in ((csr.row(op), specs) for csr, specs in rows):
            assert graph.spec_bytes[graph.tensor_spec[tensors]].tolist() == graph.spec_bytes[list(specs)].tolist()


@pytest.mark.parametrize("how", TENSOR)
@pytest.mark.parametrize("name", MODELS)
def test_ranks_products_add_up_to_the_whole_steps_and_replicated_ones(name: str, how: Sharding) -> None:
    """Routers, low-rank projections and BERT's transform before its head are on every rank; with sequence parallelism
    each has its tokens. Experts that are not divided work on the tokens of their rank.
    """
    rank = shard(whole(name), how)
    before, after = products(whole(name)), products(rank)
    pairs = zip(before.values(), after.items(), strict=True)
    replicated_ops = {op: flops for one, (op, flops) in pairs if one == flops}
    extra = (how.tensor - 1) * sum(replicated_ops.values())
    assert how.tensor * sum(after.values()) == pytest.approx(sum(before.values()) + extra, rel=1e-12)
    names = {rank.modules[rank.op_module[op]].rsplit(".")[-1] for op in replicated_ops}
    assert names <= (set() if how.sequence else {"router", "query_down", "kv_down", "experts", "transform"})


@pytest.mark.parametrize("how", CONTEXT)
@pytest.mark.parametrize("name", [name for name in MODELS if name != "t5"])
def test_context_parallelism_divides_every_product(name: str, how: Sharding) -> None:
    """Causal attention too: each rank has an early and a late part of the sequence."""
    step, rank = products(whole(name)), products(shard(whole(name), how))
    assert how.context * sum(rank.values()) == pytest.approx(sum(step.values()), rel=1e-12)


@pytest.mark.parametrize(("name", "how"), [*((name, how) for name in DENSE for how in TENSOR), *_ON_EXPERTS])
def test_parameters_are_divided_as_their_layers_say(name: str, how: Sharding) -> None:
    """By the table of workloads.layers: columns, rows and vocabulary over tensor parallelism, experts over theirs."""
    parts: dict[str, int] = {}
    split = ("qkv", "query", "key", "value", "key_value", "up", "gate")
    for p in whole(name).parameters:
        module, kind = p.name.rsplit(".", 2)[-2:] if "experts" not in p.name else ("experts", p.name.rsplit(".")[-1])
        bias = kind == "bias"
        if module == "experts":
            parts[p.name] = how.expert * (1 if kind == "down_bias" else how.expert_tensor)
        elif module in split or module in ("head", "embedding", "output", "down") and not bias:
            parts[p.name] = how.tensor
        elif module == "bias" or (module == "encoder_positions" or module == "decoder_positions"):
            parts[p.name] = how.tensor  # a number per head
        else:
            parts[p.name] = how.tensor if p.name.endswith(("head.bias", "prediction_bias")) else 1
    step, rank = whole(name), shard(whole(name), how)
    for before, after in zip(step.parameters, rank.parameters, strict=True):
        size, local = (int(np.prod(g.shapes[p.spec])) for g, p in ((step, before), (rank, after)))
        assert size == local * parts[before.name], before.name


@pytest.mark.parametrize("name", MODELS)
def test_only_routers_and_low_rank_projections_are_on_every_tensor_parallel_rank(name: str) -> None:
    found = {matrix.rsplit(".", 2)[-2] for matrix in replicated(whole(name), Sharding(tensor=2))}
    assert found <= {"router", "query_down", "kv_down"}


# memory


@pytest.mark.parametrize("attention", ["unfused", "flash"])
@pytest.mark.parametrize(("tensor", "sequence"), [(1, False), (2, True), (4, True), (4, False)])
def test_a_layers_activations_are_korthikantis(tensor: int, sequence: bool, attention: str) -> None:
    """sbh (34/t + 5as/(ht)) with sequence parallelism, sbh (10 + 24/t + 5as/(ht)) without: arXiv 2205.05198, table 2.

    The formula leaves out rows' statistics of norms and of FlashAttention, which are the rest.
    """
    batch, seq, hidden, heads = 2, 512, 256, 16
    dimensions = {"family": "gpt", "layers": 3, "hidden": hidden, "heads": heads, "vocab": 512, "max_positions": 1024}
    recipe = {"attention": attention, "dropout": 0.1, "parameter_format": "bf16", "master_format": "fp32"}
    step = trace(from_dimensions(dimensions), TraceOptions(batch=batch, sequence=seq, **recipe))  # type: ignore[arg-type]
    graph = shard(step, Sharding(tensor=tensor, sequence=sequence))
    saved = (graph.storage_category == Category.ACTIVATIONS) & (graph.storage_alloc >= 0)
    layer = graph.op_layer[np.maximum(graph.storage_alloc, 0)]
    held = int(graph.storage_bytes[saved & (layer == graph.blocks[0].layers[1])].sum())
    scores = 5 * heads * seq / (hidden * tensor) if attention == "unfused" else 0
    rest = 34 / tensor if sequence or tensor == 1 else 10 + 24 / tensor
    assert held == pytest.approx(seq * batch * hidden * (rest + scores), rel=0.01)


def test_keeping_what_was_gathered_costs_its_memory_and_saves_its_messages() -> None:
    """Two inputs of b*s*h per layer and the head's, whole instead of slices; half of backward's all-gathers."""
    again, kept = (
        shard(whole("llama"), Sharding(tensor=4, sequence=True, keeps_gathered=keeps)) for keeps in (False, True)
    )
    difference = [
        int(g.storage_bytes[(g.storage_category == Category.ACTIVATIONS) & (g.storage_alloc >= 0)].sum())
        for g in (again, kept)
    ]
    assert difference[1] - difference[0] == (2 * LAYERS + 1) * ROWS * 3 // 4
    gathers = [counted(sent(g, "tensor", Phase.BACKWARD))["all_gather", ROWS] for g in (again, kept)]
    assert gathers == [2 * (2 * LAYERS + 1), 2 * LAYERS + 1]


# tensor parallelism


@pytest.mark.parametrize("name", ["gpt", "llama", "bert"])
def test_each_block_reduces_twice_each_way(name: str) -> None:
    """Blocks that norm after the residual sum too: gradients of q, k and v are added before they are reduced."""
    graph = shard(whole(name), Sharding(tensor=2))
    assert counted(sent(graph, "tensor", Phase.BACKWARD)) == {("all_reduce", ROWS): 2 * LAYERS + 1}


def test_attention_over_an_encoders_output_reduces_its_gradient_in_each_layer() -> None:
    """T5: two per encoder layer, four per decoder layer (queries and memory apart), the head's."""
    graph = shard(whole("t5"), Sharding(tensor=2))
    assert counted(sent(graph, "tensor", Phase.BACKWARD)) == {("all_reduce", ROWS): 2 * LAYERS + 4 * LAYERS + 1}


@pytest.mark.parametrize("name", ["gpt", "llama", "bert"])
def test_messages_have_the_format_of_the_products_under_autocast(name: str) -> None:
    """Residuals are fp32, products bf16: only the embedding, whose table is fp32, is looked up and reduced in fp32."""
    found = counted(sent(shard(whole(name, autocast_format="bf16"), Sharding(tensor=2)), "tensor"))
    statistics = found.pop(("all_reduce", BATCH * SEQUENCE * FP32))
    assert statistics == 3
    assert found == {("all_reduce", ROWS // 2): 4 * LAYERS + 1, ("all_reduce", ROWS): 1}


@pytest.mark.parametrize("name", ["gpt", "llama", "moe"])
@pytest.mark.parametrize("scope", ["block", "model"])
def test_fused_kernels_send_what_their_members_send(name: str, scope: str) -> None:
    how = Sharding(tensor=2, sequence=True)
    fused = shard(fuse(whole(name), scope, scope == "model"), how)
    assert all_messages(fused) == all_messages(shard(whole(name), how))


def test_recomputed_blocks_send_forwards_messages_again() -> None:
    """All but the last one's, after the product whose result backward does not need."""
    how = Sharding(tensor=2, sequence=True)
    plain, again = shard(whole("llama"), how), shard(recompute(whole("llama"), "full"), how)
    expected = {("all_gather", ROWS): 2 * LAYERS, ("reduce_scatter", ROWS): LAYERS}
    assert counted(sent(again, "tensor", Phase.RECOMPUTE)) == expected
    assert counted(sent(again, "tensor", Phase.BACKWARD)) == counted(sent(plain, "tensor", Phase.BACKWARD))


def test_with_fewer_heads_of_keys_than_ranks_several_hold_the_same_and_sum_its_gradient() -> None:
    step = whole("llama")
    graph = shard(step, Sharding(tensor=8))
    local = {p.name.split(".")[-2]: np.prod(graph.shapes[p.spec]) for p in graph.parameters if p.layer == 0}
    assert (local["query"], local["key"], local["value"]) == (16 * HIDDEN, 16 * HIDDEN, 16 * HIDDEN)
    assert [each.bytes for each in sent(graph, "tensor", Phase.OPTIMIZER)] == [LAYERS * 2 * 16 * HIDDEN * FP32]


# context parallelism: b*(s/c) rows of 16-wide heads leave and arrive


def _keys(kv_heads: int) -> int:
    return BATCH * SEQUENCE * kv_heads * 16 * FP32


@pytest.mark.parametrize("by", ["ring", "all_gather"])
def test_keys_and_values_go_to_all_ranks_and_their_gradients_back(by: str) -> None:
    """Each way of forward 2(c-1) slices arrive, as all-gathers of keys and of values (arXiv 2310.01889, 2407.21783)."""
    found = sent(shard(whole("llama"), Sharding(context=4, context_by=by)), "context")
    assert counted(found) == {("all_gather", _keys(4)): 4 * LAYERS, ("reduce_scatter", _keys(4)): 2 * LAYERS}
    assert {each.streamed for each in found} == {by == "ring"}


def test_a_ring_holds_two_parts_of_keys_and_values() -> None:
    ring, at_once = (shard(whole("llama"), Sharding(context=4, context_by=by)) for by in ("ring", "all_gather"))
    for graph, share in ((ring, 0.5), (at_once, 1.0)):
        made = [graph.op_outputs.row(each.op)[0] for each in sent(graph, "context", Phase.FORWARD)]
        assert {int(graph.storage_bytes[graph.tensor_storage[t]]) for t in made} == {int(share * _keys(4))}


def test_the_all_to_alls_of_ulysses_carry_queries_keys_values_and_results_once_each_way() -> None:
    """4 all-to-alls of a rank's tokens each way, 4Nh/P per link where heads are equal (arXiv 2309.14509, 3.2)."""
    found = sent(shard(whole("llama"), Sharding(context=4, context_by="all_to_all")), "context")
    queries, keys = _keys(8) // 4, _keys(4) // 4
    assert counted(found) == {("all_to_all", queries): 4 * LAYERS, ("all_to_all", keys): 4 * LAYERS}


# experts


@pytest.mark.parametrize("name", SPARSE)
def test_a_sparse_layer_dispatches_and_combines_its_rows_twice_each_way(name: str) -> None:
    """Two all-to-alls of k (with a capacity factor: k * factor) rows per token in forward, two in backward."""
    rows = {"moe with capacity": 3}.get(name, 2)
    found = sent(shard(whole(name), Sharding(expert=4)), "expert")
    assert counted(found) == {("all_to_all", rows * ROWS): 4 * (LAYERS - 1)}


def test_the_busiest_ranks_experts_have_their_share_of_rows_more() -> None:
    even, busy = (products(shard(whole("moe"), Sharding(expert=4, imbalance=imbalance))) for imbalance in (1.0, 1.5))
    grouped = [op for op in even if "grouped" in whole("moe").kinds[0].target or even[op] != busy[op]]
    assert sum(busy[op] for op in grouped) == pytest.approx(1.5 * sum(even[op] for op in grouped))
    assert {each.bytes for each in sent(shard(whole("moe"), Sharding(expert=4, imbalance=1.5)), "expert")} == {3 * ROWS}


@pytest.mark.parametrize("how", EXPERT)
@pytest.mark.parametrize("name", SPARSE)
def test_products_of_experts_are_divided_over_all_ranks_of_experts_and_tokens(name: str, how: Sharding) -> None:
    def of_experts(graph: OpGraph) -> float:
        found = products(graph).items()
        return sum(flops for op, flops in found if "grouped_mm" in graph.kinds[graph.op_kind[op]].target)

    parts = how.tensor * how.context / how.imbalance
    assert parts * of_experts(shard(whole(name), how)) == pytest.approx(of_experts(whole(name)), rel=0.02)


def test_ranks_that_share_experts_matrices_gather_and_scatter_their_rows() -> None:
    graph = shard(whole("moe"), Sharding(tensor=2, sequence=True, expert=4, expert_tensor=2))
    assert counted(sent(graph, "expert")) == {("all_to_all", ROWS): 4 * (LAYERS - 1)}
    assert counted(sent(graph, "expert_tensor")) == {
        ("all_gather", 2 * ROWS): 2 * (LAYERS - 1),
        ("reduce_scatter", 2 * ROWS): 2 * (LAYERS - 1),
    }


# what cannot be


@pytest.mark.parametrize(
    ("name", "how", "says"),
    [
        ("llama", Sharding(tensor=3), "parallel.tensor: 3 does not divide the 8 of the model's axis heads"),
        ("moe", Sharding(expert=3), "parallel.expert: 3 does not divide the 8 of the model's axis experts"),
        ("moe", Sharding(tensor=2, expert_tensor=3), "parallel.expert_tensor: 3 does not divide"),
        ("llama", Sharding(context=3), "parallel.context: 3 does not divide the 64 of the model's axis sequence"),
        ("t5", Sharding(context=2), "parallel.context: this model's attention is not one operator"),
        ("llama", Sharding(context=8, context_by="all_to_all"), "parallel.context: 8 does not divide the 4"),
    ],
)
def test_what_cannot_be_divided_is_one_sentence_that_names_the_key(name: str, how: Sharding, says: str) -> None:
    with pytest.raises(InputError, match=says):
        shard(whole(name), how)


def test_packed_projections_cannot_share_heads_of_keys() -> None:
    packed = from_dimensions({**MODELS["gpt"], "heads": 8, "kv_heads": 2})
    with pytest.raises(InputError, match=r"parallel\.tensor: 4 is more than the 2 heads of keys and values"):
        shard(trace(packed, TraceOptions(batch=1, sequence=SEQUENCE)), Sharding(tensor=4))


def test_experts_fit_the_ranks_of_a_stage() -> None:
    with pytest.raises(InputError, match=r"parallel\.expert: 8 x expert_tensor 1 must divide the 4 devices"):
        groups(Sharding(tensor=2, expert=8), data=2, pipeline=2, domain=8)
