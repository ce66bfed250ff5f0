"""A tiny random Video-LLaVA, by default with the real one's 16 x 16 patches a frame."""

from typing import Any, Literal

import torch
from transformers import (
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
    VideoLlavaImageProcessor,
    VideoLlavaProcessor,
    VideoLlavaVideoProcessor,
)

from vlmzip.tiny.random import parts

CHAT_TEMPLATE = parts.CHAT_TEMPLATE.replace(
    "{% elif part['type'] == 'text' %}",
    "{% elif part['type'] == 'video' %}<video>\n{% elif part['type'] == 'text' %}",
)


def build(
    image_size: int = 224,
    strategy: Literal["default", "full"] = "default",
    layer: int | list[int] = -2,
) -> tuple[Any, Any]:
    """(model, processor) of a Video-LLaVA; its video processor needs torchvision."""
    tokenizer = parts.tokenizer("<image>", "<video>")
    patches = (image_size // 14) ** 2
    config = VideoLlavaConfig(
        vision_config=parts.clip_config(image_size),
        text_config=parts.llama_config(len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_seq_length=patches,
        video_seq_length=8 * (patches + 1),
        vision_feature_select_strategy=strategy,
        vision_feature_layer=layer,
    )
    sizes = {
        "size": {"shortest_edge": image_size},
        "crop_size": {"height": image_size, "width": image_size},
    }
    processor = VideoLlavaProcessor(
        image_processor=VideoLlavaImageProcessor(**sizes),
        video_processor=VideoLlavaVideoProcessor(**sizes),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VideoLlavaForConditionalGeneration(config).eval()
    return model, processor
