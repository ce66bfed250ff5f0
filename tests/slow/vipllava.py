"""ViP-LLaVA by hand: the deepest listed layer chooses, all listed layers are merged alike."""

from typing import Any

import torch
from torch import Tensor

import reference
from slow import zip_view
from slow.llava import project, run_tower
from vlmzip.tiny.random.vipllava import build


def builds() -> dict[str, Any]:
    return {
        "three layers": lambda: build(image_size=112),
        "deepest in the middle": lambda: build(image_size=112, layers=(1, -2, 2)),
        "one layer": lambda: build(image_size=112, layers=-2),
    }


def features(model: Any, inputs: Any, method: Any) -> list[Tensor]:
    if inputs.get("pixel_values") is None:
        return []
    kept = [zip_image(model, pixels, method).tokens[0] for pixels in inputs["pixel_values"]]
    return [project(model, tokens) for tokens in kept]


def zip_image(model: Any, pixels: Tensor, method: Any) -> reference.Zipped:
    """What one image [3, H, W] keeps: [1, K, layers x D]."""
    listed = model.config.vision_feature_layers
    listed = [listed] if isinstance(listed, int) else list(listed)
    tower = model.model.vision_tower
    states, attentions = run_tower(tower, pixels[None])
    deepest = max(range(len(states))[layer] for layer in listed)
    block = tower.encoder.layers[deepest - 1]
    with torch.no_grad():
        keys_ND = block.self_attn.k_proj(block.layer_norm1(states[deepest - 1]))[0]
    keys_HNd = keys_ND.unflatten(-1, (block.self_attn.num_heads, -1)).transpose(0, 1)
    hidden_ND = torch.cat([states[layer][0] for layer in listed], -1)
    return zip_view(method, hidden_ND, attentions[deepest - 1][0], keys_HNd, True, "grouped")
