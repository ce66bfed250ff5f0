"""LLaVA-NeXT by hand: one view at a time through the tower, the kept tokens laid out one by one."""

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from contract import image
from slow import zip_view
from slow.llava import project, run_tower
from vlmzip.tiny.random.llava_next import build


def builds() -> dict[str, Any]:
    return {"clip": build, "siglip": lambda: build(tower="siglip")}


def images() -> list[Image.Image]:
    """1 x 2, 2 x 1 and 2 x 2 crops; stock joins the pixels of several turns if they have as many."""
    return [image(1, 220, 100), image(2, 90, 200), image(3, 200, 220)]


def most_views(config: Any) -> int:
    side = config.vision_config.image_size
    return 1 + max((height // side) * (width // side) for height, width in config.image_grid_pinpoints)


def crop_grid(config: Any, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of crops: the pinpoint that shows most of the image, wasting least."""
    found = []
    for rows, columns in config.image_grid_pinpoints:
        scale = min(columns / width, rows / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        found.append((shown, shown - rows * columns, rows, columns))
    best = max(one[:2] for one in found)
    _, _, rows, columns = next(one for one in found if one[:2] == best)
    side = config.vision_config.image_size
    return rows // side, columns // side


def features(model: Any, inputs: Any, method: Any) -> list[Tensor]:
    if inputs.get("pixel_values") is None:
        return []
    found = []
    for pixels, (height, width) in zip(inputs["pixel_values"], inputs["image_sizes"], strict=True):
        crops = crop_grid(model.config, int(height), int(width))
        views = [zip_pixels(model, view, method) for view in pixels[: 1 + crops[0] * crops[1]]]
        found.append(project(model, torch.stack(lay_out(model, views, crops, method))))
    return found


def read(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One view or frame [3, H, W]: hidden states [N, D], attention [H, N, N], keys [H, N, d]."""
    tower, layers = model.model.vision_tower, model.config.vision_feature_layer
    states, attentions = run_tower(tower, pixels[None])
    listed = layers if isinstance(layers, (list, tuple)) else [layers]
    chosen = max(range(len(states))[layer] for layer in listed)
    block = tower.encoder.layers[chosen - 1]
    with torch.no_grad():
        keys_ND = block.self_attn.k_proj(block.layer_norm1(states[chosen - 1]))[0]
    keys_HNd = keys_ND.unflatten(-1, (block.self_attn.num_heads, -1)).transpose(0, 1)
    hidden_ND = torch.cat([states[layer][0] for layer in listed], -1)
    return hidden_ND, attentions[chosen - 1][0], keys_HNd


def zip_pixels(model: Any, pixels: Tensor, method: Any) -> Any:
    """One view [3, H, W]."""
    hidden, attention, keys = read(model, pixels)
    views = most_views(model.config)
    return zip_view(method, hidden, attention, keys, has_cls(model), "grouped", views=views)


def has_cls(model: Any) -> bool:
    kind: str = model.config.vision_config.model_type
    return kind == "clip_vision_model"


def lay_out(model: Any, views: list[Any], crops: tuple[int, int], method: Any) -> list[Tensor]:
    """The base view as it is; then the crops' patches, row by row of the whole image, and the rest."""
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    cls_token = has_cls(model) and method.send_cls
    laid = list(views[0].tokens[0])
    crop_views = views[1:]
    for y in range(crops[0] * side):
        for x in range(crops[1] * side):
            view = crop_views[(y // side) * crops[1] + x // side]
            index = (y % side) * side + x % side + int(cls_token)
            if index in view.dominant[0] or (method.order == "raster" and index in view.contextual[0]):
                laid.append(view.tokens[0, view.assignment[0, index]])
    if cls_token:
        laid += [view.tokens[0, view.assignment[0, 0]] for view in crop_views]
    if method.order != "raster":
        for view in crop_views:
            laid += [view.tokens[0, view.assignment[0, int(i)]] for i in view.contextual[0]]
    return laid
