"""A tiny random Gemma 3; an image's 16 x 16 patches are pooled to 8 x 8 tokens."""

from typing import Any

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Gemma3TextConfig,
)

from vlmzip.tiny.random import parts

BEGIN = "<start_of_image>"


def build(image_size: int = 224, tokens_per_image: int = 64) -> tuple[Any, Any]:
    """(model, processor) of a Gemma 3 with a sliding layer and a full one."""
    tokenizer = parts.tokenizer(
        boi_token=BEGIN, eoi_token="<end_of_image>", image_token="<image_soft_token>"
    )
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size={"height": image_size, "width": image_size}),
        tokenizer=tokenizer,
        image_seq_length=tokens_per_image,
        chat_template=parts.CHAT_TEMPLATE.replace("<image>", BEGIN),
    )
    text = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=48,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=32,
        max_position_embeddings=4096,
        initializer_range=0.1,  # at 0.02 the tied head repeats the last token, whatever the image
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = Gemma3Config(
        vision_config=parts.siglip_config(image_size),
        text_config=text,
        mm_tokens_per_image=tokens_per_image,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Gemma3ForConditionalGeneration(config).eval()
        # transformers makes it of zeros: no image would differ from another.
        model.model.multi_modal_projector.mm_input_projection_weight.data.normal_(std=0.1)
    # A trained model does not answer with placeholders; the embedding is the head, and is not used.
    model.get_input_embeddings().weight.data[config.image_token_id] = 0.0
    return model, processor
