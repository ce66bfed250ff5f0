"""Qwen2.5-VL-7B: one image, at the shares that the paper's authors report and at 64 tokens."""

from typing import Any

import torch
from measure import arguments, compare, random_model
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from vlmzip import VisionZip

SIDE = 448  # pixels: 32 x 32 patches, 256 merged tokens


def main() -> None:
    given = arguments("Qwen2.5-VL-7B's shape")
    config = Qwen2_5_VLConfig(
        vision_config={"hidden_size": 1280},
        text_config={
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": given.layers,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24]},
        },
    )
    model = random_model(Qwen2_5_VLForConditionalGeneration, config, given.dtype)
    side = SIDE // config.vision_config.patch_size
    grid = torch.tensor([[1, side, side]])
    pixels = torch.randn(side * side, 3 * 2 * 14 * 14).to(model.dtype)

    def beside(ids: torch.Tensor) -> dict[str, Any]:
        types = (ids == config.image_token_id).long()
        return {"image_grid_thw": grid, "mm_token_type_ids": types}

    methods = {f"keep={share}": VisionZip(keep=share) for share in (0.7, 0.5)}
    setting = f"{given.layers} LLM layers, {given.dtype}, {given.threads} threads"
    compare(
        f"qwen2.5-vl-7b, {setting}, {SIDE} x {SIDE}",
        model,
        methods | {"tokens=64": VisionZip(tokens=64)},
        lambda: model.get_image_features(pixels, grid, return_dict=True),
        "image",
        given.rounds,
        beside,
    )


if __name__ == "__main__":
    main()
