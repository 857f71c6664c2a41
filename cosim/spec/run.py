"""RunSpec: one run, read from a file, text or mapping, with `a.b=c` overrides, checked as far as no graph is needed."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PrivateAttr, ValidationError, model_validator

import workloads.model
from cosim.spec.errors import short, translate
from cosim.spec.modelled import check_modelled
from cosim.spec.quantities import Section
from cosim.spec.sections import (
    HuggingFaceModel,
    ModelDimensions,
    ParallelSpec,
    PythonModel,
    SystemSpec,
    TrainingSpec,
    WorkloadSpec,
)
from hwmodels.units import InputError
from hwmodels.yaml_file import SIZE_LIMIT_BYTES, decode, load_json, load_yaml
from workloads import named
from workloads.model import Model, ModelConfig, from_dimensions

_SHARDED_BY_DEFAULT = ("composer", "torchtitan", "maxtext")  # their recipes train with FSDP: ZeRO 3


class RunSpec(Section):
    """One run: the workload, the system, how the step is divided over it, and the recipe.

    Everything is data with its defaults filled in; quantities are in SI units. A value that is wrong raises InputError,
    one that is right but not modelled yet its subclass NotModelledError.
    """

    workload: Annotated[WorkloadSpec, Field(description="What is trained, on how many tokens at a time")]
    system: Annotated[SystemSpec, Field(description="The hardware")]
    parallel: Annotated[ParallelSpec, Field(default_factory=ParallelSpec, description="How devices share the step")]
    training: Annotated[TrainingSpec, Field(default_factory=TrainingSpec, description="The recipe and its software")]
    _directory: Path | None = PrivateAttr(default=None)  # of the run file: where a `python:` module is looked for

    @staticmethod
    def load(source: str | Path, overrides: Iterable[str] = ()) -> RunSpec:
        """The run in a YAML or JSON file, or on standard input for '-', with `overrides` ("training.precision=fp16").

        A file of an accelerator or a module that the run names is looked for beside the run file.

        Raises InputError.
        """
        if str(source) == "-":
            if sys.stdin is None:
                raise InputError("standard input: is closed; give it a run file, or name one")
            data = load_yaml(decode(sys.stdin.buffer.read(SIZE_LIMIT_BYTES + 1), "standard input"), "standard input")
            return RunSpec.from_mapping(data, "standard input", overrides)
        path = Path(source)
        data = load_yaml(path, str(source))
        spec = RunSpec.from_mapping(_beside(data, path.parent), str(source), overrides)
        spec._directory = path.parent
        return spec

    @staticmethod
    def from_text(text: str, where: str = "run file", overrides: Iterable[str] = ()) -> RunSpec:
        """The run that YAML or JSON text states; raises InputError, in which `where` names the text."""
        return RunSpec.from_mapping(load_yaml(text, where), where, overrides)

    @staticmethod
    def from_json(line: bytes, where: str, overrides: Iterable[str] = (), directory: Path | None = None) -> RunSpec:
        """The run that one JSON object states; files and modules that it names are looked for in `directory` first.

        Raises InputError.
        """
        data = load_json(line, where)
        if directory is not None:
            data = _beside(data, directory)
        spec = RunSpec.from_mapping(data, where, overrides)
        spec._directory = directory
        return spec

    @staticmethod
    def from_mapping(data: object, where: str = "run file", overrides: Iterable[str] = ()) -> RunSpec:
        """The run that plain data states, a mapping as a run file holds it; raises InputError."""
        if not isinstance(data, Mapping):
            raise InputError(f"{where}: must be a mapping with workload and system, not {short(data, quote=True)}")
        plain: Any = dict(data)
        for override in overrides:
            plain = _overridden(plain, override)
        try:
            return RunSpec.model_validate(plain)
        except ValidationError as error:
            raise translate(error, RunSpec, where) from None
        except UnicodeEncodeError:
            raise InputError(f"{where}: holds text that is not Unicode (half of a surrogate pair)") from None

    def override(self, overrides: Iterable[str], where: str = "run file") -> RunSpec:
        """This run with other values, `["training.precision=fp16", ...]`; what was a default is derived anew."""
        spec = RunSpec.from_mapping(self.model_dump(mode="json", exclude_unset=True), where, overrides)
        spec._directory = self._directory
        return spec

    def echo(self) -> dict[str, Any]:
        """The run as a plain mapping with all defaults filled in, which `from_mapping` reads back as the same run.

        What only the software stack or the hardware decides, and the file leaves open, is None.
        """
        plain = self.model_dump(mode="json")
        if isinstance(self.workload.model, ModelDimensions):
            plain["workload"]["model"] = {k: v for k, v in plain["workload"]["model"].items() if v is not None}
        return plain

    def model(self) -> Model:
        """What `workloads.build.build_module` takes; nothing is imported here."""
        model = self.workload.model
        if isinstance(model, HuggingFaceModel):
            return workloads.model.HuggingFaceModel(model.huggingface, model.config)
        if isinstance(model, PythonModel):
            return workloads.model.PythonModel(model.python, model.arguments, self._directory)
        config = self.dimensions()
        assert config is not None  # a name or dimensions
        return config

    @property
    def data_parallel(self) -> int:
        """Replicas: the devices that tensor, pipeline and context parallelism leave over."""
        parallel = self.parallel
        return self.system.devices // (parallel.tensor * parallel.pipeline * parallel.context)

    @property
    def micro_steps(self) -> int:
        """Micro-batches that each replica runs per optimizer step (gradient accumulation)."""
        return self.workload.global_batch // (self.workload.micro_batch * self.data_parallel)

    @property
    def shard_within(self) -> int | None:
        """With hybrid sharding, the devices of a node, in which parameters are sharded: those on one fast fabric where
        that is said.
        """
        system = self.system
        return (system.nvlink_domain or system.devices_per_node) if self.parallel.hybrid_shard else None

    @property
    def nodes(self) -> int:
        """Hosts; each has `devices_per_node` devices, of which a run smaller than a node uses some."""
        return -(-self.system.devices // self.system.devices_per_node)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step, over all devices; of t5 those that the encoder reads.

        So counts the T5 paper (arXiv 1910.10683, section 3.1.2) and Hugging Face's Trainer (the model's main input).
        """
        return self.workload.global_batch * self.workload.seq_len

    def dimensions(self) -> ModelConfig | None:
        """The model's dimensions with its family's defaults, as this run uses them; None if it is a Hugging Face or
        Python module.
        """
        workload = self.workload
        config = _config(workload)
        if config is None:
            return None
        return config.for_workload(workload.seq_len, workload.masked_fraction, workload.decoder_seq_len)

    @model_validator(mode="after")
    def _complete_and_check(self) -> RunSpec:
        if self.parallel.zero is None:
            parallel = self.parallel.model_copy()
            # Not `update=`: a default must not count as stated, or an override of the framework would keep it.
            parallel.__dict__["zero"] = 3 if self.training.framework in _SHARDED_BY_DEFAULT else 0
            object.__setattr__(self, "parallel", parallel)
        check_modelled(self)
        _complete_sequence(self.workload)
        _check_division(self)
        self.dimensions()
        return self


def _config(workload: WorkloadSpec) -> ModelConfig | None:
    model = workload.model
    if isinstance(model, str):
        return named.load(model, "workload.model")
    if isinstance(model, ModelDimensions):
        return from_dimensions(model.model_dump(exclude_none=True), "workload.model")
    return None


def _complete_sequence(workload: WorkloadSpec) -> None:
    """Fills in the sequence length of images; refuses what the model's family does not have."""
    config = _config(workload)
    family = config.family if config is not None else "a module"
    for key, owner in (("masked_fraction", "bert"), ("decoder_seq_len", "t5")):
        if getattr(workload, key) is not None and family != owner:
            raise InputError(f"workload.{key}: {getattr(workload, key)} belongs to family {owner}, not to {family}")
    tokens = config.image_tokens if config is not None else _image_tokens(workload.model)
    if tokens and workload.seq_len not in (0, tokens):
        raise InputError(
            f"workload.seq_len: {workload.seq_len} contradicts the model's images of {tokens} tokens; leave it out"
        )
    if not workload.seq_len and not tokens:
        raise InputError("workload.seq_len: missing; it is the number of tokens per sequence")
    # Not a stated value: an override of the model derives it anew.
    workload.__dict__["seq_len"] = workload.seq_len or tokens


def _image_tokens(model: object) -> int:
    """Tokens of an image of Hugging Face's ViT, class token included; 0 for other models."""
    if not isinstance(model, HuggingFaceModel) or not model.huggingface.startswith("ViT"):
        return 0
    image, patch = (model.config.get(key, default) for key, default in (("image_size", 224), ("patch_size", 16)))
    if not isinstance(image, int) or not isinstance(patch, int) or patch < 1:
        return 0
    return (image // patch) ** 2 + 1


def _check_division(spec: RunSpec) -> None:
    """Devices into replicas and nodes, sequences into micro-batches, tokens over context; raises InputError."""
    devices, parallel, workload = spec.system.devices, spec.parallel, spec.workload
    ways = parallel.tensor * parallel.pipeline * parallel.context
    if devices % ways:
        product = f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context} = {ways}"
        raise InputError(f"system.devices: {devices} must be a multiple of {product}")
    per_node = spec.system.devices_per_node
    if devices % per_node and devices > per_node:
        raise InputError(f"system.devices: {devices} must be a multiple of system.devices_per_node {per_node}")
    _check_domain(spec)
    _check_reliability(spec)
    replicas = spec.data_parallel
    together = workload.micro_batch * replicas
    if workload.global_batch % together:
        below = workload.global_batch // together * together
        nearest = f"{below} or {below + together}" if below else f"{together}"
        raise InputError(
            f"workload.global_batch: {workload.global_batch} must be a multiple of micro_batch {workload.micro_batch} "
            f"x {replicas} data-parallel replicas = {together}, for example {nearest}"
        )
    if workload.seq_len % parallel.context:
        raise InputError(
            f"workload.seq_len: {workload.seq_len} must be a multiple of parallel.context {parallel.context}"
        )


def _check_domain(spec: RunSpec) -> None:
    """A fast fabric joins a part of every node, or whole nodes; raises InputError."""
    system = spec.system
    domain, devices, per_node = system.nvlink_domain, system.devices, system.devices_per_node
    if domain is None or domain >= devices:
        return
    if (per_node % domain and domain % per_node) or devices % domain:
        raise InputError(
            f"system.nvlink_domain: {domain} must divide devices_per_node {per_node}, or be a multiple of it "
            f"that divides devices {devices}"
        )


def _check_reliability(spec: RunSpec) -> None:
    """What is sharded is replicated, a slow device is of a rank that there is, failures are of a whole run."""
    slow, stages = spec.system.variation.slow_device, spec.parallel.pipeline
    if slow is not None and slow.pipeline_rank >= stages:
        raise InputError(
            f"system.variation.slow_device.pipeline_rank: {slow.pipeline_rank} must be below parallel.pipeline {stages}"
        )
    parallel = spec.parallel
    if parallel.hybrid_shard and (parallel.zero == 0 or parallel.expert * parallel.expert_tensor > 1):
        raise InputError(
            "parallel.hybrid_shard: is of parallel.zero 1 to 3 without experts that are divided; leave it out"
        )
    if spec.system.failures is not None and spec.workload.tokens is None:
        raise InputError("system.failures: says what a whole run loses; give workload.tokens, or leave it out")


def _beside(data: object, folder: Path) -> object:
    """`data` with the file of an accelerator found in `folder`, where the run file is."""
    if not isinstance(data, dict) or not isinstance(data.get("system"), dict):
        return data
    system = dict(data["system"])
    accelerator = system.get("accelerator")
    if isinstance(accelerator, str):
        system["accelerator"] = _file_in(accelerator, folder)
    elif isinstance(accelerator, dict) and isinstance(accelerator.get("base"), str):
        system["accelerator"] = accelerator | {"base": _file_in(accelerator["base"], folder)}
    return data | {"system": system}


def _file_in(name: str, folder: Path) -> str:
    if not name.endswith((".yaml", ".yml")) or "\0" in name or len(name) > 200:
        return name
    return str(folder / name) if (folder / name).is_file() else name


def _overridden(data: dict[str, Any], override: str) -> dict[str, Any]:
    """`data` with one `a.b=c` put in, `c` read as YAML; under `system.accelerator.set` the rest is one key."""
    where = f"--set {short(override)}"
    path, equals, text = override.partition("=")
    keys = [key.strip() for key in path.split(".")]
    if not equals or not all(keys):
        raise InputError(f"{where}: must be written like training.precision=bf16")
    if keys[:3] == ["system", "accelerator", "set"] and len(keys) > 3:
        keys = [*keys[:3], ".".join(keys[3:])]
    value = load_yaml(text, where)
    result = dict(data)
    section = result
    for i, key in enumerate(keys[:-1]):
        inner = section.get(key)
        if keys[: i + 1] == ["system", "accelerator"] and isinstance(inner, str):
            inner = {"base": inner}
        if inner is not None and not isinstance(inner, Mapping):
            raise InputError(f"{where}: {'.'.join(keys[: i + 1])} is {short(inner, quote=True)}, which has no keys")
        section[key] = dict(inner or {})
        section = section[key]
    section[keys[-1]] = value
    return result
