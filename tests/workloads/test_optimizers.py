"""Lion and LAMB against their papers' formulas in numpy float64, in every form; and they train."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from workloads.optimizers import Lamb, Lion, hidden_matrices

SHAPES = ((6, 4), (5,))
LR, DECAY = 0.02, 0.1


def gradients(step: int) -> list[np.ndarray]:
    rng = np.random.default_rng(step)
    return [rng.normal(size=shape) for shape in SHAPES]


def lion(steps: int) -> list[np.ndarray]:
    """Chen et al. 2023, arXiv 2302.06675: program 1."""
    weights, moments = gradients(99), [np.zeros(shape) for shape in SHAPES]
    for step in range(steps):
        for i, g in enumerate(gradients(step)):
            update = np.sign(0.9 * moments[i] + 0.1 * g)
            moments[i] = 0.99 * moments[i] + 0.01 * g
            weights[i] = weights[i] - LR * (update + DECAY * weights[i])
    return weights


def lamb(steps: int) -> list[np.ndarray]:
    """You et al. 2020, arXiv 1904.00962: algorithm 2 with phi(z) = z."""
    weights = gradients(99)
    first, second = ([np.zeros(shape) for shape in SHAPES] for _ in range(2))
    for step in range(steps):
        for i, g in enumerate(gradients(step)):
            first[i] = 0.9 * first[i] + 0.1 * g
            second[i] = 0.999 * second[i] + 0.001 * g * g
            ratio = first[i] / (1 - 0.9 ** (step + 1)) / (np.sqrt(second[i] / (1 - 0.999 ** (step + 1))) + 1e-6)
            update = ratio + DECAY * weights[i]
            weights[i] = weights[i] - LR * np.linalg.norm(weights[i]) / np.linalg.norm(update) * update
    return weights


@pytest.mark.parametrize(
    ("optimizer", "form"),
    [(Lion, {}), (Lion, {"foreach": True}), (Lion, {"fused": True}), (Lamb, {}), (Lamb, {"foreach": True})],
)
def test_every_form_is_the_papers_update(optimizer: type, form: dict[str, bool]) -> None:
    parameters = [torch.tensor(weight, requires_grad=True) for weight in gradients(99)]
    made = optimizer(parameters, lr=LR, weight_decay=DECAY, **form)
    for step in range(4):
        for parameter, gradient in zip(parameters, gradients(step), strict=True):
            parameter.grad = torch.tensor(gradient)
        made.step()
    expected = lion(4) if optimizer is Lion else lamb(4)
    for parameter, weight in zip(parameters, expected, strict=True):
        np.testing.assert_allclose(parameter.detach().numpy(), weight, rtol=1e-12)


def test_lamb_leaves_a_weight_of_zeros_with_adams_step() -> None:
    """Where a norm is 0 the ratio is 1 (algorithm 2 is silent; the authors' code says so)."""
    parameter = torch.zeros(4, requires_grad=True)
    parameter.grad = torch.ones(4)
    Lamb([parameter], lr=LR, weight_decay=0.0).step()
    torch.testing.assert_close(parameter.detach(), torch.full((4,), -LR), rtol=1e-5, atol=0)


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(24, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 24)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        logits: Tensor = self.head(self.norm(x + self.down(torch.relu(self.up(x)))))
        return logits


def loss_after(make: object, steps: int = 60) -> tuple[float, float]:
    torch.manual_seed(0)
    model = Tiny()
    tokens = torch.randint(24, (64,))
    optimizers = make(model)  # type: ignore[operator]
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(tokens), (tokens * 5 + 1) % 24)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses[0], losses[-1]


def muon(model: nn.Module) -> list[torch.optim.Optimizer]:
    matrices = hidden_matrices(model)
    rest = [parameter for parameter in model.parameters() if parameter not in matrices]
    return [torch.optim.Muon(list(matrices), lr=0.02), torch.optim.AdamW(rest, lr=0.02)]


@pytest.mark.parametrize(
    "make",
    [
        lambda model: [Lion(model.parameters(), lr=0.01)],
        lambda model: [Lion(model.parameters(), lr=0.01, fused=True)],
        lambda model: [Lamb(model.parameters(), lr=0.05, foreach=True)],
        muon,
    ],
    ids=["lion", "fused lion", "lamb", "muon"],
)
def test_a_small_model_learns_with_it(make: object) -> None:
    first, last = loss_after(make)
    assert last < 0.5 * first


def test_muon_takes_hidden_matrices_and_leaves_tables_heads_and_vectors() -> None:
    model = Tiny()
    assert hidden_matrices(model) == {model.up.weight, model.down.weight}
