"""A tiny random Qwen2.5-VL, with the real one's windows of 4 x 4 merged tokens."""

from typing import Any

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen2VLVideoProcessor,
)

from vlmzip.tiny.random import qwen2_vl


def build(full: tuple[int, ...] = (1, 3)) -> tuple[Any, Any]:
    """(model, processor) of a Qwen2.5-VL whose blocks ``full`` attend over whole frames.

    Its video processor needs torchvision.
    """
    tokens = qwen2_vl.tokenizer()
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 4,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": 64,
            "window_size": 112,
            "fullatt_block_indexes": full,
        },
        text_config=qwen2_vl.text_config(len(tokens)),
        **qwen2_vl.token_ids(tokens),
    )
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessorPil(**qwen2_vl.image_sizes()),
        video_processor=Qwen2VLVideoProcessor(**qwen2_vl.image_sizes()),
        tokenizer=tokens,
        chat_template=qwen2_vl.CHAT_TEMPLATE,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2_5_VLForConditionalGeneration(config).eval()
    return model, processor
