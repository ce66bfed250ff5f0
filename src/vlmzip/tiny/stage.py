"""A stage of training: steps that can be stopped at any time and taken up again."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import nn

from .muon import set_rate

__all__ = ["Log", "run_stage"]

_CLIP = 5.0
Figures = dict[str, Any]


class Log:
    """A file of JSON lines that training appends to."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file = file

    def write(self, figures: Figures) -> None:
        """Append one line, with the time of day in it."""
        stamp = time.strftime("%H:%M:%S")
        with self.file.open("a") as stream:
            stream.write(json.dumps({"time": stamp, **figures}) + "\n")


def run_stage(
    name: str,
    module: nn.Module,
    optimisers: tuple[torch.optim.Optimizer, ...],
    steps: int,
    loss_at: Callable[[int], torch.Tensor],
    folder: Path,
    *,
    check: Callable[[], Figures],
    every: int = 100,
    stop_after: int | None = None,
) -> bool:
    """Train module for steps, resuming from folder/<name>.pt if it is there; True when finished.

    loss_at(step) must depend on nothing but the step and the module, so that a run that was
    stopped gives what an unbroken one gives. check() is called every so many steps and its figures
    go to the log. stop_after ends the call early, after that many steps of this call.
    """
    file, log = folder / f"{name}.pt", Log(folder / "log.jsonl")
    first = _restore(file, module, optimisers)
    last = steps if stop_after is None else min(steps, first + stop_after)
    parameters = [p for group in _groups(optimisers) for p in group["params"]]
    started = time.monotonic()
    with Progress() as progress:
        bar = progress.add_task(name, total=steps, completed=first)
        for step in range(first, last):
            for optimiser in optimisers:
                set_rate(optimiser, step, steps)
                optimiser.zero_grad()
            loss = loss_at(step)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, _CLIP)
            for optimiser in optimisers:
                optimiser.step()
            progress.advance(bar)
            done = step + 1
            if done % every == 0 or done == last:
                seconds = round(time.monotonic() - started, 1)
                figures = {"stage": name, "step": done, "seconds": seconds, "loss": float(loss.detach())}
                log.write({**figures, **check()})
                _keep(file, done, module, optimisers)
    return last == steps


def _groups(optimisers: tuple[torch.optim.Optimizer, ...]) -> list[dict[str, Any]]:
    return [group for optimiser in optimisers for group in optimiser.param_groups]


def _keep(
    file: Path, step: int, module: nn.Module, optimisers: tuple[torch.optim.Optimizer, ...]
) -> None:
    state = {
        "step": step,
        "module": module.state_dict(),
        "optimisers": [optimiser.state_dict() for optimiser in optimisers],
    }
    partial = file.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, file)  # a run that is killed while it saves keeps its last checkpoint


def _restore(file: Path, module: nn.Module, optimisers: tuple[torch.optim.Optimizer, ...]) -> int:
    if not file.exists():
        return 0
    state = torch.load(file, weights_only=True)
    module.load_state_dict(state["module"])
    for optimiser, kept in zip(optimisers, state["optimisers"], strict=True):
        optimiser.load_state_dict(kept)
    return int(state["step"])
