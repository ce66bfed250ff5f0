"""Video-LLaVA by hand: every image through one tower, every frame of a video through the other."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

import reference
from contract import image
from slow import zip_view
from slow.llava import project, run_tower
from vlmzip.tiny.random.video_llava import build

NEEDS_TORCHVISION = True


def builds() -> dict[str, Any]:
    return {
        "default": lambda: build(image_size=112),
        "full, two layers": lambda: build(image_size=112, strategy="full", layer=[-2, 1]),
    }


def video(seed: int, frames: int) -> np.ndarray[Any, Any]:
    """[frames, 90, 70, 3] uint8; no two frames are alike."""
    return np.stack([np.asarray(image(100 * seed + i, 70, 90)) for i in range(frames)])


def features(model: Any, inputs: Any, method: Any) -> list[Tensor]:
    images = [image_features(model, pixels, method) for pixels in pixels_of(inputs, "images")]
    videos = [video_features(model, frames, method) for frames in pixels_of(inputs, "videos")]
    ids = inputs["input_ids"].flatten().tolist()
    ordered, place = [], 0
    while place < len(ids):
        if ids[place] == model.config.image_token_index:
            ordered.append(images.pop(0))
        elif ids[place] == model.config.video_token_index:
            ordered.append(videos.pop(0))
        else:
            place += 1
            continue
        place += len(ordered[-1])
    assert not images
    assert not videos
    return ordered


def pixels_of(inputs: Any, kind: str) -> Any:
    pixels = inputs.get(f"pixel_values_{kind}")
    return [] if pixels is None else pixels


def image_features(model: Any, pixels: Tensor, method: Any) -> Tensor:
    """[K, D] of one image [3, H, W]."""
    return project(model, zip_frame(model, model.model.image_tower, pixels, method).tokens[0])


def video_features(model: Any, frames: Tensor, method: Any) -> Tensor:
    """[frames x K, D] of one video [frames, 3, H, W]: frame after frame."""
    kept = [zip_frame(model, model.model.video_tower, pixels, method).tokens[0] for pixels in frames]
    return torch.cat([project(model, tokens) for tokens in kept])


def zip_frame(model: Any, tower: Any, pixels: Tensor, method: Any) -> reference.Zipped:
    """What one frame or image keeps; with several listed layers, read at the deepest."""
    layers = model.config.vision_feature_layer
    listed = layers if isinstance(layers, (list, tuple)) else [layers]
    states, attentions = run_tower(tower, pixels[None])
    deepest = max(range(len(states))[layer] for layer in listed)
    block = tower.encoder.layers[deepest - 1]
    with torch.no_grad():
        keys_ND = block.self_attn.k_proj(block.layer_norm1(states[deepest - 1]))[0]
    keys_HNd = keys_ND.unflatten(-1, (block.self_attn.num_heads, -1)).transpose(0, 1)
    hidden_ND = torch.cat([states[layer][0] for layer in listed], -1)
    return zip_view(method, hidden_ND, attentions[deepest - 1][0], keys_HNd, True, "grouped")
