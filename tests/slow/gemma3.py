"""Gemma 3 by hand: patches pooled block by block, each image's tokens seeing all of themselves."""

from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor

from contract import embedded
from slow import zip_view
from slow.paligemma import read, run_language_model
from vlmzip.tiny.random.gemma3 import build

# Older ones cut token_type_ids to the new tokens, but read them by place in the whole conversation.
LATER_IMAGES = tuple(int(part) for part in transformers.__version__.split(".")[:2]) >= (5, 23)


def builds() -> dict[str, Any]:
    return {
        "2 x 2": lambda: build(168, 36),
        "a border left over": lambda: build(182, 36),
    }


def process(processor: Any, texts: list[str], images: list[list[Image.Image]]) -> dict[str, Any]:
    given = images if any(images) else None
    return dict(processor(text=texts, images=given, padding=True, return_tensors="pt"))


def features(model: Any, inputs: Any, method: Any) -> list[Tensor]:
    if inputs.get("pixel_values") is None:
        return []
    return [zip_image(model, pixels, method).tokens[0].float() for pixels in inputs["pixel_values"]]


@torch.no_grad()
def zip_image(model: Any, pixels: Tensor, method: Any) -> Any:
    """What one image or crop [3, H, W] keeps: [1, K, D] after the projector."""
    hidden_ND, attention_HNN, keys_HNd = read(model, pixels)
    projector = model.model.multi_modal_projector
    pooled = pool(model, hidden_ND)
    tokens = projector.mm_soft_emb_norm(pooled) @ projector.mm_input_projection_weight
    # As attention that every query pays alike, with one head's keys, for the shared helper.
    paid = pool(model, attention_HNN.mean((0, 1))[:, None])[:, 0].expand(1, len(tokens), len(tokens))
    return zip_view(method, tokens, paid, pool(model, keys_HNd.mean(0))[None], False, "raster")


def pool(model: Any, tokens: Tensor) -> Tensor:
    """[side * side, D] to the means over square blocks, row by row; what fills no block is left out."""
    vision = model.config.vision_config
    side = vision.image_size // vision.patch_size
    wide = side // int(model.config.mm_tokens_per_image**0.5)
    means = []
    for top in range(0, side - wide + 1, wide):
        for left in range(0, side - wide + 1, wide):
            block = [
                tokens[y * side + x] for y in range(top, top + wide) for x in range(left, left + wide)
            ]
            means.append(torch.stack(block).mean(0))
    return torch.stack(means)


def logits(model: Any, inputs: Any, features: list[Tensor], method: Any) -> Tensor:
    """All look back, in a sliding layer within the window; an image's tokens see each other."""
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    window = model.config.text_config.sliding_window
    full = torch.zeros(len(ids), ids.shape[1], ids.shape[1], dtype=torch.bool)
    sliding = full.clone()
    for row in range(len(ids)):
        image = image_of_each(ids[row].tolist(), model.config)
        for query in range(ids.shape[1]):
            for key in range(ids.shape[1]):
                together = image[query] is not None and image[query] == image[key]
                seen = bool(real[row, key]) and (key <= query or together)
                full[row, query, key] = seen
                sliding[row, query, key] = seen and query - key < window
    masks = {"full_attention": full, "sliding_attention": sliding}
    return run_language_model(model, embedded(model, ids, features), real, masks, first_position=0)


def image_of_each(ids: list[int], config: Any) -> list[int | None]:
    """For each token of a prompt the image that it is a part of, counted by begin-of-image tokens."""
    found: list[int | None] = []
    begun = 0
    for token in ids:
        begun += token == config.boi_token_id
        found.append(begun if token == config.image_token_id else None)
    return found
