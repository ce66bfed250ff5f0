"""A tiny random Qwen3-VL, with DeepStack features from two blocks."""

from typing import Any

import torch
from transformers import (
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from vlmzip.tiny.random import qwen2_vl


def build() -> tuple[Any, Any]:
    """(model, processor) of a Qwen3-VL; its video processor needs torchvision."""
    tokens = qwen2_vl.tokenizer()
    text = qwen2_vl.text_config(len(tokens), head_dim=32)
    text["rope_parameters"]["mrope_interleaved"] = True
    config = Qwen3VLConfig(
        vision_config={
            "depth": 4,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": (0, 2),
        },
        text_config=text,
        **qwen2_vl.token_ids(tokens),
    )
    sizes = qwen2_vl.image_sizes(patch=16)
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessorPil(**sizes),
        video_processor=Qwen3VLVideoProcessor(**sizes),
        tokenizer=tokens,
        chat_template=qwen2_vl.CHAT_TEMPLATE,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3VLForConditionalGeneration(config).eval()
    return model, processor
