"""LLaVA-NeXT-Video by hand: images as LLaVA-NeXT's, videos one frame at a time."""

from typing import Any

import torch
from torch import Tensor

from slow import llava_next, zip_view
from slow.llava import project
from vlmzip.tiny.random.llava_next_video import build

NEEDS_TORCHVISION = True
images = llava_next.images


def builds() -> dict[str, Any]:
    return {"clip": build, "siglip": lambda: build(tower="siglip")}


def features(model: Any, inputs: Any, method: Any) -> list[Tensor]:
    """Images, then videos."""
    return llava_next.features(model, inputs, method) + video_features(model, inputs, method)


def video_features(model: Any, inputs: Any, method: Any) -> list[Tensor]:
    if inputs.get("pixel_values_videos") is None:
        return []
    config = model.config
    views, first = llava_next.most_views(config), int(llava_next.has_cls(model))
    found = []
    for video in inputs["pixel_values_videos"]:
        frames = []
        for pixels in video:
            hidden, attention, keys = llava_next.read(model, pixels)
            scores = attention[:, 0].mean(0) if first else attention.mean((0, 1))
            with torch.no_grad():
                tokens = model.model.vision_resampler(hidden[None, first:])[0]
            n = len(tokens)
            # As attention that every query pays alike, with one head's keys, for the shared helper.
            paid = pool(scores[first:, None], config)[:, 0].expand(1, n, n)
            pooled = pool(keys.mean(0)[first:], config)[None]
            zipped = zip_view(method, tokens, paid, pooled, False, "grouped", views=views, dynamic=True)
            frames.append(project(model, zipped.tokens[0]))
        found.append(torch.cat(frames))
    return found


def pool(tokens: Tensor, config: Any) -> Tensor:
    """[side * side, D] to the means of squares."""
    side, stride = (
        config.vision_config.image_size // config.vision_config.patch_size,
        config.spatial_pool_stride,
    )
    grid = tokens.unflatten(0, (side, side))
    rows = []
    for y in range(0, side // stride * stride, stride):
        for x in range(0, side // stride * stride, stride):
            rows.append(grid[y : y + stride, x : x + stride].mean((0, 1)))
    return torch.stack(rows)
