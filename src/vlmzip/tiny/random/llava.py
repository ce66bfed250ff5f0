"""A tiny random LLaVA-1.5, by default with the real one's 24 x 24 patches."""

from typing import Any, Literal

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from vlmzip.tiny.random import parts


def build(image_size: int = 336, tower: Literal["clip", "siglip"] = "clip") -> tuple[Any, Any]:
    """(model, processor) of a LLaVA on a CLIP tower, or on a SigLIP tower without CLS token."""
    tokenizer = parts.tokenizer("<image>")
    clip = tower == "clip"
    strategy: Literal["default", "full"] = "default" if clip else "full"
    config = LlavaConfig(
        vision_config=parts.clip_config(image_size) if clip else parts.siglip_config(image_size),
        text_config=parts.llama_config(len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(image_size // 14) ** 2,
        vision_feature_select_strategy=strategy,
        vision_feature_layer=-2,
    )
    image_processor = (
        parts.clip_image_processor(image_size) if clip else parts.siglip_image_processor(image_size)
    )
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(clip),
        chat_template=parts.CHAT_TEMPLATE,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config).eval()
    return model, processor
