"""A tiny random SmolVLM; views of 8 x 8 patches, which are 4 x 4 tokens."""

from typing import Any

from transformers import (
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from vlmzip.tiny.random.idefics3 import CHAT_TEMPLATE, seeded, settings, sizes, tokenizer


def build(image_size: int = 112, merge: int = 2, patch: int = 14) -> tuple[Any, Any]:
    """(model, processor) of a SmolVLM; its processor needs torchvision and num2words.

    Args:
        image_size: Pixels a side of a view.
        merge: Patches a side of a merged token.
        patch: Pixels a side of a patch.
    """
    vocab = tokenizer("<video>")
    processor = SmolVLMProcessor(
        image_processor=SmolVLMImageProcessorPil(**sizes(image_size)),
        video_processor=SmolVLMVideoProcessor(**sizes(image_size), num_frames=8, fps=1),
        tokenizer=vocab,
        image_seq_len=(image_size // patch // merge) ** 2,
        chat_template=CHAT_TEMPLATE.replace(
            "<image>{% elif", "<image>{% elif part['type'] == 'video' %}<video>{% elif"
        ),
    )
    config = SmolVLMConfig(**settings(vocab, image_size, merge, patch))
    return seeded(SmolVLMForConditionalGeneration, config), processor
