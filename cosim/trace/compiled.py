"""The second frontend: what torch.compile captures, instead of the operators that eager PyTorch runs.

Dynamo captures forward and loss as one graph, AOTAutograd adds backward, and its min-cut partitioner decides which
tensors forward saves and what backward computes again (Chen et al., arXiv 1604.06174, as a minimum cut: PyTorch's
torch/_functorch/partitioners.py). Operators are decomposed as for Inductor, so that norms, activations and softmax are
the elementary operators that it fuses. The two graphs are then run, node by node, under the recorder that records eager
steps, inside the autograd node that AOTAutograd makes: autograd itself saves and frees, and the optimizer is eager.

Inductor's own passes (in-place buffers, reordering for memory) and its kernels are not taken: see
`cosim.techniques.fusion`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import TorchDynamoException
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from cosim.graph import Phase
from cosim.trace.recorder import Recorder
from cosim.trace.step import GraphBreakError
from workloads import operators

LossFunction = Callable[[Any, Tensor], Tensor]
"""Inputs and labels to the scalar loss."""


def captured(
    loss: LossFunction, module: nn.Module, recorder: Recorder, inputs: Any, labels: Tensor
) -> Callable[[], Tensor]:
    """`loss`, which calls `module`, as a function that runs its captured graphs under `recorder`.

    Raises GraphBreakError if it is not one graph for torch.compile: a data-dependent branch, a call that Dynamo does
    not trace.
    """
    told = _Told()
    paths = {name for name, _ in module.named_modules()}

    def compiler(backward: bool) -> Callable[[fx.GraphModule, Any], Any]:
        def compile_graph(graph: fx.GraphModule, _examples: Any) -> Any:
            return _Replay(graph, backward, paths, told).boxed()

        return compile_graph

    partition = aot_autograd(
        fw_compiler=compiler(False),
        bw_compiler=compiler(True),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=_decompositions(),
    )
    calls: list[_Call] = []

    def backend(graph: fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        compiled = partition(graph, examples)

        def call(*arguments: Any) -> Any:
            results = compiled(*arguments)
            calls.append(_Call(compiled, arguments, results))
            return results

        return call

    loss(inputs, labels)  # what the module itself raises, it raises here
    torch._dynamo.reset()  # else a step traced before counts against the number of graphs per function
    _forget_kernels()
    try:
        first = torch.compile(loss, backend=backend, dynamic=False, fullgraph=True)(inputs, labels)
    except TorchDynamoException as error:
        raise GraphBreakError(
            f"model: torch.compile does not capture its forward as one graph ({_reason(error)}); "
            "trace it with the frontend eager"
        ) from error
    finally:
        torch._dynamo.reset()
        _forget_kernels()
    (captured_call,) = calls
    place = next(i for i, result in enumerate(captured_call.results) if result is first)
    told.recorder = recorder
    return lambda: captured_call.again(place)


@dataclass(slots=True)
class _Told:
    """The recorder that captured graphs tell where they are; none while they are captured."""

    recorder: Recorder | None = None


class _Call:
    """A captured graph with the arguments (parameters, buffers, inputs) of its first call, and its results."""

    def __init__(self, compiled: Callable[..., Any], arguments: tuple[Any, ...], results: Any) -> None:
        self._compiled, self._arguments, self.results = compiled, arguments, results

    def again(self, place: int) -> Tensor:
        """Calls it again and returns the result at `place`."""
        self.results = None
        result: Tensor = self._compiled(*self._arguments)[place]
        return result


def _forget_kernels() -> None:
    """Empties what capturing keeps of which kernel an operator has: those of `replacements` come and go."""
    for namespace in (torch.ops.aten, torch.ops.cosim):
        for packet in list(vars(namespace).values()):
            if isinstance(packet, torch._ops.OpOverloadPacket):
                for overload in list(vars(packet).values()):
                    if isinstance(overload, torch._ops.OpOverload):
                        overload._dispatch_cache.clear()


def _reason(error: BaseException) -> str:
    """What Dynamo says, without its advice; what a captured operator raised, if it is that."""
    error = getattr(error, "inner_exception", error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line.removeprefix("Explanation: ") for line in lines[:2] if line is lines[0] or "Explanation: " in line]
    return ": ".join(said)[:250].rstrip(".") or type(error).__name__


def _decompositions() -> Mapping[Any, Any]:
    """Inductor's, and RMSNorm by its formula; whole operators stay those that Inductor turns into indexed writes."""
    table = dict(select_decomp_table())
    for name in ("embedding_dense_backward", "nll_loss_forward", "nll_loss_backward"):
        table.pop(getattr(torch.ops.aten, name).default, None)
        table.pop(getattr(torch.ops.aten, name), None)
    for name in ("_softmax", "_log_softmax"):
        operator = getattr(torch.ops.aten, name).default
        table[operator] = _widened(table[operator])
    table[torch.ops.cosim.rms_norm.default] = operators.rms_norm._init_fn
    table[torch.ops.cosim.rms_norm_backward.default] = operators.rms_norm_backward._init_fn
    return table


def _widened(softmax: Any) -> Any:
    """A softmax that reads any 16-bit format and writes fp32 where asked; PyTorch's formula does so from fp16 only."""

    def run(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
        result: Tensor = softmax(x.float() if half_to_float else x, dim, False)
        return result

    return run


class _Replay(fx.Interpreter):
    """Runs a captured graph; where a recorder is set, it is told the phase and module of every node.

    Values are dropped after their last use, and the caller's list of arguments is emptied, so that storages die as
    they do in generated code.
    """

    def __init__(self, graph: fx.GraphModule, backward: bool, paths: set[str], told: _Told) -> None:
        super().__init__(graph)
        self._backward = backward
        self._paths = paths
        self._told = told

    def boxed(self) -> Callable[[list[Any]], Any]:
        """The graph as AOTAutograd calls it: a function that takes its arguments out of a list."""

        def run(arguments: list[Any]) -> Any:
            try:
                return self.boxed_run(arguments)
            finally:
                self.env.clear()
                if self._told.recorder is not None:
                    self._told.recorder.place = None

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def run_node(self, n: fx.Node) -> Any:
        """The node's value."""
        if self._told.recorder is not None and n.op == "call_function":
            self._told.recorder.place = (self._phase(n), self._module(n, self._told.recorder))
        return super().run_node(n)

    def _phase(self, node: fx.Node) -> Phase:
        """Forward's operators in the backward graph are what the partitioner chose to compute again."""
        if not self._backward:
            return Phase.FORWARD
        return Phase.RECOMPUTE if node.meta.get("partitioner_tag") == "is_forward" else Phase.BACKWARD

    def _module(self, node: fx.Node, recorder: Recorder) -> int:
        """The row of the module whose forward the node is from; -1 if that is not known."""
        stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
        if not stack:
            return -1 if self._backward else 0
        source = next(reversed(stack.values()))[0]
        return recorder.module_row(module_path(source, self._paths))


def module_path(source: str, paths: set[str]) -> str:
    """The module's name among `paths` that Dynamo's name of its source ends in; "" for the model itself.

    "L['self']._modules['layers'].0" is layers.0.
    """
    text = re.sub(r"\[['\"]?(\w+)['\"]?\]", r".\1", source).replace("._modules", "")
    parts = [part for part in text.split(".") if part]
    return next((path for i in range(len(parts)) if (path := ".".join(parts[i:])) in paths), "")
