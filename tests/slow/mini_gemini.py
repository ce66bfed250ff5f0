"""Mini-Gemini by hand: token by token, each looks its own window up in the high-resolution map."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import ConvNextModel

import reference
from slow import zip_view
from slow.llava import project, run_tower
from vlmzip.tiny.random.mini_gemini import build


def builds() -> dict[str, Any]:
    return {
        "llama": lambda: build(image_size=112, high_image_size=128),
        "gemma": lambda: build(image_size=112, high_image_size=96, llm="gemma"),
    }


def features(model: Any, inputs: Any, method: Any) -> list[Tensor]:
    if inputs.get("pixel_values") is None:
        return []
    pairs = zip(inputs["pixel_values"], inputs["pixel_values_high"], strict=True)
    return [image_features(model, low, high, method) for low, high in pairs]


@torch.no_grad()
def image_features(model: Any, low: Tensor, high: Tensor, method: Any) -> Tensor:
    """[K, D_llm] of one image, low [3, h, w] and high [3, H, W]."""
    zipped = zip_image(model, low, method)
    kept = reference.output_order(
        zipped.dominant[0].tolist(), zipped.contextual[0].tolist(), method.order or "grouped"
    )
    map_CHW = high_map(model, high)
    mined = []
    for token, place in zip(zipped.tokens[0], kept, strict=True):
        patch = place - 1 if method.send_cls else place
        if patch < 0:
            mined.append(token.float())
        else:
            mined.append(mine(model, token.float(), window(model, map_CHW, patch)))
    return project(model, torch.stack(mined))


def zip_image(model: Any, pixels: Tensor, method: Any) -> reference.Zipped:
    """What one image keeps of the low-resolution tower's tokens."""
    tower, layer = model.model.vision_tower, model.config.vision_feature_layer
    states, attentions = run_tower(tower, pixels[None])
    block = tower.encoder.layers[range(len(states))[layer] - 1]
    with torch.no_grad():
        keys_ND = block.self_attn.k_proj(block.layer_norm1(states[layer - 1]))[0]
    keys_HNd = keys_ND.unflatten(-1, (block.self_attn.num_heads, -1)).transpose(0, 1)
    return zip_view(method, states[layer][0], attentions[layer][0], keys_HNd, True, "grouped")


def high_map(model: Any, pixels: Tensor) -> Tensor:
    """[C, H, W]: what transformers' own ConvNeXt gives after each stage, at the first one's size."""
    tower = model.model.high_vision_tower
    stock = ConvNextModel(model.config.high_vision_config).to(model.dtype).eval()
    stock.embeddings.load_state_dict(tower.embeddings.state_dict())
    stock.encoder.stages.load_state_dict(tower.stages.state_dict())
    stages: list[Tensor] = []
    for stage in stock.encoder.stages:
        stage.register_forward_hook(lambda module, args, out: stages.append(out))
    stock(pixels[None].to(model.dtype))
    size = stages[0].shape[-2:]
    scaled = [interpolate(one.float(), size, mode="bilinear", align_corners=False) for one in stages]
    return torch.cat(scaled, 1)[0].to(model.dtype)


def window(model: Any, map_CHW: Tensor, patch: int) -> Tensor:
    """[W, C]: the map's pixels under one patch, row by row."""
    vision = model.config.vision_config
    columns = vision.image_size // vision.patch_size
    side = map_CHW.shape[-1] // columns
    top, left = patch // columns * side, patch % columns * side
    places = [(top + y, left + x) for y in range(side) for x in range(side)]
    return torch.stack([map_CHW[:, y, x] for y, x in places])


def mine(model: Any, token: Tensor, window_WC: Tensor) -> Tensor:
    """The token [D] and what it finds in its window."""
    mining = model.model.mining
    dtype = window_WC.dtype
    query, keys, values = mining.query(token.to(dtype)), mining.key(window_WC), mining.value(window_WC)
    logits = [float(query @ key) / math.sqrt(len(query)) for key in keys]
    weights = reference.softmax_row(logits)
    found = sum(weight * value.float() for weight, value in zip(weights, values, strict=True))
    return token + found
