"""LLaVA-OneVision by hand: one view or frame at a time, the kept tokens laid out one by one."""

import math
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from contract import image
from slow import zip_view
from slow.llava import project
from slow.llava_next import crop_grid, lay_out, most_views, read

NEEDS_TORCHVISION = True


def images() -> list[Image.Image]:
    """1 x 2, 2 x 1 and 2 x 2 crops; stock joins the pixels of several turns if they have as many."""
    return [image(1, 190, 90), image(2, 90, 190), image(3, 180, 190)]


def features(model: Any, inputs: Any, method: Any) -> list[Tensor]:
    """Images, then videos."""
    return image_features(model, inputs, method) + video_features(model, inputs, method)


def image_features(model: Any, inputs: Any, method: Any) -> list[Tensor]:
    if inputs.get("pixel_values") is None:
        return []
    found: list[Tensor] = []
    counts = inputs.get("batch_num_images")
    alone = [n == 1 for n in counts for _ in range(n)] if counts is not None else [True] * 99
    for pixels, (height, width) in zip(inputs["pixel_values"], inputs["image_sizes"], strict=True):
        crops = crop_grid(model.config, int(height), int(width)) if alone[len(found)] else (0, 0)
        views = [zip_pixels(model, view, method) for view in pixels[: 1 + crops[0] * crops[1]]]
        laid = lay_out(model, views, crops, ordered(method))
        found.append(project(model, torch.stack(laid)))
    return found


def ordered(method: Any) -> Any:
    """The method with this family's own order, if it has none."""
    return method if method.order else type(method)(**{**vars(method), "order": "raster"})


def zip_pixels(model: Any, pixels: Tensor, method: Any) -> Any:
    hidden, attention, keys = read(model, pixels)
    return zip_view(method, hidden, attention, keys, False, "raster", views=most_views(model.config))


def video_features(model: Any, inputs: Any, method: Any) -> list[Tensor]:
    if inputs.get("pixel_values_videos") is None:
        return []
    views = most_views(model.config)
    found = []
    for video in inputs["pixel_values_videos"]:
        frames = []
        for pixels in video:
            hidden, attention, keys = read(model, pixels)
            scores = attention.mean((0, 1))
            tokens = pool(project(model, hidden))
            n = len(tokens)
            # As attention that every query pays alike, with one head's keys, for the shared helper.
            paid = pool(scores[:, None])[:, 0].expand(1, n, n)
            pooled = pool(keys.mean(0))[None]
            zipped = zip_view(method, tokens, paid, pooled, False, "raster", views=views, dynamic=True)
            frames.append(zipped.tokens[0].float())
        found.append(torch.cat(frames))
    return found


def pool(tokens: Tensor) -> Tensor:
    """[side * side, D] to half the side, rounded up: what each output covers, linearly interpolated."""
    side = math.isqrt(len(tokens))
    half = math.ceil(side / 2)
    grid = tokens.unflatten(0, (side, side))
    rows = []
    for y in range(half):
        for x in range(half):
            (y0, y1, dy), (x0, x1, dx) = between(y, side, half), between(x, side, half)
            top = grid[y0, x0] * (1 - dx) + grid[y0, x1] * dx
            bottom = grid[y1, x0] * (1 - dx) + grid[y1, x1] * dx
            rows.append(top * (1 - dy) + bottom * dy)
    return torch.stack(rows)


def between(index: int, size: int, half: int) -> tuple[int, int, float]:
    """The two inputs that an output lies between, and how far towards the second."""
    place = max(0.0, (index + 0.5) * size / half - 0.5)
    low = int(place)
    return low, min(low + 1, size - 1), place - low
