"""cosim simulates training steps of Transformers: time, memory, energy, money, and what holds a run back.

A run is text, a file (`RunSpec.load`) or a mapping (`RunSpec.from_mapping`), and is changed as `--set` does it:

>>> import cosim
>>> spec = cosim.RunSpec.from_text('''
... workload:
...   model: {family: gpt, layers: 2, hidden: 64, heads: 2, vocab: 128}
...   seq_len: 64
...   global_batch: 16
... system: {accelerator: h100-sxm-80gb, devices: 8}
... ''')
>>> sharded = spec.override(["parallel.zero=3", "training.recompute=full"])
>>> sharded.micro_steps, sharded.tokens_per_step
(2, 1024)
>>> import json, pathlib, tempfile
>>> folder = pathlib.Path(tempfile.mkdtemp())
>>> _ = (folder / "run.json").write_text(json.dumps(sharded.echo()))
>>> cosim.RunSpec.load(folder / "run.json").echo() == sharded.echo()
True

A wrong run is one sentence:

>>> spec.override(["training.precison=fp8"])
Traceback (most recent call last):
    ...
hwmodels.units.InputError: run file: training.precison is not a key of the run file; did you mean 'precision'?

One call simulates a step. What does not fit in memory is a result too:

>>> result = cosim.simulate(sharded)
>>> result.feasible, result.unknown_ops
(True, ())
>>> 0 < result.step_time_s < 0.1
True
>>> round(result.tokens_per_s * result.step_time_s)
1024
>>> sorted(result.memory_bytes)
['activations', 'framework', 'gradients', 'optimizer', 'temporary', 'weights']

What the result says goes into files that others read: the stable JSON of `--json`, the page of `--html`, the timeline
of `--perfetto`, and the allocations of `--memory-snapshot`:

>>> result.to_json()["schema_version"]
1
>>> cosim.write_html(result, folder / "step.html")
>>> cosim.write_perfetto(result, folder / "step.json.gz")
>>> cosim.write_memory_snapshot(result, folder / "step.pickle")

The traced step is a graph by itself, with the run's techniques applied:

>>> step = cosim.trace_step(sharded)
>>> step.parameter_count()
239360
>>> cosim.write_graph(step, folder / "step.graphml")
>>> cosim.read_graph(folder / "step.graphml").number_of_nodes() == len(step)
True
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cosim.graph import OpGraph as OpGraph
    from cosim.report.html import write_html as write_html
    from cosim.report.memory_snapshot import write_memory_snapshot as write_memory_snapshot
    from cosim.report.perfetto import write_perfetto as write_perfetto
    from cosim.result import Result as Result
    from cosim.simulate import simulate as simulate
    from cosim.simulate import trace_step as trace_step
    from cosim.spec import RunSpec as RunSpec
    from cosim.trace.export import read_graph as read_graph
    from cosim.trace.export import write_graph as write_graph
    from hwmodels.units import InputError as InputError

__all__ = [
    "InputError",
    "OpGraph",
    "Result",
    "RunSpec",
    "read_graph",
    "simulate",
    "trace_step",
    "write_graph",
    "write_html",
    "write_memory_snapshot",
    "write_perfetto",
]

_HOMES = {
    "InputError": "hwmodels.units",
    "OpGraph": "cosim.graph",
    "Result": "cosim.result",
    "RunSpec": "cosim.spec",
    "read_graph": "cosim.trace.export",
    "simulate": "cosim.simulate",
    "trace_step": "cosim.simulate",
    "write_graph": "cosim.trace.export",
    "write_html": "cosim.report.html",
    "write_memory_snapshot": "cosim.report.memory_snapshot",
    "write_perfetto": "cosim.report.perfetto",
}


def __getattr__(name: str) -> Any:
    """The public names, each imported when first used, so that `cosim --help` does not wait for them."""
    if name not in _HOMES:
        raise AttributeError(f"module 'cosim' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """The package, in which `simulate` stays the call also once the module of that name has been imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "simulate" and isinstance(value, ModuleType):
            value = value.simulate
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
