"""A tiny random LLaVA-OneVision; views of 7 x 7 patches, an odd number as in the real one."""

from typing import Any

import torch
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
)

from vlmzip.tiny.random import parts

CHAT_TEMPLATE = parts.CHAT_TEMPLATE.replace(
    "{% elif part['type'] == 'text' %}",
    "{% elif part['type'] == 'video' %}<video>\n{% elif part['type'] == 'text' %}",
)


def build(image_size: int = 98) -> tuple[Any, Any]:
    """(model, processor) of a LLaVA-OneVision; its video processor needs torchvision.

    Its grids are those of the published checkpoints, up to 6 x 6 crops.
    """
    tokenizer = parts.tokenizer("<image>", "<video>")
    pinpoints = [[y * image_size, x * image_size] for y in range(1, 7) for x in range(1, 7)]
    config = LlavaOnevisionConfig(
        vision_config=parts.siglip_config(image_size),
        text_config=parts.llama_config(len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
    )
    size = {"height": image_size, "width": image_size}
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=pinpoints),
        video_processor=LlavaOnevisionVideoProcessor(size=size),
        tokenizer=tokenizer,
        num_image_tokens=(image_size // 14) ** 2,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaOnevisionForConditionalGeneration(config).eval()
    # A trained model does not answer with placeholders.
    model.lm_head.weight.data[[config.image_token_id, config.video_token_id]] = 0.0
    return model, processor
