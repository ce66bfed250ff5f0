"""A tiny random LLaVA-NeXT; views of 8 x 8 patches, so that an image of five views stays small."""

from typing import Any, Literal

import torch
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
)

from vlmzip.tiny.random import parts


def build(image_size: int = 112, tower: Literal["clip", "siglip"] = "clip") -> tuple[Any, Any]:
    """(model, processor) of a LLaVA-NeXT on a CLIP tower, or on a SigLIP tower without CLS token.

    Its grids are those of the published checkpoints: 1 x 2, 2 x 1, 2 x 2, 3 x 1 and 1 x 3 crops.
    """
    tokenizer = parts.tokenizer("<image>")
    clip = tower == "clip"
    strategy: Literal["default", "full"] = "default" if clip else "full"
    grids = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]
    pinpoints = [[rows * image_size, columns * image_size] for rows, columns in grids]
    config = LlavaNextConfig(
        vision_config=parts.clip_config(image_size) if clip else parts.siglip_config(image_size),
        text_config=parts.llama_config(len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(image_size // 14) ** 2,
        image_grid_pinpoints=pinpoints,
        vision_feature_select_strategy=strategy,
        vision_feature_layer=-2,
    )
    image_processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        image_grid_pinpoints=pinpoints,
    )
    processor = LlavaNextProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(clip),
        chat_template=parts.CHAT_TEMPLATE,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaNextForConditionalGeneration(config).eval()
    return model, processor
