"""Which tensor-parallel collectives run beside which products of backward, as Megatron issues them."""

from collections import Counter

import pytest

from cosim.graph import OpGraph, Phase
from cosim.mapping.collectives import with_collectives
from cosim.mapping.pricing import Kernels, Prices, price
from cosim.parallel.communication import communications
from cosim.parallel.groups import groups
from cosim.parallel.layout import Sharding
from cosim.parallel.sharding import shard
from cosim.stacks.stack import Stack
from cosim.trace import TraceOptions, trace
from hwmodels.accelerator import load
from hwmodels.cluster import Cluster
from workloads.model import from_dimensions

DIMENSIONS = {"layers": 2, "hidden": 1024, "heads": 16, "vocab": 4096}


def priced(family: str, sequence: bool, beside: bool) -> tuple[OpGraph, Prices, Prices]:
    """One of four ranks, its prices without collectives, and with them."""
    options = TraceOptions(
        parameter_format="bf16", master_format="fp32", gradient_format="fp32", batch=1, sequence=2048
    )
    whole = trace(from_dimensions({"family": family, **DIMENSIONS}), options)
    sharding = Sharding(tensor=4, sequence=sequence)
    graph = shard(whole, sharding)
    chip = load("a100-sxm-80gb")
    stack = Stack(name="", title="", sources={}, assumed=())
    plain = price(graph, chip, Kernels("fp32", "flash-2", stack), 1)
    cluster = Cluster.build(chip, 4, 4, 4, {})
    sent = with_collectives(graph, plain, groups(sharding, 1, 1, cluster.domain), cluster, False, beside)
    return graph, plain, sent


@pytest.mark.parametrize("family", ["gpt", "llama"])
@pytest.mark.parametrize(
    ("sequence", "expected"),
    [
        (False, {"all_reduce": 2}),  # of the inputs' gradients of qkv and the first layer of the MLP
        (
            True,
            {"reduce_scatter": 2, "all_gather": 2},
        ),  # the same, and their inputs gathered again; not what comes back
    ],
)
def test_two_layers_of_each_block_send_beside_their_other_product(
    family: str, sequence: bool, expected: dict[str, int]
) -> None:
    graph, _, alone = priced(family, sequence, beside=False)
    _, plain, beside = priced(family, sequence, beside=True)
    changed: Counter[str] = Counter()
    for sent in communications(graph):
        if beside.time_s[sent.op] < alone.time_s[sent.op]:
            assert graph.op_phase[sent.op] == Phase.BACKWARD
            assert graph.op_layer[sent.op] >= 0
            changed[sent.kind] += 1
    assert changed == {kind: 2 * count for kind, count in expected.items()}
    hidden = (alone.time_s - beside.time_s).sum()
    products = plain.time_s[[graph.kinds[kind].op_class == "matmul" for kind in graph.op_kind.tolist()]].sum()
    assert 0 < hidden < products


def test_nothing_hides_longer_than_the_product_beside_it() -> None:
    """Where a layer's all-reduce outlasts the product of its weights' gradient: the difference is left, or more."""
    graph, plain, beside = priced("gpt", sequence=False, beside=True)
    _, _, alone = priced("gpt", sequence=False, beside=False)
    found = [sent.op for sent in communications(graph) if beside.time_s[sent.op] < alone.time_s[sent.op]]
    for op in found:
        weights = max(
            before
            for before in range(op)
            if graph.kinds[graph.op_kind[before]].attribute("layout") == "NT"
            and graph.op_phase[before] == Phase.BACKWARD
        )
        assert beside.time_s[op] >= alone.time_s[op] - plain.time_s[weights]
