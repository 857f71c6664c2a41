"""Stack, the facts about one framework release, and how a library file becomes one.

A fact is about software and is the same for every model and run: which kernel, what is fused, what overlaps, what the
host costs. A file states `{value, source}` for each; what it leaves out comes from its `base`, then from the neutral
default below, and is then listed in `assumed`.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from hwmodels.units import InputError, parse_quantity
from hwmodels.yaml_file import load_yaml

_LIBRARY = Path(__file__).parent / "library"
T = TypeVar("T")

ARCHITECTURES = ("volta", "turing", "ampere", "ada", "hopper", "blackwell")


@dataclass(frozen=True, slots=True)
class ByArchitecture(Generic[T]):
    """A fact whose value depends on the chip's architecture: one default and the architectures that differ from it."""

    default: T
    others: tuple[tuple[str, T], ...] = ()

    def on(self, architecture: str) -> T:
        """The value on `architecture` (a name of ARCHITECTURES, or any other name, which has the default)."""
        return dict(self.others).get(architecture, self.default)


Attention = Literal["flash-1", "flash-2", "flash-3", "flash-triton", "cudnn", "unfused"]
MixedPrecision = Literal["autocast", "cast_parameters", "master_weights"]
Format = Literal["compute", "fp32", "fp32_if_bf16"]  # compute: the 16-bit format that the run names as its precision;
#                                                       fp32_if_bf16: fp32 where that is bf16, else fp16


def _bytes(default: int) -> Any:
    return field(default=default, metadata={"dimension": "data"})


def _seconds(default: float) -> Any:
    return field(default=default, metadata={"dimension": "time"})


def _count(default: int) -> Any:
    return field(default=default, metadata={"least": 0})


def _share(default: float) -> Any:
    return field(default=default, metadata={"share": True})


@dataclass(frozen=True, slots=True)
class Stack:
    """What a framework release does between the model and the chip; each default is the neutral value.

    Neutral is what eager PyTorch does where a choice has to be made; nothing where a size is unknown; and 10 us of host
    per kernel, inside the 5 to 25 us that interpreter, dispatcher, autograd and driver are said to take together
    (jiahuanglin.xyz, GPU kernel serving, lesson 18). `sources[key]` says where a value was read; `assumed` names the
    keys that stand at the neutral value.
    """

    name: str
    title: str
    sources: Mapping[str, str]
    assumed: tuple[str, ...]

    # What a run does that leaves these keys of its file out.
    compiled: bool = False  # training.compile
    dropout: float = _share(0.0)  # training.dropout
    sequence_parallel: bool = False  # parallel.sequence
    gradients_overlap: bool = True  # parallel.overlap.gradients
    parameters_overlap: bool = True  # parallel.overlap.parameters
    tensor_overlap: bool = False  # parallel.overlap.tensor: collectives in parts under the products beside them
    tensor_overlap_backward: bool = False  # that too, where tensor_overlap is false: whole ones beside the products of
    #                                        backward that they do not depend on

    # Kernels. `..._fused` false: the pattern runs as elementary operations, each a pass over memory.
    attention: ByArchitecture[Attention] = ByArchitecture("flash-2")  # what `attention: flash` of a run means
    attention_unpadded: bool = False  # flash-1/2/3 are called with gathered q, k, v and a scattered output: four copies
    #                                   of tokens x heads x head_dim forward, and four backward, padding or not
    repeat_kv: bool = False  # keys and values of grouped-query attention are copied out to all heads first
    rms_norm_fused: bool = False  # else cast, square, mean, rsqrt, multiply, cast, scale, unless compiled
    masked_softmax_longest: int = _count(0)  # keys of the longest row for which scale, mask and softmax of unfused
    #                                           attention are one kernel, see cosim.techniques.fusion; 0: they are not
    dropout_add_fused: bool = False  # dropout and the addition to the residual stream are one kernel
    rotary_fused: bool = False  # a rotary embedding is one kernel
    cross_entropy_fused: bool = False  # else log_softmax and nll_loss, whose intermediate is kept for backward
    cross_entropy_format: Format = "fp32"  # fp32: logits are copied to fp32 first, their gradients copied back
    logged_losses: int = _count(0)  # cross-entropies computed again without gradient each micro-step, for metrics
    compile_scope: Literal["block", "model"] = "model"  # what torch.compile covers when a run asks for it
    compile_loss: bool = False  # whether it covers the loss

    # Formats when a run says bf16 or fp16. autocast: parameters are fp32 and are cast once per micro-step, ops by list;
    # cast_parameters: fp32 shards, gathered and used in 16 bit, no cast per op; master_weights: 16-bit parameters and
    # fp32 copies in the optimizer.
    mixed_precision_sharded: MixedPrecision = "cast_parameters"  # under ZeRO 3
    mixed_precision_replicated: MixedPrecision = "autocast"  # else
    autocast_norm_format: Format = "fp32"  # what a norm reads and writes under autocast; elsewhere its input's format
    parameter_gather_format: Format = "compute"  # of ZeRO 3's all-gathers
    gradient_reduce_format: Format = "fp32"  # of the reduction; a whole gradient is in the format of its parameter
    fp8_recipe: Literal["delayed", "current", "block"] = "delayed"  # where scales of `precision: fp8` come from, see
    #                                                                  cosim.techniques.recipes
    loss_scaling: Literal["dynamic", "none"] = "dynamic"  # with fp16: the loss is scaled, gradients unscaled and tested
    gradient_format: Format = "fp32"  # of the reduced gradient, summed over micro-steps and read by the optimizer

    # Sharded data parallelism (ZeRO 3). A unit is gathered and reduced at once: each block, and a root for the rest.
    forward_prefetch: bool = False  # true: a unit's gather is issued before the previous unit's forward is launched
    backward_prefetch: Literal["pre", "post", "none"] = "pre"  # the next gather is issued before (pre) or after (post)
    #                                                            this unit's backward is launched
    gathers_in_flight: int = _count(2)  # a gather waits until the block so many before it was copied out, or, where
    #                                     nothing is copied, freed; in backward for the last copy; 0: no limit
    reductions_in_flight: int = _count(1)  # buffers of reductions at once: a unit's copy into one waits for the
    #                                        reduction so many before it; 0: each goes when its reduction is done
    reshard_root: bool = False  # the root's gathered parameters are freed between forward and backward
    reshard_last_block: bool = True  # the last block's are
    collectives_serialised: bool = True  # gathers and reductions of a rank run one at a time, in the order issued
    gather_copies: int = _count(1)  # copies of a unit's whole parameters after the gather
    gradient_copies: int = _count(1)  # passes (read and write) over a unit's whole gradients before the reduction
    sharded_reduce_each_micro_step: bool = True  # false: whole gradients stay until the last micro-step

    # Replicated data parallelism (ZeRO 0 to 2)
    gradient_buffer: Literal["none", "compute", "fp32", "fp32_if_bf16"] = "none"  # with ZeRO 0 and 1: the format of
    #                            one buffer, always there, that each micro-step adds its gradients to, and is reduced
    gradient_accumulation_fused: bool = False  # to a buffer in fp32 the products that make weight gradients add them
    replicated_reduce_each_micro_step: bool = False
    bucket_bytes: int = _bytes(25 * 2**20)  # gradients are reduced in buckets of this size, as backward fills them
    first_bucket_bytes: int = _bytes(2**20)
    bucket_views: bool = False  # false: buckets are copies, filled before and read back after the reduction

    # Tensor parallelism
    sequence_gathered_again: bool = False  # with sequence parallelism, what weights' gradients are made of is kept as
    #                                        slices and gathered again in backward; else kept as forward gathered it
    vocabulary_multiple: int = field(default=1, metadata={"least": 1})  # a tensor-parallel rank's part of the
    #                                                                     vocabulary is padded to a multiple of it

    # Pipeline
    pipeline_messages_overlap: bool = False  # a rank computes on while its message travels
    pipeline_messages_sharded: bool = False  # tensor-parallel ranks each send their part, and gather what arrived

    # Optimizer step
    optimizer_kernel: Literal["fused", "foreach", "per_parameter"] = "foreach"  # one kernel; one per pass over all
    #                               parameters, with one temporary as large as them; one per pass and parameter
    optimizer_syncs: bool = False  # the host waits for the device once per parameter
    gradient_clipping: bool = True  # by global norm: a pass that reads all gradients, one that reads and writes them

    # Host thread
    host_forward_s: float = _seconds(10e-6)  # per kernel that eager forward or recomputation launches
    host_backward_s: float = _seconds(10e-6)  # per kernel that eager backward launches
    host_optimizer_s: float = _seconds(10e-6)  # per kernel of the optimizer step
    host_compiled_s: float = _seconds(10e-6)  # per kernel of a compiled region
    host_unit_s: float = _seconds(0.0)  # per ZeRO 3 unit and pass, beside its kernels
    launch_s: float = _seconds(5e-6)  # from launch to start on an idle device
    syncs_each_step: bool = True  # the host waits for the device at the end of a step (a loss or norm is read)
    syncs_each_micro_step: bool = False  # and at the start of each micro-step's forward

    # Memory
    allocation_unit_bytes: int = _bytes(512)  # sizes are rounded up to it
    blas_workspace_bytes: ByArchitecture[int] = field(
        default=ByArchitecture(8 * 2**20), metadata={"dimension": "data"}
    )  # allocated once per device; counted by torch as the activations are
    context_bytes: ByArchitecture[int] = field(
        default=ByArchitecture(0), metadata={"dimension": "data"}
    )  # CUDA context and loaded kernels; on the device, not counted by torch
    communicator_bytes: int = _bytes(0)  # buffers of one NCCL communicator; on the device, not counted by torch
    driver_bytes: ByArchitecture[int] = field(
        default=ByArchitecture(0), metadata={"dimension": "data"}
    )  # of the device's memory, what its driver offers to nobody


_IDENTITY = ("name", "title", "sources", "assumed")
_FIELDS = {f.name: f for f in dataclasses.fields(Stack) if f.name not in _IDENTITY}


def names(root: Path | None = None) -> list[str]:
    """The stacks that a run file can name: the library files in `root` (default: the package's own), sorted."""
    return sorted(path.stem for path in (root or _LIBRARY).glob("*.yaml"))


def load(name: str, root: Path | None = None) -> Stack:
    """The stack `name` with what it inherits.

    Raises InputError: no such stack, an unreadable file, an unknown key, a value of the wrong type, a fact without
    a source, or bases that form a circle.
    """
    facts, sources, title = _inherited(name, root or _LIBRARY, ())
    assumed = tuple(key for key in _FIELDS if key not in facts)
    return Stack(name=name, title=title, sources=sources, assumed=assumed, **facts)


def _inherited(name: str, root: Path, seen: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, str], str]:
    """Values, sources and title of `name`, its own facts over those of its base."""
    if name in seen:
        raise InputError(f"stack '{seen[0]}': its bases form a circle: {' -> '.join([*seen, name])}")
    if name not in names(root):
        raise InputError(f"training.framework: there is no software stack '{name}'; known: {', '.join(names(root))}")
    path = root / f"{name}.yaml"
    document = _read(path)
    facts: dict[str, Any] = {}
    sources: dict[str, str] = {}
    if document.get("base") is not None:
        facts, sources, _ = _inherited(str(document["base"]), root, (*seen, name))
    for key, entry in (document.get("facts") or {}).items():
        where = f"{path.name}: facts.{key}"
        if key not in _FIELDS:
            raise InputError(f"{where}: not a fact of a software stack; allowed: {', '.join(_FIELDS)}")
        if not isinstance(entry, dict) or set(entry) != {"value", "source"}:
            raise InputError(f"{where}: must be {{value: ..., source: ...}} and nothing else, not {entry!r}")
        if not isinstance(entry["source"], str) or not entry["source"].strip():
            raise InputError(f"{where}: source must be text that says where the value can be read")
        facts[key] = _checked(_TYPES[key], entry["value"], _FIELDS[key].metadata, where)
        sources[key] = entry["source"].strip()
    return facts, sources, str(document["title"])


def _read(path: Path) -> dict[str, Any]:
    """The YAML document at `path`, with its top level checked."""
    document = load_yaml(path, path.name)
    if not isinstance(document, dict):
        raise InputError(f"{path.name}: must be a mapping with name, title, facts, and optionally base")
    for key in document:
        if key not in ("name", "title", "base", "facts"):
            raise InputError(f"{path.name}: unknown key '{key}'; allowed: name, title, base, facts")
    if document.get("name") != path.stem:
        raise InputError(f"{path.name}: name is {document.get('name')!r} but must be the file's own, '{path.stem}'")
    if not isinstance(document.get("title"), str):
        raise InputError(f"{path.name}: title must be text")
    if not isinstance(document.get("facts") or {}, dict):
        raise InputError(f"{path.name}: facts must be a mapping from key to {{value, source}}")
    return document


def _checked(kind: Any, value: object, metadata: Mapping[str, Any], where: str) -> Any:
    """`value` as the field's type `kind`; quantities are text with a unit, architectures are a mapping."""
    if typing.get_origin(kind) is ByArchitecture:
        inner = typing.get_args(kind)[0]
        by_name = value if isinstance(value, dict) else {"default": value}
        for name in by_name:
            if name != "default" and name not in ARCHITECTURES:
                known = ", ".join(("default", *ARCHITECTURES))
                raise InputError(f"{where}: unknown architecture '{name}'; allowed: {known}")
        if "default" not in by_name:
            raise InputError(f"{where}: needs a value for 'default'")
        checked = {name: _checked(inner, item, metadata, where) for name, item in by_name.items()}
        return ByArchitecture(checked.pop("default"), tuple(sorted(checked.items())))
    if typing.get_origin(kind) is Literal:
        allowed = typing.get_args(kind)
        if not any(type(value) is type(item) and value == item for item in allowed):
            raise InputError(f"{where}: {value!r} is not one of {', '.join(map(str, allowed))}")
        return value
    if "share" in metadata:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise InputError(f"{where}: {value!r} must be a number from 0 to below 1")
        return float(value)
    if "dimension" in metadata:
        quantity = parse_quantity(value, metadata["dimension"], where)
        return round(quantity) if kind is int else quantity
    if kind is bool:
        if not isinstance(value, bool):
            raise InputError(f"{where}: {value!r} must be true or false")
        return value
    if isinstance(value, bool) or not isinstance(value, int) or value < metadata["least"]:
        raise InputError(f"{where}: {value!r} must be a whole number, at least {metadata['least']}")
    return value


_TYPES: Mapping[str, Any] = typing.get_type_hints(Stack)
