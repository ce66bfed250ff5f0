"""A tiny random PaliGemma, by default with the real one's 16 x 16 patches."""

from typing import Any, Literal

import torch
from transformers import (
    Gemma2Config,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
)

from vlmzip.tiny.random import parts


def build(image_size: int = 224, language: Literal["gemma", "gemma2"] = "gemma") -> tuple[Any, Any]:
    """(model, processor) of a PaliGemma on a Gemma, or of a PaliGemma 2, every other layer sliding."""
    image_processor = parts.siglip_image_processor(image_size)
    image_processor.image_seq_length = (image_size // 14) ** 2
    tokenizer = parts.tokenizer("<image>")
    processor = PaliGemmaProcessor(image_processor=image_processor, tokenizer=tokenizer)
    config = PaliGemmaConfig(
        vision_config=parts.siglip_config(image_size),
        text_config=_language(language, len(tokenizer)),  # with the location and segment tokens
        image_token_index=processor.image_token_id,
        projection_dim=64,
        hidden_size=64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = PaliGemmaForConditionalGeneration(config).eval()
    # A trained model does not answer with placeholders; the embedding is the head, and is not used.
    model.get_input_embeddings().weight.data[config.image_token_id] = 0.0
    return model, processor


def _language(kind: str, vocab_size: int) -> GemmaConfig | Gemma2Config:
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "initializer_range": 0.1,  # at 0.02 the tied head repeats the last token, whatever the image
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if kind == "gemma":
        return GemmaConfig(**sizes)
    # No soft caps: transformers leaves them out under SDPA, and the last one in some releases.
    caps = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    return Gemma2Config(**sizes, **caps, sliding_window=48, query_pre_attn_scalar=32)
