"""A tiny random Qwen2-VL, and the parts that its successors share with it."""

from typing import Any

import torch
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from vlmzip.tiny.random import parts

SPECIAL = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
CHAT_TEMPLATE = parts.CHAT_TEMPLATE.replace(
    "<image>\n{% elif",
    "<|vision_start|><|image_pad|><|vision_end|>{% elif part['type'] == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% elif",
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte level, with the family's placeholders."""
    return parts.tokenizer(*SPECIAL)


def token_ids(tokens: PreTrainedTokenizerFast) -> dict[str, int]:
    """The config's ids of the placeholders."""
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return {n: int(tokens.convert_tokens_to_ids(t)) for n, t in zip(names, SPECIAL, strict=True)}


def text_config(vocab_size: int, **settings: Any) -> dict[str, Any]:
    """A language model of two small layers, head dimension 32, three-part rotary positions."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
    } | settings


def image_sizes(patch: int = 14) -> dict[str, Any]:
    """Settings of image and video processors: from 4 to 64 merged tokens a view."""
    unit = (2 * patch) ** 2
    return {"patch_size": patch, "size": {"shortest_edge": 4 * unit, "longest_edge": 64 * unit}}


def build() -> tuple[Any, Any]:
    """(model, processor) of a Qwen2-VL; its video processor needs torchvision."""
    tokens = tokenizer()
    config = Qwen2VLConfig(
        vision_config={"depth": 4, "embed_dim": 64, "hidden_size": 64, "mlp_ratio": 2, "num_heads": 2},
        text_config=text_config(len(tokens)),
        **token_ids(tokens),
    )
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessorPil(**image_sizes()),
        video_processor=Qwen2VLVideoProcessor(**image_sizes()),
        tokenizer=tokens,
        chat_template=CHAT_TEMPLATE,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2VLForConditionalGeneration(config).eval()
    return model, processor
