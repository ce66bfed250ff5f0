"""The second stage: projector and LLM learn the questions on the frozen tower's features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import nn
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from .alignment import Alignment, whiten
from .dialogues import SILENT, DialogueBatch, DialogueWriter, images_per_prompt
from .labels import LabelledImages, keep, scene_of
from .muon import adam, optimisers
from .recipe import Recipe
from .stage import run_stage
from .tower import FEATURE_LAYER, pixels

__all__ = ["answer_scores", "teach_questions", "tower_features"]


def teach_questions(
    model: LlavaForConditionalGeneration,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    rendered: LabelledImages,
    stop_after: int | None,
) -> None:
    """Teach a model whose tower is finished; rendered are the images of the train split."""
    features_file = folder / "features.npy"  # the tower is finished: they stay what they are
    if not features_file.exists():
        keep(features_file, tower_features(model, rendered.images).numpy())
    features = torch.from_numpy(np.load(features_file))
    scenes = [scene_of("train", i) for i in range(recipe.lesson_images)]
    courses = [
        writer
        for steps, kinds in recipe.lesson_courses
        for writer in [DialogueWriter(tokenizer, kinds)] * steps
    ]
    everything, more_reading = DialogueWriter(tokenizer), DialogueWriter(tokenizer, recipe.sign_kinds)
    everywhere = np.arange(len(scenes))
    signs = np.flatnonzero([scene.sign is not None for scene in scenes])
    more_signs = np.concatenate([everywhere, signs])
    taught = nn.ModuleList([model.model.language_model, model.model.multi_modal_projector])

    align(model, tokenizer, features, rendered, recipe, folder)

    def loss_on(
        writer: DialogueWriter, pool: npt.NDArray[np.int64], rng: np.random.Generator, dialogues: float
    ) -> torch.Tensor:
        if dialogues and rng.random() < dialogues:
            per_prompt = images_per_prompt(rng)
            rows = max(2, recipe.lesson_batch // per_prompt)
            batch = writer.batch(scenes, pool[rng.integers(len(pool), size=(rows, per_prompt))], rng)
        else:
            chosen = pool[rng.integers(len(pool), size=recipe.lesson_batch)]
            batch = writer.side_by_side(scenes, chosen, rng)
        seen = features[torch.from_numpy(batch.images).flatten()].float()
        return F.cross_entropy(*answer_scores(model, batch, seen))

    def lesson_at(step: int) -> torch.Tensor:
        rng = np.random.default_rng([recipe.seed, 20, step])
        if step < len(courses):
            return loss_on(courses[step], everywhere, rng, 0.0)
        return loss_on(everything, everywhere, rng, recipe.lesson_dialogues)

    def sign_at(step: int) -> torch.Tensor:
        rng = np.random.default_rng([recipe.seed, 21, step])
        return loss_on(more_reading, more_signs, rng, recipe.lesson_dialogues)

    stages = (("questions", recipe.lesson_steps, lesson_at), ("signs", recipe.sign_steps, sign_at))
    for stage, steps, loss_at in stages:
        fresh = optimisers(model.model.language_model.layers, taught, *recipe.lesson_rates)
        if not run_stage(
            stage, taught, fresh, steps, loss_at, folder,
            check=dict, every=recipe.check_every, stop_after=stop_after,
        ):  # fmt: skip
            return


def align(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    features: torch.Tensor,
    rendered: LabelledImages,
    recipe: Recipe,
    folder: Path,
) -> None:
    """Its first part: the projector and the word embeddings."""
    alignment = Alignment(model.model.multi_modal_projector, model.get_input_embeddings(), tokenizer)
    whiten(alignment.projector, features)

    def loss_at(step: int) -> torch.Tensor:
        rows = np.random.default_rng([recipe.seed, 12, step]).choice(
            len(features), recipe.alignment_batch, replace=False
        )
        labels = torch.from_numpy(rendered.labels[np.sort(rows)])
        return alignment.loss(features[torch.from_numpy(np.sort(rows))].float(), labels)

    run_stage(
        "alignment", alignment,
        (adam(alignment.parameters(), recipe.alignment_rate),),
        recipe.alignment_steps, loss_at, folder, check=dict, every=recipe.check_every,
    )  # fmt: skip


@torch.no_grad()
def tower_features(model: LlavaForConditionalGeneration, images: npt.NDArray[np.uint8]) -> torch.Tensor:
    """Layer -2 of the tower for uint8 images [n, 96, 96, 3]: [n, 144, D] float16, patches only."""
    tower = model.model.vision_tower.eval()
    first = 1 if model.config.vision_feature_select_strategy == "default" else 0
    parts = []
    for start in track(range(0, len(images), 50), description="features"):
        batch = torch.from_numpy(images[start : start + 50])
        seen = tower(pixels(batch), output_hidden_states=True).hidden_states[FEATURE_LAYER]
        parts.append(seen[:, first:].half())
    return torch.cat(parts)


def answer_scores(
    model: LlavaForConditionalGeneration, batch: DialogueBatch, features: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and targets at the answers only; features [images, 144, D] in prompt order."""
    embeddings = model.get_input_embeddings()(batch.input_ids)
    here = (batch.input_ids == model.config.image_token_id)[..., None]
    embeddings = embeddings.masked_scatter(here, model.model.multi_modal_projector(features))
    hidden = model.model.language_model(
        inputs_embeds=embeddings,
        attention_mask=batch.mask,
        position_ids=batch.position_ids,
        use_cache=False,
    ).last_hidden_state
    wanted = batch.labels[:, 1:]
    known = wanted != SILENT
    return model.lm_head(hidden[:, :-1][known]), wanted[known]
