"""Second stage of tiny-siglip, first part: it takes over tiny-llava's language model.

As real VLMs with different towers start from one pretrained language model. What its patches have to look
like the projector learns from tiny-llava's, which sees the same images on the same grid.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from .alignment import whiten
from .checkpoint import build_model
from .muon import adam
from .recipe import Recipe
from .stage import run_stage

__all__ = ["TEACHER", "take_over"]

TEACHER = "tiny-llava"


def take_over(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    features: torch.Tensor,
    recipe: Recipe,
    folder: Path,
) -> None:
    """Copy the language model of the finished run beside folder, and fit model's projector to it.

    features [n, 144, D] are those of the train split. Raises FileNotFoundError if the other model is
    not trained yet.
    """
    teacher, seen = _teacher(tokenizer, folder.with_name(TEACHER), recipe)
    model.model.language_model.load_state_dict(teacher.model.language_model.state_dict())
    projector = model.model.multi_modal_projector
    whiten(projector, features)

    def loss_at(step: int) -> torch.Tensor:
        rng = np.random.default_rng([recipe.seed, 13, step])
        rows = torch.from_numpy(rng.choice(len(features), recipe.imitation_batch, replace=False))
        with torch.no_grad():
            wanted: torch.Tensor = teacher.model.multi_modal_projector(seen[rows].float())
        given: torch.Tensor = projector(features[rows].float())
        return (given - wanted).square().mean() / wanted.var()

    run_stage(
        "imitation", projector,
        (adam(projector.parameters(), recipe.imitation_rate),),
        recipe.imitation_steps, loss_at, folder, check=dict, every=recipe.check_every,
    )  # fmt: skip


def _teacher(
    tokenizer: PreTrainedTokenizerFast, folder: Path, recipe: Recipe
) -> tuple[LlavaForConditionalGeneration, torch.Tensor]:
    """The trained model, but for its tower, and what that sees of the train split."""
    file = folder / "signs.pt"
    state: dict[str, Any] = torch.load(file, weights_only=True) if file.exists() else {"step": 0}
    if state["step"] < recipe.sign_steps:
        raise FileNotFoundError(
            f"{folder} holds no finished training of {TEACHER}, whose language model this one takes "
            f"over; train {TEACHER} first"
        )
    model = build_model(TEACHER, tokenizer).requires_grad_(False)
    taught = nn.ModuleList([model.model.language_model, model.model.multi_modal_projector])
    taught.load_state_dict(state["module"])
    return model, torch.from_numpy(np.load(folder / "features.npy"))
