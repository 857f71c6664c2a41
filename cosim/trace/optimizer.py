"""The last phase of a traced step: gradients are cast, unscaled and clipped, parameters updated by a real optimizer.

Each optimizer runs with its customary settings, which decide what it computes: momentum 0.9 for sgd, no momentum for
rmsprop, Muon for hidden matrices and AdamW for everything else. Learning rates change no work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from cosim.trace.assemble import Roles
from cosim.trace.options import TraceOptions
from cosim.trace.recorder import HostNumbers, Recorder
from hwmodels.units import InputError
from workloads.optimizers import Lamb, Lion, hidden_matrices

DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_OPTIMIZERS: Mapping[str, Any] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": lambda parameters, **switches: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, **switches),
    "lion": lambda parameters, **switches: Lion(parameters, weight_decay=0.1, **switches),
    "lamb": Lamb,
    "adafactor": torch.optim.Adafactor,
    "muon": torch.optim.AdamW,  # of what Muon does not take
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
    "adamax": torch.optim.Adamax,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
}


class OptimizerStep:
    """An optimizer in its steady state: its state exists before the step, and masters where their format differs.

    Parameters of which backward makes no gradient have a master, and no state.
    """

    def __init__(self, module: nn.Module, options: TraceOptions) -> None:
        self.options = options
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        if not self.parameters:
            raise InputError("model: it has no trainable parameters, so there is no training step")
        self.masters: list[Tensor] = []
        if options.separate_masters:
            master_dtype = DTYPES[str(options.master_format)]
            self.masters = [torch.empty_like(p, dtype=master_dtype).requires_grad_() for p in self.parameters]
        self.updated: list[Tensor] = self.masters or list[Tensor](self.parameters)
        self.scale = torch.empty((), dtype=torch.float32) if options.loss_scaling else None
        self.growth_tracker = torch.empty((), dtype=torch.int32)
        self.parts = self._parts(module)

    def fill_state(self) -> None:
        """Make the state of what has a gradient now, by a step that is not recorded."""
        for parameter, master in zip(self.parameters, self.masters, strict=False):
            master.grad = None if parameter.grad is None else torch.empty_like(master)
        for _, optimizer in self.parts:
            if isinstance(optimizer, torch.optim.Muon):  # a whole step of each would only make the momentum
                (parameter,) = optimizer.param_groups[0]["params"]
                if parameter.grad is not None:
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            else:
                with HostNumbers():  # type: ignore[no-untyped-call]
                    optimizer.step()
        for master in self.masters:
            master.grad = None

    def _parts(self, module: nn.Module) -> list[tuple[str, Any]]:
        """Optimizers in the order in which they step: one over many parameters (""), one per matrix (its name)."""
        matrices = hidden_matrices(module) if self.options.optimizer == "muon" else set()
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        pairs = list(zip(self.parameters, self.updated, strict=True))
        together = [updated for parameter, updated in pairs if parameter not in matrices]
        parts: list[tuple[str, Any]] = []
        if together:
            parts.append(("", _OPTIMIZERS[self.options.optimizer](together, **self._switches())))
        return parts + [
            (names[id(parameter)], torch.optim.Muon([updated])) for parameter, updated in pairs if parameter in matrices
        ]

    def _switches(self) -> dict[str, bool]:
        implementation = self.options.implementation
        switches = {"foreach": implementation == "foreach"}
        return {**switches, "fused": True} if implementation == "fused" else switches

    def state(self) -> list[Tensor]:
        """Moments and step counts."""
        return [
            value
            for _, optimizer in self.parts
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        ]

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss times the scale that keeps 16-bit gradients from vanishing (arXiv 1710.03740, section 3.2)."""
        return loss if self.scale is None else loss * self.scale

    def step(self, recorder: Recorder, roles: Roles) -> None:
        """Cast gradients, unscale, clip, update, copy masters back, drop gradients; fills the roles of gradients."""
        roles.gradients |= {recorder.storage_of(p.grad) for p in self.parameters if p.grad is not None}
        self._cast_gradients()
        roles.gradients |= {recorder.storage_of(p.grad) for p in self.updated if p.grad is not None}
        found_inf = self._unscale() if self.scale is not None else None
        if self.options.gradient_clipping:
            torch.nn.utils.clip_grad_norm_(self.updated, 1.0, foreach=self.options.implementation != "single")
        told: set[type] = set()  # optimizers that know whether to skip: all of Muon's matrices are one optimizer's
        for name, optimizer in self.parts:
            if all(parameter.grad is None for parameter in optimizer.param_groups[0]["params"]):
                continue
            with recorder.part(name) if name else nullcontext():
                if found_inf is not None and type(optimizer) not in told:
                    self._tell(optimizer, found_inf)
                told.add(type(optimizer))
                if name:
                    recorder.alike([*self._operands(optimizer)], optimizer.step)
                else:
                    optimizer.step()
        if self.masters:
            with torch.no_grad():
                torch._foreach_copy_(list[Tensor](self.parameters), self.masters)
        for _, optimizer in self.parts:
            optimizer.zero_grad(set_to_none=True)
        for parameter in self.parameters:
            parameter.grad = None
        if found_inf is not None:
            assert self.scale is not None
            torch._amp_update_scale_(self.scale, self.growth_tracker, found_inf, 2.0, 0.5, 2000)

    @staticmethod
    def _operands(optimizer: Any) -> Iterator[Tensor]:
        """The parameter of an optimizer of one matrix, its gradient and its state."""
        (parameter,) = optimizer.param_groups[0]["params"]
        yield parameter
        yield parameter.grad
        yield from optimizer.state[parameter].values()

    def _unscale(self) -> Tensor:
        """One pass over the gradients, as torch.amp.GradScaler.unscale_; returns whether one was infinite or NaN."""
        assert self.scale is not None
        found_inf = torch.zeros((), dtype=torch.float32)
        gradients = [p.grad for p in self.updated if p.grad is not None]
        inverse = self.scale.double().reciprocal().float()
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, found_inf, inverse)
        return found_inf

    @staticmethod
    def _tell(optimizer: Any, found_inf: Tensor) -> None:
        """As GradScaler.step: a fused optimizer reads on the device whether to skip, for others the host waits."""
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.grad_scale, optimizer.found_inf = None, found_inf
        else:
            found_inf.item()

    def _cast_gradients(self) -> None:
        """Gradients in the format in which they reach the optimizer, then in that of what it updates."""
        wanted = DTYPES[self.options.gradient_format] if self.options.gradient_format else None
        for parameter, updated in zip(self.parameters, self.updated, strict=True):
            gradient = parameter.grad
            if gradient is None:
                continue
            gradient = gradient.to(wanted) if wanted is not None else gradient
            gradient = gradient.to(updated.dtype)
            parameter.grad = None
            updated.grad = gradient
