"""One checkpoint on both sides: transformers, compressed by this package, and a vLLM engine."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlmzip import compress
from vlmzip.methods import Method
from vlmzip.tiny.checkpoint import save_checkpoint
from vlmzip.tiny.random import build

NEW_TOKENS = 6
TOLERANCE = 1e-3  # of summed log-probabilities, float32


def picture(seed: int, width: int = 120, height: int = 96) -> Image.Image:
    """Coloured blocks under noise: no two patches are alike, no two pictures either."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 200, (6, 6, 3)).astype(np.uint8)
    large = np.asarray(Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST))
    return Image.fromarray(large + rng.integers(0, 55, large.shape, dtype=np.uint8))


@dataclass(frozen=True)
class Ask:
    """One request."""

    text: str
    images: list[Image.Image] = field(default_factory=list)
    visual_tokens: int | None = None

    @property
    def prompt(self) -> str:
        return "USER: " + "<image>\n" * len(self.images) + self.text + " ASSISTANT:"

    def for_vllm(self) -> dict[str, Any]:
        request: dict[str, Any] = {"prompt": self.prompt}
        if self.images:
            request["multi_modal_data"] = {"image": self.images}
        if self.visual_tokens is not None:
            request["mm_processor_kwargs"] = {"visual_tokens": self.visual_tokens}
        return request


@dataclass(frozen=True)
class Answer:
    """What either side said: the prompt's tokens, the greedy answer's, their log-probabilities' sum."""

    prompt: list[int]
    tokens: list[int]
    logprob: float
    cached: int = 0

    def agrees(self, other: "Answer") -> bool:
        same = self.prompt == other.prompt and self.tokens == other.tokens
        return same and abs(self.logprob - other.logprob) < TOLERANCE


def write_checkpoint(model: Any, processor: Any, folder: Path) -> None:
    """Save a random model, its weights made larger: as they come they say little about an image."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(5)
    save_checkpoint(model, processor, folder)


def random_checkpoint(family: str, folder: Path) -> Path:
    """The folder, with a tiny random model of the family in it."""
    write_checkpoint(*build(family), folder)
    return folder


class Reference:
    """The transformers side. Each answer is generated alone, by a freshly compressed model."""

    def __init__(self, folder: Path, method: Method | None) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.model.generation_config.eos_token_id = None
        self.processor = AutoProcessor.from_pretrained(folder)
        self.method = method

    def answer(self, ask: Ask, method: Method | None = None) -> Answer:
        method = method or self.method
        if method is None:
            return self._generate(ask)
        if ask.visual_tokens is not None:
            method = method.with_tokens(ask.visual_tokens)
        with compress(self.model, self.processor, method):
            return self._generate(ask)

    def _generate(self, ask: Ask) -> Answer:
        inputs = self.processor(text=ask.prompt, images=ask.images or None, return_tensors="pt")
        out = self.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens = out.sequences[0, inputs["input_ids"].shape[1] :]
        logprobs = torch.cat(out.logits).log_softmax(-1).gather(1, tokens[:, None])
        return Answer(inputs["input_ids"][0].tolist(), tokens.tolist(), float(logprobs.sum()))


class Engine:
    """A vLLM engine in this process, asked greedily."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    def answers(self, asks: list[Ask], new_tokens: int = NEW_TOKENS, **options: Any) -> list[Answer]:
        """One generate() call: the requests run as a batch."""
        return self.generate([ask.for_vllm() for ask in asks], new_tokens, **options)

    def generate(self, requests: list[Any], new_tokens: int = NEW_TOKENS, **options: Any) -> list[Answer]:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, logprobs=0)
        outs = self.llm.generate(requests, params, use_tqdm=False, **options)
        return [
            Answer(
                list(out.prompt_token_ids),
                list(out.outputs[0].token_ids),
                out.outputs[0].cumulative_logprob,
                out.num_cached_tokens or 0,
            )
            for out in outs
        ]

    def forget(self) -> None:
        """Empty the caches of processed images, encoded images and prefixes."""
        self.llm.llm_engine.reset_mm_cache()
        self.llm.llm_engine.reset_encoder_cache()
        assert self.llm.llm_engine.reset_prefix_cache()

    @property
    def runner(self) -> Any:
        core = self.llm.llm_engine.engine_core.engine_core
        return core.model_executor.driver_worker.worker.model_runner

    @property
    def model(self) -> Any:
        return self.runner.model


@contextmanager
def engine(**options: Any) -> Iterator[Engine]:
    """Start an engine in this process; it is gone afterwards."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 1024,
        "max_num_seqs": 16,
        "limit_mm_per_prompt": {"image": 20},
        "block_size": 32,
        "distributed_executor_backend": "uni",
        "seed": 0,
    }
    llm = None
    try:
        llm = LLM(**(defaults | options))
        yield Engine(llm)
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
        del os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"]
