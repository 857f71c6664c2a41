"""Sharded steps against PyTorch's own tensor parallelism: DTensor on the fake process group, whose collectives are
recorded and whose products are counted.

The plans are torchtitan's (torchtitan/models/llama3/infra/parallelize.py). DTensor keeps what it gathered for the
weights' gradients; Megatron-LM keeps the slice and gathers it again in backward (arXiv 2205.05198, section 4.2.2), as
sharded steps do here unless they are told otherwise. DTensor's gradients of norms are left partial until the update.
"""

import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from cosim.graph import OpGraph, Phase
from cosim.parallel.communication import communications
from cosim.parallel.layout import Sharding
from cosim.parallel.sharding import shard
from cosim.trace import TraceOptions, trace
from cosim.trace.vocabulary import kind_flops
from workloads.build import build
from workloads.layers import RMSNorm
from workloads.model import ModelConfig, from_dimensions

RANKS, BATCH, SEQUENCE, HIDDEN, LAYERS = 4, 2, 64, 96, 3
ROWS = BATCH * SEQUENCE * HIDDEN * 4  # bytes of an activation, b*s*h in fp32
STATISTICS = BATCH * SEQUENCE * 4
MODELS = {
    "gpt": {"family": "gpt", "layers": LAYERS, "hidden": HIDDEN, "heads": 8, "vocab": 512, "max_positions": 1024},
    "gpt with rotary positions": {"family": "gpt", "layers": LAYERS, "hidden": HIDDEN, "heads": 8, "vocab": 512,
                                  "pos_emb": "rope"},
    "llama": {"family": "llama", "layers": LAYERS, "hidden": HIDDEN, "heads": 8, "kv_heads": 4, "ffn": 224,
              "vocab": 512, "tied_embeddings": False},
}  # fmt: skip
_KINDS = {"all_reduce": "all_reduce", "all_gather_into_tensor": "all_gather", "reduce_scatter_tensor": "reduce_scatter"}
Messages = Counter[tuple[str, str, int]]


class _Recorder(TorchDispatchMode):
    """Messages (phase, kind, bytes of the full buffer) and FLOP of what runs on local tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: Messages = Counter()
        self.flops = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        namespace, _, name = str(packet).partition(".")
        if namespace == "_c10d_functional" and name in _KINDS:
            size = max(t.numel() * t.element_size() for t in (args[0], out))
            phase = "forward" if torch._C._current_graph_task_id() == -1 else "backward"
            self.messages[phase, _KINDS[name], size] += 1
        elif namespace == "cosim" and name in ("attention", "attention_backward"):
            q, k, v = (tuple(t.shape) for t in args[name == "attention_backward" :][:3])
            k, v = q[:2] + k[2:], q[:2] + v[2:]
            self.flops += sdpa_flop_count(q, k, v) if name == "attention" else sdpa_backward_flop_count(q, q, k, v)
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    yield init_device_mesh("cpu", (RANKS,))
    dist.destroy_process_group()


def _plan(block: nn.Module, sequence: bool) -> dict[str, Any]:
    """Of a block; what is between tensor-parallel regions is a slice along the sequence, or the same everywhere."""
    between = Shard(1) if sequence else Replicate()
    attention, mlp = block.attention, block.mlp
    assert isinstance(attention, nn.Module)
    assert isinstance(mlp, nn.Module)
    columns = [f"attention.{n}" for n in ("qkv", "query", "key", "value") if hasattr(attention, n)]
    columns += [f"mlp.{n}" for n in ("up", "gate") if getattr(mlp, n, None) is not None]
    plan: dict[str, Any] = dict.fromkeys(columns, None)
    plan = {name: ColwiseParallel() for name in plan}
    plan["attention"] = PrepareModuleInput(
        input_layouts=(between, None, None), desired_input_layouts=(Replicate(), None, None)
    )
    plan["mlp"] = PrepareModuleInput(input_layouts=(between,), desired_input_layouts=(Replicate(),))
    plan["attention.output"] = plan["mlp.down"] = RowwiseParallel(output_layouts=between)
    return plan | ({"attention_norm": SequenceParallel(), "mlp_norm": SequenceParallel()} if sequence else {})


def _with_pytorchs_norms(module: nn.Module) -> None:
    """DTensor knows PyTorch's own RMSNorm, and not the operator of the workloads."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, RMSNorm):
                setattr(parent, name, nn.RMSNorm(child.weight.shape[0]))


def _parallel(config: ModelConfig, mesh: DeviceMesh, sequence: bool) -> nn.Module:
    module = build(config)
    _with_pytorchs_norms(module)
    between = Shard(1) if sequence else Replicate()
    outer: dict[str, Any] = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
        "head": ColwiseParallel(input_layouts=between, output_layouts=Shard(-1), use_local_output=False),
    }
    if sequence:
        outer["norm"] = SequenceParallel()
    parallelize_module(module, mesh, outer)
    for block in module.layers:  # type: ignore[union-attr]
        if block.attention.packed:
            block.attention.kv_heads //= RANKS
        parallelize_module(block, mesh, _plan(block, sequence))
    return module


def dtensor_step(name: str, mesh: DeviceMesh, sequence: bool) -> _Recorder:
    """Forward, loss over the divided vocabulary, and backward of one rank.

    The second step is recorded: in the first DTensor also runs operators at full size, to learn their shapes.
    """
    with FakeTensorMode():
        module = _parallel(from_dimensions(MODELS[name]), mesh, sequence)
        tokens = torch.zeros((BATCH, SEQUENCE), dtype=torch.int64)
        for _ in range(2):
            with _Recorder() as recorder, loss_parallel():
                logits: Tensor = module(tokens)
                nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()  # type: ignore[no-untyped-call]
    return recorder


@functools.cache
def traced(name: str) -> OpGraph:
    return trace(from_dimensions(MODELS[name]), TraceOptions(batch=BATCH, sequence=SEQUENCE))


def sharded(name: str, **how: Any) -> OpGraph:
    return shard(traced(name), Sharding(tensor=RANKS, **how))


def messages(graph: OpGraph) -> Messages:
    """Those of forward and backward."""
    found: Messages = Counter()
    for sent in communications(graph):
        phase = Phase(int(graph.op_phase[sent.op]))
        if phase != Phase.OPTIMIZER:
            found[phase.name.lower(), sent.kind, sent.bytes] += 1
    return found


def rank_flops(graph: OpGraph) -> float:
    of_kind = [kind_flops(graph, kind, halve_causal=False) for kind in graph.kinds]
    return float(sum(of_kind[kind] for kind in graph.op_kind.tolist()))


@pytest.mark.parametrize("name", MODELS)
def test_without_sequence_parallelism_messages_and_products_are_dtensors(name: str, mesh: DeviceMesh) -> None:
    found, graph = dtensor_step(name, mesh, sequence=False), sharded(name)
    assert found.messages == messages(graph)
    assert found.flops == rank_flops(graph)


@pytest.mark.parametrize("name", ["gpt with rotary positions", "llama"])
def test_with_sequence_parallelism_messages_and_products_are_dtensors(name: str, mesh: DeviceMesh) -> None:
    found, graph = dtensor_step(name, mesh, sequence=True), sharded(name, sequence=True, keeps_gathered=True)
    assert found.messages == messages(graph)
    assert found.flops == rank_flops(graph)


@pytest.mark.parametrize("name", MODELS)
def test_a_layer_reduces_twice_each_way_as_megatron_lm(name: str) -> None:
    """Four all-reduces of b*s*h per layer (arXiv 1909.08053, figure 4); the embedding's and the head's one more each.

    The loss exchanges a row's maximum, its target's logit and its sum of exponentials (section 3, "all-reduce").
    """
    assert messages(sharded(name)) == {
        ("forward", "all_reduce", ROWS): 2 * LAYERS + 1,
        ("backward", "all_reduce", ROWS): 2 * LAYERS + 1,
        ("forward", "all_reduce", STATISTICS): 3,
    }


@pytest.mark.parametrize("name", MODELS)
def test_with_sequence_parallelism_all_reduces_are_taken_apart_and_inputs_gathered_again(name: str) -> None:
    """Per layer two all-gathers and two reduce-scatters each way, and in backward two more all-gathers for weights."""
    places = 2 * LAYERS + 1
    assert messages(sharded(name, sequence=True)) == {
        ("forward", "all_gather", ROWS): places,
        ("forward", "reduce_scatter", ROWS): places,
        ("backward", "all_gather", ROWS): 2 * places,
        ("backward", "reduce_scatter", ROWS): places,
        ("forward", "all_reduce", STATISTICS): 3,
    }


def test_gradients_of_norms_are_summed_once_per_step() -> None:
    graph = sharded("llama", sequence=True)
    last = [sent for sent in communications(graph) if graph.op_phase[sent.op] == Phase.OPTIMIZER]
    assert [(sent.kind, sent.bytes) for sent in last] == [("all_reduce", 4 * HIDDEN * (2 * LAYERS + 1))]
