"""Asking a model about an image: the prompt, the answer, and the time to the first token."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlmzip.compress import compress
from vlmzip.methods import Method


def prompt_for(processor: Any, question: str) -> str:
    """The prompt for one image: by the processor's chat template, else as LLaVA-1.5 wants it.

    PaliGemma, which has no chat template and was not trained on dialogues, gets the bare question.

    Raises:
        ValueError: The question is empty or holds the image placeholder itself.
    """
    if not question.strip():
        raise ValueError("the question is empty; ask something about the image")
    if processor.image_token in question:
        raise ValueError(
            f"the question holds the image placeholder {processor.image_token}; leave it out"
        )
    if type(processor).__name__ == "PaliGemmaProcessor":
        return f"{processor.image_token}{question}"
    if processor.chat_template is None:
        return f"USER: {processor.image_token}\n{question} ASSISTANT:"
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt: str = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    return prompt


def prepare(processor: Any, image: Image.Image, prompt: str, model: Any) -> Any:
    """The model's inputs, on its device, pixels in its dtype."""
    inputs = processor(
        images=[image],
        text=[prompt],
        return_tensors="pt",
        add_special_tokens=not _is_templated(processor, prompt),
    )
    return inputs.to(model.device, model.dtype)


def prepare_batch(
    processor: Any, images: Sequence[Image.Image], prompts: Sequence[str], model: Any
) -> Any:
    """The model's inputs for several prompts of one image each, shorter ones padded on the left."""
    inputs = processor(
        images=[[image] for image in images],
        text=list(prompts),
        return_tensors="pt",
        padding=True,
        padding_side="left",
        add_special_tokens=not _is_templated(processor, prompts[0]),
    )
    return inputs.to(model.device, model.dtype)


def _is_templated(processor: Any, prompt: str) -> bool:
    """Whether the prompt begins with the first token already; the tokenizer would add a second one."""
    bos = processor.tokenizer.bos_token
    return bos is not None and prompt.startswith(bos)


def check_length(model: Any, inputs: Any, max_new_tokens: int) -> None:
    """Refuse a prompt that does not fit the model's context together with its answer.

    Raises:
        ValueError: It does not fit.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    prompt = inputs["input_ids"].shape[1]
    if limit is not None and prompt + max_new_tokens > limit:
        raise ValueError(
            f"the prompt has {prompt} tokens and the answer may have {max_new_tokens}, more than the "
            f"model's context of {limit}; shorten the question or lower --max-new-tokens"
        )


@dataclass(frozen=True)
class Answer:
    """An answer, and what it took.

    Attributes:
        text: Greedy decoding, special tokens left out.
        new_tokens: Tokens that were generated.
        prompt_tokens: Tokens of the prompt, image tokens among them.
        image_tokens: Image tokens of the prompt.
    """

    text: str
    new_tokens: int
    prompt_tokens: int
    image_tokens: int


def generate(model: Any, processor: Any, inputs: Any, max_new_tokens: int) -> Answer:
    """Answer greedily.

    Raises:
        ValueError: The model gave NaN or infinite logits.
    """
    sequences = _greedy(model, inputs, max_new_tokens)
    prompt = inputs["input_ids"]
    new = sequences[0, prompt.shape[1] :]
    return Answer(
        text=processor.decode(new, skip_special_tokens=True).strip(),
        new_tokens=len(new),
        prompt_tokens=prompt.shape[1],
        image_tokens=int((prompt == model.config.image_token_id).sum()),
    )


def generate_batch(model: Any, processor: Any, inputs: Any, max_new_tokens: int) -> list[str]:
    """Answer several prompts greedily.

    Raises:
        ValueError: The model gave NaN or infinite logits.
    """
    new = _greedy(model, inputs, max_new_tokens)[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def _greedy(model: Any, inputs: Any, max_new_tokens: int) -> Tensor:
    out = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    if not all(logits.isfinite().all() for logits in out.logits):
        raise ValueError("the model gave NaN or infinite logits; check its weights and --dtype")
    sequences: Tensor = out.sequences
    return sequences


def time_first_token(model: Any, inputs: Any) -> float:
    """Milliseconds from the processor's output to the first token: vision tower and LLM prefill."""
    _wait(model)
    start = time.perf_counter()
    model.generate(**inputs, max_new_tokens=1, do_sample=False)
    _wait(model)
    return 1000 * (time.perf_counter() - start)


def _wait(model: Any) -> None:
    """Let the device finish what was queued."""
    if model.device.type != "cpu":
        getattr(torch, model.device.type).synchronize()


class Side:
    """The model with or without compression, and the inputs that fit it."""

    def __init__(self, model: Any, method: Method | None, inputs: Any) -> None:
        self.model = model
        self.method = method
        self.inputs = inputs

    @contextmanager
    def _attached(self) -> Iterator[None]:
        if self.method is None:
            yield
        else:
            with compress(self.model, None, self.method):
                yield

    def answer(self, processor: Any, max_new_tokens: int) -> Answer:
        """The model's answer."""
        with self._attached():
            return generate(self.model, processor, self.inputs, max_new_tokens)

    def time(self) -> float:
        """Milliseconds to the first token; attaching is not timed."""
        with self._attached():
            return time_first_token(self.model, self.inputs)


def time_in_turn(sides: Sequence[Side], patience: float, most: int) -> tuple[list[float], int]:
    """Median milliseconds to the first token of each side, and how many runs each had.

    After a warm-up the sides take turns, so that a busy machine slows all alike; at most ``most``
    runs each, fewer where they would take longer than ``patience`` seconds together.
    """
    warm = sum(side.time() for side in sides) / 1000
    runs = max(1, min(most, int(patience / warm)))
    rounds = [[side.time() for side in sides] for _ in range(runs)]
    return [median(column) for column in zip(*rounds, strict=True)], runs
