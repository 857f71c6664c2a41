"""Traced updates against formulas: bytes per parameter, FLOP of Muon, and PyTorch's own loss scaling."""

import functools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cosim.graph import OpGraph, Phase
from cosim.trace import TraceOptions, trace
from cosim.trace.recorder import Recorder
from cosim.trace.vocabulary import kind_bytes, kind_flops
from workloads.model import ModelConfig, from_dimensions

MODEL = {"family": "llama", "layers": 2, "hidden": 256, "heads": 4, "ffn": 512, "vocab": 1000}
MATRICES = [*[(256, 256)] * 4, *[(256, 512)] * 3] * 2  # r <= c
MIXED = {"parameter_format": "bf16", "master_format": "fp32"}


@functools.cache
def traced(optimizer: str, implementation: str = "fused", **options: Any) -> OpGraph:
    recipe = {"gradient_clipping": False, **options}
    return trace(
        from_dimensions(MODEL), TraceOptions(optimizer=optimizer, optimizer_implementation=implementation, **recipe)
    )


def update(graph: OpGraph) -> list[int]:
    """Kinds of the update's ops, in order."""
    return graph.op_kind[graph.op_phase == Phase.OPTIMIZER].tolist()


def targets(graph: OpGraph) -> Counter[str]:
    return Counter(graph.kinds[kind].target for kind in update(graph))


def bytes_per_parameter(graph: OpGraph) -> float:
    return sum(sum(kind_bytes(graph, graph.kinds[kind])) for kind in update(graph)) / graph.parameter_count()


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ("adamw", 4 * (4 + 3)),  # reads weight, gradient, two moments; writes all but the gradient
        ("adam", 4 * (4 + 3)),
        ("sgd", 4 * (3 + 2)),
        ("lion", 4 * (3 + 2)),
    ],
)
def test_a_fused_update_passes_once_over_memory(optimizer: str, expected: int) -> None:
    assert bytes_per_parameter(traced(optimizer)) == pytest.approx(expected, rel=1e-3)
    assert len([kind for kind in update(traced(optimizer)) if "fused" in traced(optimizer).kinds[kind].target]) == 1


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lion"])
def test_masters_cost_a_cast_of_the_gradient_and_a_copy_of_the_weight_more(optimizer: str) -> None:
    """16-bit gradients are read and written in fp32 (2 + 4); masters are read, 16-bit weights written (4 + 2)."""
    more = bytes_per_parameter(traced(optimizer, **MIXED)) - bytes_per_parameter(traced(optimizer))
    assert more == pytest.approx(2 + 4 + 4 + 2, rel=2e-3)


def test_foreach_and_single_move_the_same_bytes_in_fewer_kernels() -> None:
    for optimizer in ("lion", "lamb"):
        foreach, single = (traced(optimizer, implementation) for implementation in ("foreach", "single"))
        assert bytes_per_parameter(foreach) == pytest.approx(bytes_per_parameter(single), rel=0.12)
        assert len(update(foreach)) < len(update(single)) / 4


def test_lions_passes_one_by_one() -> None:
    """Interpolate (3), sign (2), decay (2), step (3), interpolate (3): 13 fp32 numbers per parameter."""
    assert bytes_per_parameter(traced("lion", "foreach")) == pytest.approx(4 * 13, rel=1e-3)


def test_lamb_has_two_norms_per_tensor() -> None:
    tensors = len({parameter.storage for parameter in traced("lamb").parameters})
    assert targets(traced("lamb", "foreach"))["aten._foreach_norm"] == 2
    assert targets(traced("lamb", "single"))["aten.linalg_vector_norm"] == 2 * tensors


@pytest.mark.parametrize("formats", [{}, {"parameter_format": "bf16", "master_format": "fp32"}, {"loss_scaling": True}])
def test_an_update_that_is_written_down_again_is_the_one_that_would_have_run(
    llama: ModelConfig, formats: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = TraceOptions(optimizer="muon", batch=2, sequence=64, **formats)
    written = trace(llama, options)
    monkeypatch.setattr(Recorder, "alike", lambda self, operands, run: run())
    ran = trace(llama, options)
    assert written.kinds == ran.kinds
    assert written.modules == ran.modules
    for column in ("op_kind", "op_phase", "op_module", "tensor_spec", "tensor_storage"):
        np.testing.assert_array_equal(getattr(written, column), getattr(ran, column))
    for column in ("storage_spec", "storage_category", "storage_alloc", "storage_free"):
        np.testing.assert_array_equal(getattr(written, column), getattr(ran, column))
    for operands in ("op_inputs", "op_outputs"):
        np.testing.assert_array_equal(getattr(written, operands).indices, getattr(ran, operands).indices)


def test_muons_products_are_five_newton_schulz_steps_on_every_hidden_matrix() -> None:
    """Per r x c matrix and step: X X^T (2 c r^2), its square (2 r^3), and their product with X (2 c r^2)."""
    graph = traced("muon")
    found = sum(kind_flops(graph, graph.kinds[kind]) for kind in update(graph))
    assert found == sum(5 * (4 * c * r * r + 2 * r**3) for r, c in MATRICES)
    names = {graph.modules[module] for module in np.unique(graph.op_module[graph.op_phase == Phase.OPTIMIZER])}
    assert names - {""} == {p.name for p in graph.parameters if p.name.startswith("layers.") and "norm" not in p.name}


def test_adafactor_makes_the_host_wait_for_two_norms_per_tensor() -> None:
    """torch.optim.Adafactor reads the norm of each parameter and of each update; step counts are on the host."""
    graph = traced("adafactor")
    assert targets(graph)["aten._local_scalar_dense"] == 2 * len({parameter.storage for parameter in graph.parameters})
    assert targets(traced("adamw", "single"))["aten._local_scalar_dense"] == 0


class Dispatched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators, and reads of numbers that are not step counts."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func).rpartition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


SCALING = ("aten._amp_foreach_non_finite_check_and_unscale_", "aten._amp_update_scale_", "aten._local_scalar_dense")


@pytest.mark.parametrize(("optimizer", "implementation"), [("sgd", "foreach"), ("sgd", "fused")])
def test_loss_scaling_runs_the_operators_of_pytorchs_grad_scaler(optimizer: str, implementation: str) -> None:
    """One pass over all gradients, one update of the scale, and a wait of the host unless the optimizer is fused."""
    model = nn.Linear(4, 4)
    real = torch.optim.SGD(model.parameters(), momentum=0.9, **{implementation: True})  # type: ignore[arg-type]
    scaler = torch.amp.GradScaler("cpu")
    for step in range(2):
        scaler.scale(model(torch.ones(2, 4)).sum()).backward()
        with Dispatched() if step else torch.no_grad() as mode:
            scaler.unscale_(real)
            scaler.step(real)
            scaler.update()
        real.zero_grad()
    expected = [mode.counts[name] for name in SCALING]  # type: ignore[union-attr]
    found = targets(traced(optimizer, implementation, loss_scaling=True, **MIXED))
    assert [found[name] for name in SCALING] == expected


def test_loss_scaling_reads_and_writes_every_gradient_once_more() -> None:
    plain, scaled = (traced("adamw", loss_scaling=scaling, **MIXED) for scaling in (False, True))
    assert bytes_per_parameter(scaled) - bytes_per_parameter(plain) == pytest.approx(8, rel=1e-3)
    assert len(scaled) > len(plain)
    assert not scaled.unknown_ops


@pytest.mark.parametrize("implementation", ["fused", "foreach", "single"])
@pytest.mark.parametrize("optimizer", ["lion", "lamb", "adafactor", "muon"])
def test_no_operator_of_an_update_is_unknown(optimizer: str, implementation: str) -> None:
    graph = traced(optimizer, implementation)
    assert not graph.unknown_ops
