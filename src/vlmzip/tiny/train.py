"""Train an embedded model from nothing: ``python -m vlmzip.tiny.train tiny-llava``.

Two stages, as the real ones: the tower learns images, then it is frozen and projector and LLM learn
questions on all of its patches (layer -2). Stopped runs go on where they were when called again.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
import typer
from rich.progress import Progress, track
from torch.nn.utils.rnn import pad_sequence
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from . import NAMES
from .accuracy import accuracy_table
from .checkpoint import build_model, build_processor, copy_tower, save_checkpoint
from .focus import focus
from .labels import HEADS, IGNORE, NUMBERS, PHRASES, LabelledImages, keep, rendered_split, scene_of
from .language import build_tokenizer
from .lessons import teach_questions
from .muon import optimisers
from .questions import caption
from .recipe import Recipe
from .regions import RegionLesson
from .scenes import SHAPES
from .stage import Figures, Log, run_stage
from .testset import exam_questions
from .tower import TowerLesson

__all__ = ["train"]


def train(
    name: str, recipe: Recipe, folder: Path, data: Path, *, stop_after: int | None = None
) -> LlavaForConditionalGeneration:
    """Train (or go on training) one model; checkpoints and the log go to folder, scenes to data.

    tiny-siglip takes over tiny-llava's language model, from a finished run in the folder "tiny-llava"
    beside its own, and raises FileNotFoundError if there is none. stop_after ends each longer stage of
    this call after so many steps; call again to go on. A folder that holds a run of another recipe
    raises ValueError.
    """
    tokenizer = build_tokenizer()
    lesson, learnt = train_tower(name, recipe, tokenizer, folder, data, stop_after)
    model = build_model(name, tokenizer)
    copy_tower(lesson.tower, model)
    if learnt:
        rendered = _rendered("train", recipe.lesson_images, data)
        teach_questions(name, model, recipe, tokenizer, folder, rendered, stop_after)
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
    _claim(folder, recipe)
    torch.manual_seed(recipe.seed)
    images = _rendered("pretraining", recipe.tower_images, data)
    held_out = _rendered("validation", 100, data)
    captions = _captions(tokenizer, recipe.tower_images, data)
    phrases = [tokenizer(text, add_special_tokens=False).input_ids for text in PHRASES]
    padded = pad_sequence([torch.tensor(ids) for ids in phrases], True, -1)
    lesson = TowerLesson(name, len(tokenizer), padded[:-NUMBERS])

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
    )  # fmt: skip
    if finished:
        regions = RegionLesson(lesson, padded)
        finished = run_stage(
            "regions", regions,
            optimisers(lesson.tower.encoder, regions, *recipe.region_rates),
            recipe.region_steps, lambda step: regions.loss(*sample(11, step)), folder,
            check=check, every=recipe.check_every, stop_after=stop_after,
        )  # fmt: skip
    return lesson.eval().requires_grad_(False), finished


def _claim(folder: Path, recipe: Recipe) -> None:
    """Note the recipe in the folder of a run, whose stages are not to be mixed with another's."""
    file, text = folder / "recipe.json", json.dumps(asdict(recipe), indent=1)
    noted = file.read_text() if file.exists() else None
    if noted != text and (noted is not None or any(folder.glob("*.pt"))):
        raise ValueError(f"{folder} holds a run of another recipe; delete it, or give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


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


def main(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(NAMES)}.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Where the finished checkpoint goes; checkpoint/ in RUN by default."),
    ] = None,
    run: Annotated[Path | None, typer.Option(help="Folder of the run; runs/NAME by default.")] = None,
    data: Annotated[Path, typer.Option(help="Folder of the rendered scenes.")] = Path("runs/data"),
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    tower_only: Annotated[
        bool, typer.Option("--tower-only", help="Stop when the tower is finished; writes no checkpoint.")
    ] = False,
) -> None:
    """Train one embedded model, measure it on the test set and write its checkpoint.

    tiny-siglip takes over tiny-llava's language model, whose run must be finished and lie beside its own.
    """
    if name not in NAMES:
        raise typer.BadParameter(f"{name!r} is not one of: {', '.join(NAMES)}")
    if tower_only and out is not None:
        raise typer.BadParameter("--tower-only writes no checkpoint; leave --out away")
    torch.set_num_threads(threads)
    folder = run or Path("runs") / name
    if tower_only:
        train_tower(name, Recipe(), build_tokenizer(), folder, data, None)
        return
    model = train(name, Recipe(), folder, data)
    processor = build_processor(name, build_tokenizer())
    save_checkpoint(model, processor, out or folder / "checkpoint")
    table = accuracy_table(model, processor, exam_questions())
    Log(folder / "log.jsonl").write({"stage": "test", **table})
    typer.echo(table)


if __name__ == "__main__":
    typer.run(main)
