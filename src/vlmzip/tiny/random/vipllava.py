"""A tiny random ViP-LLaVA, by default with the real one's 24 x 24 patches."""

from typing import Any

import torch
from transformers import LlavaProcessor, VipLlavaConfig, VipLlavaForConditionalGeneration

from vlmzip.tiny.random import parts


def build(image_size: int = 336, layers: int | tuple[int, ...] = (-2, -3, 1)) -> tuple[Any, Any]:
    """(model, processor) of a ViP-LLaVA; it has LLaVA's processor."""
    tokenizer = parts.tokenizer("<image>")
    config = VipLlavaConfig(
        vision_config=parts.clip_config(image_size),
        text_config=parts.llama_config(len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(image_size // 14) ** 2,
        vision_feature_layers=layers,
    )
    processor = LlavaProcessor(
        image_processor=parts.clip_image_processor(image_size),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=parts.CHAT_TEMPLATE,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VipLlavaForConditionalGeneration(config).eval()
    return model, processor
