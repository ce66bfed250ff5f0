"""Train an embedded model from nothing: ``python -m vlmzip.tiny.train tiny-llava``.

Two stages, as the real ones: the tower learns images, then it is frozen and projector and LLM learn
questions on all of its patches (layer -2). Stopped runs go on where they were when called again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
import typer
from rich.progress import Progress, track
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from . import NAMES
from .accuracy import accuracy_table
from .alignment import Alignment, whiten
from .checkpoint import build_model, build_processor, copy_tower, save_checkpoint
from .dialogues import SILENT, DialogueBatch, DialogueWriter, images_per_prompt
from .focus import focus
from .labels import HEADS, IGNORE, PHRASES, LabelledImages, keep, rendered_split, scene_of
from .language import build_tokenizer
from .muon import adam, optimisers
from .questions import caption
from .regions import RegionLesson
from .scenes import SHAPES
from .stage import Figures, Log, run_stage
from .testset import exam_questions
from .tower import FEATURE_LAYER, TowerLesson, pixels

__all__ = ["Recipe", "train"]


@dataclass(frozen=True)
class Recipe:
    """Every number of the training."""

    tower_images: int = 30_000
    tower_steps: int = 1_800
    tower_batch: int = 24
    tower_rates: tuple[float, float] = (3e-3, 2e-3)  # Muon's and AdamW's
    region_steps: int = 600
    region_rates: tuple[float, float] = (2e-3, 1e-3)
    lesson_images: int = 12_000
    alignment_steps: int = 600
    alignment_batch: int = 32
    alignment_rate: float = 2e-3
    # Steps on a few kinds alone: looking an object up, then comparing places. The rest are on all.
    lesson_courses: tuple[tuple[int, tuple[str, ...]], ...] = (
        (1_000, ("colour", "shape", "existence")),
        (3_400, ("existence", "position", "relation")),
    )
    lesson_steps: int = 6_800
    lesson_batch: int = 6
    lesson_dialogues: float = 0.3  # share of steps on dialogues; the others have questions side by side
    lesson_rates: tuple[float, float] = (3e-3, 2e-3)
    check_every: int = 100
    seed: int = 0


def train(
    name: str, recipe: Recipe, folder: Path, data: Path, *, stop_after: int | None = None
) -> LlavaForConditionalGeneration:
    """Train (or go on training) one model; checkpoints and the log go to folder, scenes to data.

    stop_after ends each stage of this call after so many steps; call again to go on.
    """
    torch.manual_seed(recipe.seed)
    tokenizer = build_tokenizer()
    lesson, learnt = train_tower(name, recipe, tokenizer, folder, data, stop_after)
    model = build_model(name, tokenizer)
    copy_tower(lesson.tower, model)
    if learnt:
        teach_questions(model, recipe, tokenizer, folder, data, stop_after)
    return model.eval()


def train_tower(
    name: str,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    data: Path,
    stop_after: int | None,
) -> tuple[TowerLesson, bool]:
    """First stage, in two parts: the lesson, and whether it is finished."""
    images = _rendered("pretraining", recipe.tower_images, data)
    held_out = _rendered("validation", 100, data)
    captions = _captions(tokenizer, recipe.tower_images, data)
    phrases = [tokenizer(text, add_special_tokens=False).input_ids for text in PHRASES]
    padded = pad_sequence([torch.tensor(ids) for ids in phrases], True, -1)
    lesson = TowerLesson(name, len(tokenizer), padded)
    regions = RegionLesson(lesson)

    def sample(part: int, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rng = np.random.default_rng([recipe.seed, part, step])
        rows = np.sort(rng.choice(recipe.tower_images, recipe.tower_batch, replace=False))
        return (
            torch.from_numpy(images.images[rows]),
            torch.from_numpy(images.labels[rows]),
            torch.from_numpy(captions[rows]).long(),
        )

    def check() -> Figures:
        return {"patches": patch_accuracy(lesson, held_out), "focus": focus(lesson.tower, held_out)}

    finished = run_stage(
        "tower", lesson,
        optimisers(lesson.tower.encoder, lesson, *recipe.tower_rates),
        recipe.tower_steps, lambda step: lesson.total(lesson.losses(*sample(10, step))), folder,
        check=check, every=recipe.check_every, stop_after=stop_after,
    ) and run_stage(
        "regions", regions,
        optimisers(lesson.tower.encoder, regions, *recipe.region_rates),
        recipe.region_steps, lambda step: regions.loss(*sample(11, step)), folder,
        check=check, every=recipe.check_every, stop_after=stop_after,
    )  # fmt: skip
    return lesson.eval().requires_grad_(False), finished


def _rendered(split: str, count: int, data: Path) -> LabelledImages:
    with Progress() as progress:
        bar = progress.add_task(f"{split} scenes", total=count)
        return rendered_split(split, count, data, lambda done: progress.update(bar, completed=done))


@torch.no_grad()
def patch_accuracy(lesson: TowerLesson, held_out: LabelledImages, count: int = 100) -> Figures:
    """The share of held-out patches that every dense head labels rightly (kind: of shapes only)."""
    images = torch.from_numpy(held_out.images[:count].copy())
    labels = torch.from_numpy(held_out.labels[:count]).long()
    scores = torch.cat([lesson.patch_scores(part) for part in images.split(50)])
    result = {}
    for i, (head, score) in enumerate(zip(HEADS, scores.split(list(HEADS.values()), -1), strict=True)):
        target = labels[:, i]
        known = (target != IGNORE) & (target < (len(SHAPES) if head == "kind" else len(score[0, 0])))
        if known.any():
            result[head] = round(float((score.argmax(-1) == target)[known].float().mean()), 4)
    return result


def _captions(tokenizer: PreTrainedTokenizerFast, count: int, data: Path) -> npt.NDArray[np.int16]:
    file = data / f"captions-{count}.npy"
    if not file.exists():
        rows = np.full((count, 40), -1, np.int16)
        for i in track(range(count), description="captions"):
            text = caption(scene_of("pretraining", i), np.random.default_rng([9, i]))
            ids = tokenizer(text, add_special_tokens=False).input_ids
            rows[i, : len(ids)] = ids
        keep(file, rows)
    return np.asarray(np.load(file))


def teach_questions(
    model: LlavaForConditionalGeneration,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    data: Path,
    stop_after: int | None,
) -> None:
    """Second stage: projector and LLM on the frozen tower's features, which are computed once."""
    rendered = _rendered("train", recipe.lesson_images, data)
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
    everything = DialogueWriter(tokenizer)
    taught = nn.ModuleList([model.model.language_model, model.model.multi_modal_projector])

    align(model, tokenizer, features, rendered, recipe, folder)

    def loss_at(step: int) -> torch.Tensor:
        rng = np.random.default_rng([recipe.seed, 20, step])
        if step >= len(courses) and rng.random() < recipe.lesson_dialogues:
            per_prompt = images_per_prompt(rng)
            rows = max(2, recipe.lesson_batch // per_prompt)
            batch = everything.batch(scenes, rng.integers(len(scenes), size=(rows, per_prompt)), rng)
        else:
            writer = courses[step] if step < len(courses) else everything
            batch = writer.side_by_side(scenes, rng.integers(len(scenes), size=recipe.lesson_batch), rng)
        seen = features[torch.from_numpy(batch.images).flatten()].float()
        scores, wanted = answer_scores(model, batch, seen)
        return F.cross_entropy(scores, wanted)

    run_stage(
        "questions", taught,
        optimisers(model.model.language_model.layers, taught, *recipe.lesson_rates),
        recipe.lesson_steps, loss_at, folder, check=dict, every=recipe.check_every,
        stop_after=stop_after,
    )  # fmt: skip


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


def main(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(NAMES)}.")],
    out: Annotated[Path, typer.Option(help="Where the finished checkpoint goes.")],
    run: Annotated[Path | None, typer.Option(help="Folder of the run; runs/NAME by default.")] = None,
    data: Annotated[Path, typer.Option(help="Folder of the rendered scenes.")] = Path("runs/data"),
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
) -> None:
    """Train one embedded model, measure it on the test set and write its checkpoint."""
    if name not in NAMES:
        raise typer.BadParameter(f"{name!r} is not one of: {', '.join(NAMES)}")
    torch.set_num_threads(threads)
    folder = run or Path("runs") / name
    model = train(name, Recipe(), folder, data)
    processor = build_processor(name, build_tokenizer())
    save_checkpoint(model, processor, out)
    table = accuracy_table(model, processor, exam_questions())
    Log(folder / "log.jsonl").write({"stage": "test", **table})
    typer.echo(table)


if __name__ == "__main__":
    typer.run(main)
