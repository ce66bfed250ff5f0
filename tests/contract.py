"""What the contract tests share: each family's cases, prompts, and the slow path through the LLM."""

import copy
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import vlmzip
from vlmzip import VisionZip

NEW_TOKENS = 4
METHODS = [VisionZip(tokens=12), VisionZip(dominant=9, contextual=0), VisionZip(keep=0.3)]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def image(seed: int, width: int = 120, height: int = 96) -> Image.Image:
    """Noise over a gradient: no two patches are alike, no two images either."""
    rng = np.random.default_rng(seed)
    base = np.linspace(0, 120, width)[None, :, None] + np.linspace(0, 60, height)[:, None, None]
    noise = rng.integers(0, 75, (height, width, 3))
    return Image.fromarray((base + noise).astype(np.uint8))


@functools.cache
def built(family: str, variant: str) -> tuple[Any, Any]:
    model, processor = variants(family)[variant]()
    return model.eval(), processor


def slow_path(family: str) -> ModuleType:
    return importlib.import_module(f"slow.{family}")


def variants(family: str) -> dict[str, Callable[[], tuple[Any, Any]]]:
    slow = slow_path(family)
    if hasattr(slow, "builds"):
        found: dict[str, Callable[[], tuple[Any, Any]]] = slow.builds()
        return found
    from vlmzip.tiny.random import build

    return {"tiny": functools.partial(build, family)}


@dataclass
class Case:
    """One variant of one family, with a fresh model and processor."""

    slow: ModuleType
    model: Any
    processor: Any

    @property
    def images(self) -> list[Image.Image]:
        """Three images of different size."""
        if hasattr(self.slow, "images"):
            found: list[Image.Image] = self.slow.images()
            return found
        return [image(1), image(2, 70, 130), image(3, 180, 60)]

    @property
    def methods(self) -> list[Any]:
        return self.slow.methods() if hasattr(self.slow, "methods") else METHODS

    def prompt(self, images: int, text: str) -> str:
        if hasattr(self.slow, "prompt"):
            written: str = self.slow.prompt(self.processor, images, text)
            return written
        return "USER: " + f"{self.processor.image_token}\n" * images + text + " ASSISTANT:"

    def inputs(self, counts: list[int], side: str = "left", first: int = 0) -> dict[str, Any]:
        """A batch of prompts of different length, with `counts[i]` images in row i."""
        texts = [self.prompt(n, "what is it? " * (i + 1)) for i, n in enumerate(counts)]
        pictures = [self.images[(first + i) % 3] for i in range(sum(counts))]
        self.processor.tokenizer.padding_side = side
        if hasattr(self.slow, "process"):
            waiting = iter(pictures)
            rows = [[next(waiting) for _ in range(n)] for n in counts]
            return dict(self.slow.process(self.processor, texts, rows))
        return dict(
            self.processor(text=texts, images=pictures or None, padding=True, return_tensors="pt")
        )

    def features(self, inputs: dict[str, Any], method: Any) -> list[Tensor]:
        found: list[Tensor] = self.slow.features(self.model, inputs, method)
        return found

    def logits(self, inputs: dict[str, Any], features: list[Tensor], method: Any) -> Tensor:
        """[B, T, V] by the slow path; the model must not be compressed."""
        assert "_vlmzip" not in vars(self.model.base_model)
        if hasattr(self.slow, "logits"):
            found: Tensor = self.slow.logits(self.model, inputs, features, method)
            return found
        positions = None
        if hasattr(self.slow, "positions"):
            positions = self.slow.positions(self.model, inputs, method)
        return embedded_logits(self.model, inputs, features, positions)

    def greedy(self, inputs: dict[str, Any], method: Any, steps: int = NEW_TOKENS) -> list[Tensor]:
        """Logits [B, V] of each greedy step, every step from scratch; no row ends early."""
        with torch.no_grad():
            features = self.features(inputs, method)
            grown, found = dict(inputs), []
            for _ in range(steps):
                found.append(self.logits(grown, features, method)[:, -1].float())
                grown = self.grown(grown, self.choose(found[-1]))
        return found

    def grown(self, inputs: dict[str, Any], tokens: Tensor) -> dict[str, Any]:
        """`inputs` with an answer's tokens [B, t] at the end of every row."""
        return with_tokens(inputs, tokens, getattr(self.slow, "ANSWER_TYPE", 0))

    def choose(self, logits: Tensor) -> Tensor:
        """The greedy token [B, 1], never an end of text."""
        logits = logits.clone()
        logits[:, self.ends] = -torch.inf
        return logits.argmax(-1, keepdim=True)

    @property
    def ends(self) -> list[int]:
        ends = self.model.generation_config.eos_token_id
        return ends if isinstance(ends, list) else [] if ends is None else [ends]

    def generate(self, inputs: dict[str, Any], **kwargs: Any) -> Any:
        return self.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            return_dict_in_generate=True,
            output_logits=True,
            **kwargs,
        )

    def assert_generates(self, out: Any, expected: list[Tensor]) -> None:
        """generate()'s output has the slow path's logits, and its tokens."""
        for fast, slow in zip(out.logits, expected, strict=True):
            torch.testing.assert_close(fast.float(), slow, **TOLERANCE)
        tokens = torch.cat([self.choose(slow) for slow in expected], 1)
        assert torch.equal(out.sequences[:, -len(expected) :], tokens)


def fresh(family: str, variant: str) -> Case:
    model, processor = built(family, variant)
    return Case(slow_path(family), copy.deepcopy(model), copy.deepcopy(processor))


def with_tokens(inputs: dict[str, Any], tokens: Tensor, kind: int = 0) -> dict[str, Any]:
    """`inputs` with text tokens [B, t], all of one type, at the end of every row."""
    grown = dict(inputs)
    grown["input_ids"] = torch.cat([inputs["input_ids"], tokens], 1)
    ones = torch.ones_like(tokens)
    grown["attention_mask"] = torch.cat([inputs["attention_mask"], ones], 1)
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            grown[name] = torch.cat([inputs[name], ones * kind], 1)
    return grown


def embedded_logits(
    model: Any, inputs: dict[str, Any], features: list[Tensor], positions: Tensor | None = None
) -> Tensor:
    """[B, T, V]: features put into the prompt's embeddings by hand, the stock LLM run on them."""
    mask = inputs["attention_mask"]
    embeds = embedded(model, inputs["input_ids"], features)
    if positions is None:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
    out = model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False)
    return out.logits


def embedded(model: Any, ids: Tensor, features: list[Tensor]) -> Tensor:
    """[B, T, D]: the prompt's embeddings, with features at its placeholders."""
    embeds = model.get_input_embeddings()(ids).clone()
    wanted = placeholders(model, ids)
    rows = torch.cat(features) if features else embeds[:0, 0]
    assert wanted.sum() == len(rows), f"{int(wanted.sum())} placeholders, {len(rows)} features"
    embeds[wanted] = rows.to(embeds.dtype)
    return embeds


def placeholders(model: Any, ids: Tensor) -> Tensor:
    """[B, T] bool: where image (or video) features go."""
    mask = ids == model.config.image_token_id
    video = getattr(model.config, "video_token_id", None)
    return mask if video is None else mask | (ids == video)


def cases() -> list[Any]:
    """A pytest parameter for each variant of each family that has a slow path."""
    found = []
    for name in vlmzip.families():
        if not (Path(__file__).parent / "slow" / f"{name}.py").exists():
            continue
        slow = slow_path(name)
        marks = [pytest.mark.needs_torchvision] if getattr(slow, "NEEDS_TORCHVISION", False) else []
        for variant in variants(name):
            found.append(pytest.param((name, variant), id=f"{name}-{variant}", marks=marks))
    return found
