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
from .takeover import TEACHER, take_over
from .tower import FEATURE_LAYER, pixels

__all__ = ["Lessons", "answer_scores", "teach_questions", "tower_features"]

_Rows = npt.NDArray[np.int64]


def teach_questions(
    name: str,
    model: LlavaForConditionalGeneration,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    rendered: LabelledImages,
    stop_after: int | None,
) -> None:
    """Teach the named model, whose tower is finished; rendered are the images of the train split."""
    features_file = folder / "features.npy"  # the tower is finished: they stay what they are
    if not features_file.exists():
        keep(features_file, tower_features(model, rendered.images).numpy())
    features = torch.from_numpy(np.load(features_file))
    lessons = Lessons(model, recipe, tokenizer, features)
    taught = nn.ModuleList([model.model.language_model, model.model.multi_modal_projector])
    stages = [("signs", recipe.sign_steps, lessons.sign_loss)]
    if name == TEACHER:
        align(model, tokenizer, features, rendered, recipe, folder)
        stages.insert(0, ("questions", recipe.lesson_steps, lessons.question_loss))
    else:
        take_over(model, tokenizer, features, recipe, folder)
    for stage, steps, loss_at in stages:
        fresh = optimisers(model.model.language_model.layers, taught, *recipe.lesson_rates)
        if not run_stage(
            stage, taught, fresh, steps, loss_at, folder,
            check=dict, every=recipe.check_every, stop_after=stop_after,
        ):  # fmt: skip
            return


class Lessons:
    """What the language model is asked, step by step. features are those of the train split."""

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerFast,
        features: torch.Tensor,
    ) -> None:
        self.model, self.recipe, self.features = model, recipe, features
        self.scenes = [scene_of("train", i) for i in range(len(features))]
        self.courses = [
            writer
            for steps, kinds in recipe.lesson_courses
            for writer in [DialogueWriter(tokenizer, kinds)] * steps
        ]
        self.all_kinds = DialogueWriter(tokenizer)
        self.more_reading = DialogueWriter(tokenizer, recipe.sign_kinds)
        signs = np.flatnonzero([scene.sign is not None for scene in self.scenes])
        self.everywhere = np.arange(len(features))
        self.more_signs = np.concatenate([self.everywhere, signs])

    def question_loss(self, step: int) -> torch.Tensor:
        """The courses, then all kinds."""
        rng = np.random.default_rng([self.recipe.seed, 20, step])
        if step < len(self.courses):
            return self._loss(self._singles(self.courses[step], self.everywhere, rng))
        return self._mixed(self.all_kinds, self.everywhere, rng)

    def sign_loss(self, step: int) -> torch.Tensor:
        """All kinds, with more about signs."""
        rng = np.random.default_rng([self.recipe.seed, 21, step])
        return self._mixed(self.more_reading, self.more_signs, rng)

    def _mixed(self, writer: DialogueWriter, pool: _Rows, rng: np.random.Generator) -> torch.Tensor:
        if rng.random() < self.recipe.lesson_dialogues:
            per_prompt = images_per_prompt(rng)
            rows = max(2, self.recipe.lesson_batch // per_prompt)
            batch = writer.batch(self.scenes, pool[rng.integers(len(pool), size=(rows, per_prompt))], rng)
        else:
            batch = self._singles(writer, pool, rng)
        return self._loss(writer.at_any_distance(batch, self.recipe.lesson_distance, rng))

    def _singles(self, writer: DialogueWriter, pool: _Rows, rng: np.random.Generator) -> DialogueBatch:
        chosen = pool[rng.integers(len(pool), size=self.recipe.lesson_batch)]
        return writer.side_by_side(self.scenes, chosen, rng)

    def _loss(self, batch: DialogueBatch) -> torch.Tensor:
        seen = self.features[torch.from_numpy(batch.images).flatten()].float()
        return F.cross_entropy(*answer_scores(self.model, batch, seen))


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
