"""A tiny random Mini-Gemini, by default with the real one's 24 x 24 patches and 8 x 8 windows."""

from typing import Any, Literal

import torch
from transformers import CLIPImageProcessorPil, ConvNextConfig, GemmaConfig

from vlmzip.mini_gemini import (
    MiniGeminiConfig,
    MiniGeminiForConditionalGeneration,
    MiniGeminiProcessor,
)
from vlmzip.tiny.random import parts


def build(
    image_size: int = 336, high_image_size: int = 768, llm: Literal["llama", "gemma"] = "llama"
) -> tuple[Any, Any]:
    """(model, processor) of a Mini-Gemini on a Llama or a Gemma."""
    tokenizer = parts.tokenizer("<image>")
    config = MiniGeminiConfig(
        vision_config=parts.clip_config(image_size),
        high_vision_config=ConvNextConfig(
            hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1], layer_scale_init_value=1.0
        ),
        high_image_size=high_image_size,
        text_config=(_gemma_config if llm == "gemma" else parts.llama_config)(len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(image_size // 14) ** 2,
    )
    processor = MiniGeminiProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": high_image_size},
            crop_size={"height": high_image_size, "width": high_image_size},
        ),
        tokenizer=tokenizer,
        chat_template=parts.CHAT_TEMPLATE,
        low_image_size=image_size,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MiniGeminiForConditionalGeneration(config).eval()
    return model, processor


def _gemma_config(vocab_size: int) -> GemmaConfig:
    return GemmaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
