"""The tokenizer of the embedded models, and how a dialogue is written."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from .labels import scene_of
from .questions import KINDS, ask, caption

__all__ = ["CHAT_TEMPLATE", "about", "build_tokenizer", "turn"]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' }}{% else %}{{ 'ASSISTANT: ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\\n' }}{% endif %}"
    "{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ ' ' }}{% else %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def turn(question: str) -> str:
    """The user's side of one turn, up to where the answer starts (with a space)."""
    return f"USER: {question} ASSISTANT:"


def about(which: int, question: str) -> str:
    """The question, asked about one of several images (0 is the first of them)."""
    ordinal = ("first", "second", "third")[which]
    return f"In the {ordinal} image, {question[0].lower()}{question[1:]}"


def build_tokenizer(vocabulary: int = 512) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on questions and captions of training scenes."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True),
         pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )  # fmt: skip
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>", "<pad>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_corpus(), trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def _corpus(scenes: int = 2000) -> Iterator[str]:
    rng = np.random.default_rng(0)
    for index in range(scenes):
        scene = scene_of("train", index)
        yield caption(scene, rng)
        for kind in KINDS:
            question = ask(kind, scene, rng)
            if question is not None:
                text = question.text
                yield f"{turn(text)} {question.answer}"
                yield turn(f"\n{text}")
                ordinal = int(rng.integers(3))
                yield turn(f"\n{about(ordinal, text)}")
