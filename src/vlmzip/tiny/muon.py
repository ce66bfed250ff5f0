"""The optimiser of the recipe: Muon for the matrices of the blocks, AdamW for everything else.

torch.optim.Muon iterates in bfloat16, which CPUs emulate (17 times slower here), and one matrix at
a time; this one iterates in float32 on all matrices of a shape at once. Method: Jordan et al.,
"Muon: an optimizer for hidden layers in neural networks" (2024).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

__all__ = ["Muon", "adam", "optimisers", "set_rate"]


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal; the rate is on the scale of AdamW's."""

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Update every parameter that has a gradient; the closure is not called."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for shape, params in by_shape.items():
                updates = orthogonal(torch.stack([self._momentum(p, group["momentum"]) for p in params]))
                scale = 0.2 * max(shape) ** 0.5  # the size of a typical AdamW update
                for p, update in zip(params, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["decay"]).add_(update, alpha=-group["lr"] * scale)
        return None

    def _momentum(self, p: nn.Parameter, beta: float) -> torch.Tensor:
        state = self.state[p]
        if "buffer" not in state:
            state["buffer"] = torch.zeros_like(p)
        grad = p.grad
        assert grad is not None
        state["buffer"].lerp_(grad, 1 - beta)
        return grad.lerp(state["buffer"], beta)


def orthogonal(matrices_NRC: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest (half-)orthogonal matrices, roughly: five quintic Newton-Schulz steps."""
    x: torch.Tensor = matrices_NRC / (matrices_NRC.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


def optimisers(
    blocks: nn.Module, everything: nn.Module, muon_rate: float, adam_rate: float
) -> tuple[torch.optim.Optimizer, ...]:
    """Muon over the matrices inside blocks, AdamW over the rest of everything that is trained."""
    matrices = [p for p in blocks.parameters() if p.ndim == 2 and p.requires_grad]
    taken = {id(p) for p in matrices}
    rest = [p for p in everything.parameters() if p.requires_grad and id(p) not in taken]
    muon = Muon(matrices, muon_rate)
    _note_peak(muon)
    return muon, adam(rest, adam_rate)


def adam(parameters: Iterable[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    """AdamW as the recipe uses it."""
    optimiser = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    _note_peak(optimiser)
    return optimiser


def _note_peak(optimiser: torch.optim.Optimizer) -> None:
    for group in optimiser.param_groups:
        group["peak"] = group["lr"]


def set_rate(optimiser: torch.optim.Optimizer, step: int, steps: int, warmup: int = 50) -> None:
    """Linear warm-up, then flat, then linear to zero over the last half."""
    share = min(1.0, (step + 1) / warmup, 2.0 * (steps - step) / steps)
    for group in optimiser.param_groups:
        group["lr"] = group["peak"] * share
