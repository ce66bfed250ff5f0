"""Qwen3-VL-8B (Qwen/Qwen3-VL-8B-Instruct): one image, at two shares and at 64 tokens.

DeepStack features go into the first three layers of the language model; with fewer --layers, into those.
"""

from typing import Any

import torch
from measure import arguments, compare, random_model
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from vlmzip import VisionZip

SIDE = 512  # pixels: 32 x 32 patches, 256 merged tokens


def main() -> None:
    given = arguments("Qwen3-VL-8B's shape")
    rope = {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        vision_config={"out_hidden_size": 4096},
        text_config={
            "intermediate_size": 12288,
            "num_hidden_layers": given.layers,
            "num_key_value_heads": 8,
            "rope_parameters": rope | {"rope_theta": 5_000_000},
        },
    )
    model = random_model(Qwen3VLForConditionalGeneration, config, given.dtype)
    side = SIDE // config.vision_config.patch_size
    grid = torch.tensor([[1, side, side]])
    pixels = torch.randn(side * side, 3 * 2 * 16 * 16).to(model.dtype)

    def beside(ids: torch.Tensor) -> dict[str, Any]:
        types = (ids == config.image_token_id).long()
        return {"image_grid_thw": grid, "mm_token_type_ids": types}

    methods = {f"keep={share}": VisionZip(keep=share) for share in (0.7, 0.5)}
    setting = f"{given.layers} LLM layers, {given.dtype}, {given.threads} threads"
    compare(
        f"qwen3-vl-8b, {setting}, {SIDE} x {SIDE}",
        model,
        methods | {"tokens=64": VisionZip(tokens=64)},
        lambda: model.get_image_features(pixels, grid, return_dict=True),
        "image",
        given.rounds,
        beside,
    )


if __name__ == "__main__":
    main()
