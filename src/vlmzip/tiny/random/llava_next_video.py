"""A tiny random LLaVA-NeXT-Video; views of 8 x 8 patches, which a frame pools to 4 x 4."""

from typing import Any, Literal

import torch
from transformers import (
    LlavaNextImageProcessorPil,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoProcessor,
    LlavaNextVideoVideoProcessor,
)

from vlmzip.tiny.random import parts

CHAT_TEMPLATE = parts.CHAT_TEMPLATE.replace(
    "{% elif part['type'] == 'text' %}",
    "{% elif part['type'] == 'video' %}<video>\n{% elif part['type'] == 'text' %}",
)


def build(
    image_size: int = 112, tower: Literal["clip", "siglip"] = "clip", pooling: str = "average"
) -> tuple[Any, Any]:
    """(model, processor) of a LLaVA-NeXT-Video; its video processor needs torchvision.

    Its grids are those of the published checkpoints: 1 x 2, 2 x 1, 2 x 2, 3 x 1 and 1 x 3 crops.
    """
    tokenizer = parts.tokenizer("<image>", "<video>")
    clip = tower == "clip"
    strategy: Literal["default", "full"] = "default" if clip else "full"
    grids = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]
    pinpoints = [[rows * image_size, columns * image_size] for rows, columns in grids]
    config = LlavaNextVideoConfig(
        vision_config=parts.clip_config(image_size) if clip else parts.siglip_config(image_size),
        text_config=parts.llama_config(len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
        vision_feature_select_strategy=strategy,
        spatial_pool_mode=pooling,
    )
    sizes = {
        "size": {"shortest_edge": image_size},
        "crop_size": {"height": image_size, "width": image_size},
    }
    processor = LlavaNextVideoProcessor(
        image_processor=LlavaNextImageProcessorPil(**sizes, image_grid_pinpoints=pinpoints),
        video_processor=LlavaNextVideoVideoProcessor(**sizes),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(clip),
        chat_template=CHAT_TEMPLATE,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaNextVideoForConditionalGeneration(config).eval()
    # A trained model does not answer with placeholders.
    model.lm_head.weight.data[[config.image_token_id, config.video_token_id]] = 0.0
    return model, processor
