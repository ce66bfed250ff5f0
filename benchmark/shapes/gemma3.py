"""Gemma 3 4B (google/gemma-3-4b-it): one image of 896 pixels, 4,096 patches pooled to 256 tokens."""

import torch
from measure import arguments, compare, random_model
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from vlmzip import VisionZip


def main() -> None:
    given = arguments("Gemma 3 4B's shape")
    config = Gemma3Config(
        vision_config={
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 896,
            "patch_size": 14,
            "vision_use_head": False,
        },
        text_config={
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": given.layers,
            "sliding_window": 1024,
        },
    )
    model = random_model(Gemma3ForConditionalGeneration, config, given.dtype)
    pixels = torch.randn(1, 3, 896, 896).to(model.dtype)
    methods = {f"tokens={tokens}": VisionZip(tokens=tokens) for tokens in (128, 64)}
    compare(
        f"gemma-3-4b, {given.layers} LLM layers, {given.dtype}, {given.threads} threads, 896 x 896",
        model,
        methods,
        lambda: model.get_image_features(pixels),
        "image",
        given.rounds,
        lambda ids: {"token_type_ids": (ids == config.image_token_id).long()},
    )


if __name__ == "__main__":
    main()
