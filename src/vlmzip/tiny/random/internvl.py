"""A tiny random InternVL; views of 8 x 8 patches, which are 4 x 4 tokens, and up to four crops."""

from typing import Any

import torch
from transformers import (
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionConfig,
)

from vlmzip.tiny.random import parts

CHAT_TEMPLATE = parts.CHAT_TEMPLATE.replace(
    "<image>\n{% elif",
    "<IMG_CONTEXT>\n{% elif part['type'] == 'video' %}<video>\n{% elif",
)


def build(image_size: int = 112, merge: int = 2, layer: int = -1, **vision: Any) -> tuple[Any, Any]:
    """(model, processor) of an InternVL; its video processor needs torchvision.

    Args:
        image_size: Pixels a side of a view.
        merge: Patches a side of a merged token.
        layer: ``vision_feature_layer``.
        vision: Settings of the tower.
    """
    tokenizer = parts.tokenizer(
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    config = InternVLConfig(
        vision_config=vision_config(image_size, **vision),
        text_config=parts.llama_config(len(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=(image_size // 14 // merge) ** 2,
        downsample_ratio=1 / merge,
        vision_feature_layer=layer,
        tie_word_embeddings=False,
    )
    size = {"height": image_size, "width": image_size}
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessorPil(size=size, crop_to_patches=True, max_patches=4),
        video_processor=InternVLVideoProcessor(size=size),
        tokenizer=tokenizer,
        image_seq_length=config.image_seq_length,
        chat_template=CHAT_TEMPLATE,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = InternVLForConditionalGeneration(config).eval()
        embeddings = model.model.vision_tower.embeddings
        for weight in (embeddings.cls_token, embeddings.position_embeddings):
            torch.nn.init.normal_(weight, std=0.5)  # transformers begins with zeros
    # A trained model does not answer with placeholders.
    model.lm_head.weight.data[config.image_token_id] = 0.0
    return model, processor


def vision_config(image_size: int, **settings: Any) -> InternVLVisionConfig:
    """An InternViT of four small layers, 14-pixel patches, q and k normed."""
    return InternVLVisionConfig(
        **{
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "image_size": [image_size, image_size],
            "patch_size": [14, 14],
            "use_qk_norm": True,
            "layer_scale_init_value": 1.0,
        }
        | settings
    )
