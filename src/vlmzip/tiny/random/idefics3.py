"""A tiny random Idefics3, and the parts that SmolVLM shares; views of 8 x 8 patches, 4 x 4 tokens."""

from typing import Any

import torch
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    PreTrainedTokenizerFast,
)

from vlmzip.tiny.random import parts

SPECIAL = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>")
CHAT_TEMPLATE = parts.CHAT_TEMPLATE.replace("<image>\n", "<image>")


def tokenizer(*special: str) -> PreTrainedTokenizerFast:
    """Byte level, with the families' placeholder and the tags of views."""
    crops = (f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
    return parts.tokenizer(*SPECIAL, *crops, *special)


def settings(vocab: PreTrainedTokenizerFast, image_size: int, merge: int, patch: int) -> dict[str, Any]:
    """The model's config: a SigLIP-like tower of four small layers, and a small language model."""
    return {
        "vision_config": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "image_size": image_size,
            "patch_size": patch,
        },
        "text_config": parts.llama_config(len(vocab)),
        "image_token_id": vocab.convert_tokens_to_ids("<image>"),
        "pad_token_id": 0,
        "scale_factor": merge,
    }


def sizes(image_size: int) -> dict[str, Any]:
    """An image processor's settings: up to two by two crops."""
    return {
        "size": {"longest_edge": 2 * image_size},
        "max_image_size": {"longest_edge": image_size},
    }


def seeded(kind: Any, config: Any) -> Any:
    """A model whose weights are random but the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config).eval()
    # A trained model does not answer with placeholders.
    model.lm_head.weight.data[config.image_token_id] = 0.0
    return model


def build(image_size: int = 112, merge: int = 2, patch: int = 14) -> tuple[Any, Any]:
    """(model, processor) of an Idefics3.

    Args:
        image_size: Pixels a side of a view.
        merge: Patches a side of a merged token.
        patch: Pixels a side of a patch.
    """
    vocab = tokenizer()
    processor = Idefics3Processor(
        image_processor=Idefics3ImageProcessorPil(**sizes(image_size)),
        tokenizer=vocab,
        image_seq_len=(image_size // patch // merge) ** 2,
        chat_template=CHAT_TEMPLATE,
    )
    config = Idefics3Config(**settings(vocab, image_size, merge, patch))
    return seeded(Idefics3ForConditionalGeneration, config), processor
