"""Idefics3 by hand: one view at a time, merged tokens put together patch by patch."""

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from contract import image, placeholders
from slow.internvl import raster_blocks, zip_blocks


def builds() -> dict[str, Any]:
    from vlmzip.tiny.random.idefics3 import build

    return {"tiny": build, "4x4": lambda: build(image_size=224, merge=4)}


def images() -> list[Image.Image]:
    """1 x 2, 2 x 1 and 2 x 2 crops; stock joins the pixels of several turns if they have as many."""
    return [image(1, 190, 90), image(2, 90, 190), image(3, 180, 190)]


def features(model: Any, inputs: Any, method: Any) -> list[Tensor]:
    """Views of one image stand between the prompt's tags; the whole image's comes last of them."""
    if inputs.get("pixel_values") is None:
        return []
    views = inputs["pixel_values"].flatten(0, 1)
    real = [pixels for pixels in views if pixels.abs().sum() > 0]
    kept = [zip_pixels(model, pixels, method).tokens[0] for pixels in real]
    return put_together(model, inputs["input_ids"], kept)


def put_together(model: Any, ids: Tensor, views: list[Tensor]) -> list[Tensor]:
    """Images' views: a placeholder run after the tag <global-img>, token 6, is an image's last."""
    found: list[Tensor] = []
    waiting, parts = list(views), []
    for row, here in zip(ids.tolist(), placeholders(model, ids).tolist(), strict=True):
        for place in range(1, len(row)):
            if not here[place] or here[place - 1]:
                continue
            parts.append(waiting.pop(0))
            if row[place - 1] == 6:
                found.append(torch.cat(parts))
                parts = []
    assert not waiting, f"{len(waiting)} views are not in the prompt"
    assert not parts, f"{len(parts)} crops without their whole image"
    return found


def zip_pixels(model: Any, pixels: Tensor, method: Any) -> Any:
    """One view [3, H, W]."""
    hidden, scores, keys = read(model, pixels)
    config = model.config.vision_config
    patches, side = config.image_size // config.patch_size, model.config.scale_factor
    blocks = raster_blocks(patches, patches, side)
    joined = torch.stack([torch.cat([hidden[patch] for patch in block]) for block in blocks])
    tokens = model.model.connector.modality_projection(joined)
    return zip_blocks(method, tokens, scores, keys, blocks)


@torch.no_grad()
def read(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One view's patches: hidden [P, D], what each receives on the mean [P], and their keys [P, d]."""
    tower = model.model.vision_model
    patch, (height, width) = tower.config.patch_size, pixels.shape[-2:]
    whole = torch.ones(1, height // patch, width // patch, dtype=torch.bool)
    state = tower.embeddings(pixels[None].to(tower.dtype), patch_attention_mask=whole)
    for block in tower.encoder.layers:
        attention = block.self_attn
        normed = block.layer_norm1(state)
        queries, keys = attention.q_proj(normed)[0], attention.k_proj(normed)[0]
        state = block(state, None)
    scores, mean_keys = 0, 0
    for head in range(attention.num_heads):
        here = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
        for query in queries[:, here].double():
            logits = keys[:, here].double() @ query * attention.head_dim**-0.5
            scores = scores + logits.softmax(0) / (attention.num_heads * len(queries))
        mean_keys = mean_keys + keys[:, here].double() / attention.num_heads
    return tower.post_layernorm(state)[0], scores, mean_keys
