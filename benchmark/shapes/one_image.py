"""What the Qwen shapes share: one square image, at two shares and at 64 tokens."""

from argparse import Namespace
from typing import Any

import torch
from measure import compare, random_model

from vlmzip import VisionZip


def compare_one_image(title: str, kind: Any, config: Any, side: int, given: Namespace) -> None:
    """Print the table of a random model of class kind on an image of side x side pixels."""
    model = random_model(kind, config, given.dtype)
    vision = config.vision_config
    patches = side // vision.patch_size
    grid = torch.tensor([[1, patches, patches]])
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(patches**2, values).to(model.dtype)

    def beside(ids: torch.Tensor) -> dict[str, Any]:
        types = (ids == config.image_token_id).long()
        return {"image_grid_thw": grid, "mm_token_type_ids": types}

    methods = {f"keep={share}": VisionZip(keep=share) for share in (0.7, 0.5)}
    setting = f"{given.layers} LLM layers, {given.dtype}, {given.threads} threads"
    compare(
        f"{title}, {setting}, {side} x {side}",
        model,
        methods | {"tokens=64": VisionZip(tokens=64)},
        lambda: model.get_image_features(pixels, grid, return_dict=True),
        "image",
        given.rounds,
        beside,
    )
