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

import yaml

from hwmodels.units import InputError, parse_quantity

_LIBRARY = Path(__file__).parent / "library"
T = TypeVar("T")
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

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
# `compute` is the 16-bit format of `training.precision`; `fp32` is fp32.
Format = Literal["compute", "fp32"]


def _bytes(default: int) -> Any:
    return field(default=default, metadata={"dimension": "data"})


def _seconds(default: float) -> Any:
    return field(default=default, metadata={"dimension": "time"})


def _count(default: int) -> Any:
    return field(default=default, metadata={"least": 0})


@dataclass(frozen=True, slots=True)
class Stack:
    """What a framework release does between the model and the chip; each default is the neutral value.

    The neutral values are those of today's eager PyTorch where a choice has to be made, and zero cost or the larger
    of the plausible sizes where a quantity is unknown. `sources[key]` says where the value of a key was read, in
    software that can be opened; `assumed` names the keys that stand at the neutral default.
    """

    name: str
    title: str
    sources: Mapping[str, str]
    assumed: tuple[str, ...]

    # Kernels of eager mode. False: the pattern runs as its elementary operations, each one pass over memory.
    attention: ByArchitecture[Attention] = ByArchitecture("flash-2")  # where the run says `attention: flash`
    layer_norm_fused: bool = True  # forward one kernel; backward one for the input, one or two for the weights
    rms_norm_fused: bool = False  # else cast, square, mean, rsqrt, multiply, cast, scale
    norm_format: Format = "compute"  # what norms read and write (statistics are fp32 inside in either case)
    rope_fused: bool = False  # else casts to fp32, complex or rotate-half products, casts back
    activation_fused: bool = False  # bias + activation, or SwiGLU's silu x gate, in one pass
    dropout_add_fused: bool = False  # dropout + residual addition in one pass
    cross_entropy: Literal["eager", "fused"] = "eager"  # eager: log_softmax and nll_loss apart, both results kept
    cross_entropy_format: Format = "fp32"  # fp32: the logits are copied to fp32 first, and gradients copied back
    repeat_kv: bool = False  # grouped-query keys and values are copied out to all heads before attention
    compile_scope: Literal["block", "model"] = "block"  # what torch.compile covers when a run asks for it
    compile_loss: bool = False  # whether it covers the loss too

    # Formats when a run says bf16 or fp16
    mixed_precision: Literal["autocast", "cast_parameters", "master_weights"] = "autocast"
    # autocast: fp32 parameters, cast per op and micro-step; cast_parameters: FSDP shards fp32, gathers and computes in
    # 16 bit; master_weights: the model is 16 bit, the optimizer holds fp32 copies.
    parameter_gather_format: Format = "compute"  # of FSDP's all-gathers
    gradient_reduce_format: Format = "fp32"  # of the reduce-scatter or all-reduce
    gradient_format: Format = "fp32"  # of .grad as the optimizer reads it; under FSDP, of the sharded gradient

    # Sharded data parallelism (ZeRO 3, and 2 with reshard_after_forward false)
    fsdp: Literal[1, 2] = 2  # 1: flat parameter per unit; 2: one DTensor per parameter
    fsdp_unit: Literal["block", "model"] = "block"  # each block is a unit, and the root holds the rest
    forward_prefetch: bool = False  # explicit; without it the next gather is issued when the host reaches the next unit
    backward_prefetch: Literal["pre", "post", "none"] = "pre"  # next gather before or after this unit's backward
    gathers_in_flight: int = _count(2)  # units gathered or being gathered at once in forward; 0: no limit
    reshard_after_forward: bool = True
    reshard_last_block: bool = True  # false: the last block stays gathered between forward and backward
    collectives_serialised: bool = True  # a rank's gathers and reductions run one after the other, in issue order
    reduce_each_micro_step: bool = True  # false: gradients stay whole on each rank until the last micro-step
    gradient_upcast_copy: bool = True  # the whole unit's gradient is copied into the reduction's buffer and format

    # Replicated data parallelism
    ddp_bucket_bytes: int = _bytes(25 * 2**20)
    ddp_first_bucket_bytes: int = _bytes(2**20)
    ddp_bucket_views: bool = False  # false: .grad and the buckets are two copies

    # Optimizer step
    optimizer_kernel: Literal["fused", "foreach", "per_parameter"] = "foreach"
    optimizer_accesses: int = _count(20)  # AdamW: tensor elements read or written per parameter element
    optimizer_kernels: int = _count(8)  # AdamW: passes; per parameter if per_parameter, else over all of them at once
    optimizer_syncs: bool = False  # the host waits for the device once per parameter
    gradient_clipping: bool = True  # to a global norm: one more read of all gradients, then a read and a write

    # Host thread
    host_forward_s: float = _seconds(10e-6)  # per kernel launched in eager forward, and in recomputation
    host_backward_s: float = _seconds(10e-6)  # per kernel launched by autograd's thread
    host_optimizer_s: float = _seconds(10e-6)  # per kernel launched in the optimizer step
    host_unit_s: float = _seconds(0.0)  # per FSDP unit and pass, beside its kernels
    launch_s: float = _seconds(5e-6)  # from the host's launch to the start on an idle device
    syncs_each_step: bool = True  # the host waits for the device at the end of each step (loss or norm is read)
    syncs_each_micro_step: bool = False

    # Memory
    allocation_unit_bytes: int = _bytes(512)  # sizes are rounded up to it
    small_allocation_bytes: int = _bytes(2**20)  # up to this, blocks come from the small pool
    small_segment_bytes: int = _bytes(2 * 2**20)  # the small pool's segments
    large_segment_bytes: int = _bytes(20 * 2**20)  # segments for sizes between small and exact
    exact_segment_from_bytes: int = _bytes(10 * 2**20)  # from here a segment has the size asked for
    exact_segment_unit_bytes: int = _bytes(2 * 2**20)  # rounded up to this
    blas_workspace_bytes: ByArchitecture[int] = field(
        default=ByArchitecture(8 * 2**20), metadata={"dimension": "data"}
    )  # allocated once per device and stream, counted by torch
    context_bytes: int = _bytes(0)  # CUDA context and loaded kernels: on the device, not counted by torch
    communicator_bytes: int = _bytes(0)  # buffers per NCCL communicator: on the device, not counted by torch


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
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=_LOADER)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path.name}: cannot be read: {' '.join(str(error).split())[:200]}") from None
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
                raise InputError(f"{where}: unknown architecture '{name}'; allowed: default, {', '.join(ARCHITECTURES)}")
        if "default" not in by_name:
            raise InputError(f"{where}: needs a value for 'default'")
        checked = {name: _checked(inner, item, metadata, where) for name, item in by_name.items()}
        return ByArchitecture(checked.pop("default"), tuple(sorted(checked.items())))
    if typing.get_origin(kind) is Literal:
        allowed = typing.get_args(kind)
        if not any(type(value) is type(item) and value == item for item in allowed):
            raise InputError(f"{where}: {value!r} is not one of {', '.join(map(str, allowed))}")
        return value
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
