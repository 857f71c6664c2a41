"""A graph bound to other sizes is the graph that a trace at those sizes would have given."""

from collections.abc import Callable

import pytest
from torch import Tensor, nn

from cosim.graph import OpGraph
from cosim.trace import TraceOptions, bind, trace
from cosim.trace.sizes import SizeDecoder, probe_batches, probe_sequences
from hwmodels.units import InputError
from workloads.model import ModelConfig

Trace = Callable[[ModelConfig, TraceOptions], OpGraph]


@pytest.mark.parametrize("attention", ["flash", "unfused"])
@pytest.mark.parametrize("family", ["gpt", "llama"])
@pytest.mark.parametrize("sizes", [(1, 64), (2, 96), (7, 1024)])
def test_binding_equals_tracing_again(
    family: str,
    attention: str,
    sizes: tuple[int, int],
    request: pytest.FixtureRequest,
    bound_as_traced: Callable[..., OpGraph],
) -> None:
    model = request.getfixturevalue(family)
    bound_as_traced(model, TraceOptions(attention=attention, dropout=0.1, batch=sizes[0], sequence=sizes[1]))


def test_every_size_of_a_gpt_binds(gpt: ModelConfig) -> None:
    graph = trace(gpt, TraceOptions())
    assert graph.provenance["fixed"] == {}
    assert {"batch", "sequence"} <= set(graph.axes)
    doubled = graph.bind(batch=2 * graph.axes["batch"])
    activations = [int(g.storage_bytes[g.storage_category == 3].sum()) for g in (graph, doubled)]
    # only the embedded positions (sequence, hidden) do not grow with the batch; they are not saved
    assert activations[1] == pytest.approx(2 * activations[0], rel=1e-3)


def test_a_learned_position_table_grows_with_the_sequence(gpt: ModelConfig) -> None:
    short, long = (trace(gpt, TraceOptions(sequence=s)) for s in (512, 4096))
    assert long.parameter_count() - short.parameter_count() == (4096 - 1024) * gpt.hidden


def test_one_sequence_without_fused_attention_is_a_graph_of_its_own(gpt: ModelConfig) -> None:
    """Eager PyTorch copies K and V before the batched product, unless the batch is 1."""
    one, two = (trace(gpt, TraceOptions(attention="unfused", batch=batch)) for batch in (1, 2))
    assert len(one) < len(two)
    assert one.provenance["fixed"] == {"batch": 1}
    assert {"sequence"} == {"batch", "sequence"} & set(one.axes)


def test_a_module_whose_operators_change_with_the_sequence_is_traced_at_its_own() -> None:
    class Pooled(nn.Module):
        """Looks at blocks of 64 positions: a number of them that is no multiple of the sequence length."""

        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(50, 16)
            self.head = nn.Linear(16, 50)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens)
            blocks = x[:, : x.shape[1] // 64 * 64].unflatten(1, (-1, 64)).mean(2)
            return self.head(x + blocks.mean(1, keepdim=True))

    graph = trace(Pooled, TraceOptions(batch=2, sequence=256))
    assert graph.provenance["fixed"] == {"sequence": 256}
    assert graph.axes["batch"] == 2
    assert any(4 in shape for shape in graph.shapes)


def test_a_fixed_axis_says_so_when_another_size_is_asked_for(gpt: ModelConfig, traced_at: Trace) -> None:
    fixed = traced_at(gpt, TraceOptions(batch=2, sequence=64))
    assert "batch" not in fixed.axes
    assert "sequence" not in fixed.axes
    with pytest.raises(InputError, match="fixes its batch size to 2; 4 is not possible"):
        bind(fixed, TraceOptions(batch=4, sequence=64))


def test_sizes_decode_into_powers_of_batch_and_sequence() -> None:
    decoder = SizeDecoder(263, 1019)
    assert decoder.dim(263 * 1019) == ("batch", "sequence")
    assert decoder.dim(263 * 12 * 1019**2) == ("batch", "sequence", "sequence", "size_12")
    assert decoder.dim(4096) == ("size_4096",)
    assert decoder.dim(1) == ()
    assert not decoder.shifted
    assert decoder.dim(263 * 1018) == ("batch", "sequence")  # labels one position on
    assert decoder.shifted


def test_probing_sizes_divide_no_dimension_and_fit_the_position_table() -> None:
    dimensions = {263 * 4, 1019, 4096, 0}
    assert not {263, 1019} & set(probe_batches(dimensions))
    for longest in (None, 2048, 512, 100):
        for pair in probe_sequences(dimensions, longest):
            assert 1019 not in pair
            assert longest is None or max(pair) <= longest
    assert probe_sequences(dimensions, 8) == []
