"""InternVL by hand: one view at a time, merged tokens put together patch by patch."""

from itertools import groupby
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from contract import image, placeholders
from slow import counts, zip_view

NEEDS_TORCHVISION = True


def images() -> list[Image.Image]:
    """One view without a thumbnail; two crops; three crops."""
    return [image(1, 100, 96), image(2, 70, 140), image(3, 240, 80)]


def builds() -> dict[str, Any]:
    from vlmzip.tiny.random.internvl import build

    return {
        "tiny": build,
        "layer-2, no q/k norm": lambda: build(
            layer=-2, use_qk_norm=False, attention_bias=True, norm_type="rms_norm"
        ),
    }


def features(model: Any, inputs: Any, method: Any) -> list[Tensor]:
    """An image's views stand together in the prompt, a video's frames do not: an entry each."""
    if inputs.get("pixel_values") is None:
        return []
    views = [zip_pixels(model, pixels, method).tokens[0] for pixels in inputs["pixel_values"]]
    return put_together(model, inputs["input_ids"], views)


def put_together(model: Any, ids: Tensor, views: list[Tensor]) -> list[Tensor]:
    waiting, found = list(views), []
    for row in placeholders(model, ids).tolist():
        for here, group in groupby(row):
            if here:
                wanted = len(list(group)) // len(views[0])
                found.append(torch.cat(waiting[:wanted]))
                waiting = waiting[wanted:]
    assert not waiting, f"{len(waiting)} views are not in the prompt"
    return found


def zip_pixels(model: Any, pixels: Tensor, method: Any) -> Any:
    """One view [3, H, W]."""
    hidden, scores, keys = read(model, pixels)
    side = round(1 / model.config.downsample_ratio)
    config = model.config.vision_config
    rows, columns = (config.image_size[i] // config.patch_size[i] for i in (0, 1))
    blocks = raster_blocks(rows, columns, side)
    joined = torch.stack([torch.cat([hidden[patch] for patch in block]) for block in blocks])
    tokens = model.model.multi_modal_projector(joined)
    return zip_blocks(method, tokens, scores, keys, blocks)


def raster_blocks(rows: int, columns: int, side: int) -> list[list[int]]:
    """The patches of each merged token, row by row in the block, blocks row by row."""
    return [
        [(y + dy) * columns + x + dx for dy in range(side) for dx in range(side)]
        for y in range(0, rows, side)
        for x in range(0, columns, side)
    ]


def zip_blocks(method: Any, tokens: Tensor, scores: Tensor, keys: Tensor, blocks: list[list[int]]) -> Any:
    """Merged tokens [N, D] by the patches' scores [P] and keys [P, d]."""
    n = len(blocks)
    means = torch.stack([sum(scores[p] for p in block) / len(block) for block in blocks])
    key_means = torch.stack([sum(keys[p] for p in block) / len(block) for block in blocks])
    assert sum(counts(method, n)) <= n
    # As attention that every query pays alike, with one head's keys, for the shared helper.
    return zip_view(method, tokens, means.expand(1, n, n), key_means[None], False, "raster")


@torch.no_grad()
def read(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One view's patches: hidden [P, D], what CLS pays to each [P], and their keys [P, d]."""
    tower, layer = model.model.vision_tower, model.config.vision_feature_layer
    depth = len(tower.encoder.layer)
    state = tower.embeddings(pixels[None].to(tower.dtype))
    for block in list(tower.encoder.layer)[: layer % (depth + 1)]:
        attention = block.attention
        normed = block.layernorm_before(state)
        queries = attention.q_norm(attention.q_proj(normed))[0]
        keys = attention.k_norm(attention.k_proj(normed))[0]
        state = block(state)
    width = attention.head_dim
    scores, mean_keys = 0, 0
    for start in range(0, queries.shape[-1], width):
        here = slice(start, start + width)
        logits = keys[:, here].double() @ queries[0, here].double() * width**-0.5
        scores = scores + logits.softmax(0) / attention.num_heads
        mean_keys = mean_keys + keys[:, here].double() / attention.num_heads
    hidden = tower.layernorm(state) if layer == -1 else state
    return hidden[0, 1:], scores[1:], mean_keys[1:]
