"""The embedded models as checkpoints: built from nothing, saved in the hub's layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPImageProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
)

from .language import CHAT_TEMPLATE
from .scenes import PATCH, SIZE
from .tower import FEATURE_LAYER, build_tower

__all__ = ["build_model", "build_processor", "save_checkpoint"]

_HALF = [0.5, 0.5, 0.5]


def build_model(name: str, tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """A LLaVA with random weights around the named tower's shape."""
    text = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        # Half of a head's frequencies turn by less than a radian over an image's patches, so that a word
        # finds the patches that show it wherever they stand.
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = build_tower(name).config
    if name == "tiny-siglip":
        vision.vision_use_head = False  # the pooling head only serves the first stage
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projector_hidden_act="gelu",
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy="default" if name == "tiny-llava" else "full",
        image_seq_length=(SIZE // PATCH) ** 2,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    _spread_words(model)
    return model


@torch.no_grad()
def _spread_words(model: LlavaForConditionalGeneration) -> None:
    # With the usual 0.02 the first block's output drowns which word a token is, and the LLM never
    # learns to look for the object that a question names. The norm keeps the tied head's logits small.
    nn.init.normal_(model.get_input_embeddings().weight)
    model.model.language_model.norm.weight.fill_(0.1)


def build_processor(name: str, tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Image processor, tokenizer and chat template of the named model."""
    clip = name == "tiny-llava"
    shape: dict[str, Any] = {"image_mean": _HALF, "image_std": _HALF}
    if clip:
        images = CLIPImageProcessor(
            size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, **shape
        )
    else:
        images = SiglipImageProcessor(size={"height": SIZE, "width": SIZE}, **shape)
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default" if clip else "full",
        num_additional_image_tokens=1 if clip else 0,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    )


def save_checkpoint(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path
) -> None:
    """Write a checkpoint whose weight names are the hub's.

    transformers 5 writes ``vision_tower.embeddings...``; llava-hf's files and vLLM have
    ``vision_tower.vision_model.embeddings...``, which transformers reads as well.
    """
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    file = folder / "model.safetensors"
    weights = {_hub_name(k): v for k, v in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})


def _hub_name(name: str) -> str:
    prefix = "vision_tower."
    if name.startswith(prefix) and not name.startswith(prefix + "vision_model."):
        return f"{prefix}vision_model.{name[len(prefix) :]}"
    return name


def copy_tower(lesson_tower: nn.Module, model: LlavaForConditionalGeneration) -> None:
    """Put a trained tower into a model; SigLIP's pooling head stays behind."""
    weights = {k: v for k, v in lesson_tower.state_dict().items() if not k.startswith("head.")}
    with torch.no_grad():
        model.model.vision_tower.load_state_dict(weights)
