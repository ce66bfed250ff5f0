"""LLaVA by hand, on CLIP and SigLIP towers."""

from typing import Any

import torch
from torch import Tensor

import reference
from slow import zip_view
from vlmzip.tiny.random.llava import build


def builds() -> dict[str, Any]:
    return {
        "clip": lambda: build(image_size=112),
        "siglip": lambda: build(image_size=112, tower="siglip"),
    }


def features(model: Any, inputs: Any, method: Any) -> list[Tensor]:
    if inputs.get("pixel_values") is None:
        return []
    zipped = [zip_image(model, pixels, method)[0] for pixels in inputs["pixel_values"]]
    return [project(model, one.tokens[0]) for one in zipped]


def zip_image(model: Any, pixels: Tensor, method: Any) -> tuple[reference.Zipped, Tensor]:
    """One image [3, H, W]: what is kept, and the scores it was chosen by [N]."""
    tower = model.model.vision_tower
    cls_token = model.config.vision_config.model_type == "clip_vision_model"
    layers = model.config.vision_feature_layer
    listed = layers if isinstance(layers, (list, tuple)) else [layers]
    states, attentions = run_tower(tower, pixels[None])
    deepest = max(range(len(states))[layer] for layer in listed)
    block = tower.encoder.layers[deepest - 1]
    with torch.no_grad():
        keys = block.self_attn.k_proj(block.layer_norm1(states[deepest - 1]))[0]
    heads = block.self_attn.num_heads
    keys_HNd = keys.unflatten(-1, (heads, -1)).transpose(0, 1)
    attention_HNN = attentions[deepest - 1][0]
    hidden_ND = torch.cat([states[layer][0] for layer in listed], -1)
    zipped = zip_view(method, hidden_ND, attention_HNN, keys_HNd, cls_token, "grouped")
    scores = attention_HNN[:, 0].mean(0) if cls_token else attention_HNN.mean((0, 1))
    return zipped, scores[1:] if cls_token and not method.send_cls else scores


@torch.no_grad()
def run_tower(tower: Any, pixels: Tensor) -> tuple[Any, Any]:
    """All hidden states and attentions of a tower, under eager attention."""
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    try:
        out = tower(pixels, output_hidden_states=True, output_attentions=True)
    finally:
        tower.set_attn_implementation(before)
    return out.hidden_states, out.attentions


def project(model: Any, tokens: Tensor) -> Tensor:
    projector = model.model.multi_modal_projector
    return projector(tokens.to(next(projector.parameters()).dtype))
