"""Optimizers that torch.optim lacks, as plain torch.optim.Optimizer subclasses with a loop and a foreach form.

    Lion    sign of an interpolated momentum: one state (Chen et al. 2023, arXiv 2302.06675)
    Lamb    Adam's update scaled per tensor by |w| / |update|: two states (You et al. 2020, arXiv 1904.00962)

Lion also has a fused form, `cosim::fused_lion_`: one pass that reads gradients and reads and writes parameters and
momenta, as the fused kernels of lion-pytorch (Triton) and DeepSpeed (FusedLion) do. `hidden_matrices` is how users of
torch.optim.Muon divide parameters between it and AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Lion(Optimizer):
    """p <- p (1 - lr wd) - lr sign(b1 m + (1 - b1) g);  m <- b2 m + (1 - b2) g.

    Chen et al. 2023, arXiv 2302.06675; betas are the paper's. `foreach` runs each pass over all parameters at once,
    `fused` all passes in one kernel.
    """

    def __init__(
        self,
        parameters: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        foreach: bool = False,
        fused: bool = False,
    ) -> None:
        chosen = {"foreach": foreach, "fused": fused}
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay, **chosen})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; `closure` is not supported."""
        _no_closure(closure)
        for group in self.param_groups:
            parameters, gradients = _with_gradients(group)
            moments = self._moments(parameters)
            (beta1, beta2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
            if group["fused"] and parameters:
                fused_lion_(parameters, gradients, moments, lr, beta1, beta2, decay)
            elif group["foreach"] and parameters:
                updates = torch._foreach_lerp(moments, gradients, 1 - beta1)
                torch._foreach_sign_(updates)
                if decay:
                    torch._foreach_mul_(parameters, 1 - lr * decay)
                torch._foreach_add_(parameters, updates, alpha=-lr)
                del updates
                torch._foreach_lerp_(moments, gradients, 1 - beta2)
            else:
                for parameter, gradient, moment in zip(parameters, gradients, moments, strict=True):
                    _lion(parameter, gradient, moment, lr, beta1, beta2, decay)

    def _moments(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
        return [self.state[parameter]["exp_avg"] for parameter in parameters]


def _lion(p: Tensor, gradient: Tensor, moment: Tensor, lr: float, beta1: float, beta2: float, decay: float) -> None:
    update = moment.lerp(gradient, 1 - beta1).sign_()
    if decay:
        p.mul_(1 - lr * decay)
    p.add_(update, alpha=-lr)
    moment.lerp_(gradient, 1 - beta2)


@torch.library.custom_op("cosim::fused_lion_", mutates_args=("params", "exp_avgs"))
def fused_lion_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
) -> None:
    """Lion's whole update of all parameters; the plain form of a kernel that passes once over memory."""
    for p, gradient, moment in zip(params, grads, exp_avgs, strict=True):
        _lion(p, gradient, moment, lr, beta1, beta2, weight_decay)


@fused_lion_.register_fake
def _(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
) -> None:
    return None


class Lamb(Optimizer):
    """u = m^ / (sqrt(v^) + eps) + wd p;  p <- p - lr (|p| / |u|) u, the ratio 1 where a norm is 0.

    You et al. 2020, arXiv 1904.00962, with phi(z) = z; m^ and v^ are Adam's bias-corrected moments.
    """

    def __init__(
        self,
        parameters: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        foreach: bool = False,
    ) -> None:
        super().__init__(
            parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "foreach": foreach}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; `closure` is not supported."""
        _no_closure(closure)
        for group in self.param_groups:
            parameters, gradients = _with_gradients(group)
            if not parameters:
                continue
            for parameter in parameters:
                self._initialise(parameter)
            group["step"] = group.get("step", 0) + 1
            if group["foreach"]:
                self._all_at_once(group, parameters, gradients)
            else:
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    self._one(group, parameter, gradient)

    def _initialise(self, parameter: Tensor) -> None:
        if not self.state[parameter]:
            self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
            self.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter)

    def _one(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor) -> None:
        state, (beta1, beta2), step = self.state[parameter], group["betas"], group["step"]
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        update = state["exp_avg_sq"].sqrt().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
        update = (state["exp_avg"] / (1 - beta1**step)).div_(update)
        update.add_(parameter, alpha=group["weight_decay"])
        update.mul_(_trust(torch.linalg.vector_norm(parameter), torch.linalg.vector_norm(update)))
        parameter.add_(update, alpha=-group["lr"])

    def _all_at_once(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        (beta1, beta2), step = group["betas"], group["step"]
        first = [self.state[parameter]["exp_avg"] for parameter in parameters]
        second = [self.state[parameter]["exp_avg_sq"] for parameter in parameters]
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        denominators = torch._foreach_sqrt(second)
        torch._foreach_div_(denominators, (1 - beta2**step) ** 0.5)
        torch._foreach_add_(denominators, group["eps"])
        updates = torch._foreach_div(first, 1 - beta1**step)
        torch._foreach_div_(updates, denominators)
        del denominators
        torch._foreach_add_(updates, parameters, alpha=group["weight_decay"])
        norms = torch.stack(torch._foreach_norm(parameters)), torch.stack(torch._foreach_norm(updates))
        torch._foreach_mul_(updates, list(_trust(*norms).unbind()))
        torch._foreach_add_(parameters, updates, alpha=-group["lr"])


def _trust(weight_norm: Tensor, update_norm: Tensor) -> Tensor:
    """|w| / |u| where neither is 0, else 1."""
    both = (weight_norm > 0) & (update_norm > 0)
    return torch.where(both, weight_norm / update_norm, torch.ones_like(weight_norm))


def hidden_matrices(module: nn.Module) -> set[nn.Parameter]:
    """The parameters that Muon orthogonalises: matrices, without embeddings and output layers.

    An output layer has as many rows as the largest table of embeddings. Everything else is AdamW's (Jordan et al.
    2024, kellerjordan.github.io/posts/muon; torch.optim.Muon takes two-dimensional parameters only).
    """
    tables = [child.weight for child in module.modules() if isinstance(child, nn.Embedding)]
    vocabulary = max((table.shape[0] for table in tables), default=None)
    held = {id(table) for table in tables}
    return {
        parameter
        for parameter in module.parameters()
        if parameter.dim() == 2 and id(parameter) not in held and parameter.shape[0] != vocabulary
    }


def _with_gradients(group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
    return parameters, [parameter.grad for parameter in parameters]


def _no_closure(closure: object) -> None:
    if closure is not None:
        raise ValueError("this optimizer takes no closure")
