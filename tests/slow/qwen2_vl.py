"""Qwen2-VL by hand: the tower run on one frame at a time, attention in full, positions counted out."""

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import contract
import reference
from slow import counts, zip_view

NEEDS_TORCHVISION = True
IMAGE, VIDEO = "image", "video"


def images() -> list[Image.Image]:
    """Up to 8 merged tokens a side: more than one window, some of them cut off."""
    return [contract.image(1, 150, 130), contract.image(2, 70, 230), contract.image(3, 220, 150)]


@dataclass
class Frame:
    """One frame of an image or video, compressed."""

    owner: tuple[str, int]  # kind, index among its kind
    number: int  # of the frame within its video
    rows: int
    columns: int
    seconds: float  # between two frames
    zipped: reference.Zipped
    order: str
    scores: Tensor
    deep: list[Tensor]  # a layer's [K, D] each

    @property
    def kept(self) -> list[int]:
        """The merged token at whose place each kept one stands."""
        chosen = self.zipped.dominant[0].tolist() + self.zipped.contextual[0].tolist()
        return sorted(chosen) if self.order == "raster" else chosen


def features(model: Any, inputs: Any, method: Any) -> list[Tensor]:
    found: dict[tuple[str, int], list[Tensor]] = {}
    for _, _, frame in placed(model, inputs, frames(model, inputs, method)):
        found.setdefault(frame.owner, []).append(frame.zipped.tokens[0])
    return [torch.cat(parts) for parts in found.values()]


def positions(model: Any, inputs: Any, method: Any) -> Tensor:
    """[3, B, T], walking through each prompt; a padded place has 0."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    found = torch.zeros(3, *ids.shape, dtype=torch.int64)
    begins = {
        (row, column): frame
        for row, column, frame in placed(model, inputs, frames(model, inputs, method))
    }
    for row in range(len(ids)):
        now, column, base = 0, 0, 0
        while column < ids.shape[1]:
            if not mask[row, column]:
                column += 1
                continue
            if (row, column) not in begins:
                found[:, row, column] = now
                now, column = now + 1, column + 1
                continue
            frame = begins[row, column]
            video = model.config.model_type != "qwen3_vl" and frame.owner[0] == VIDEO
            if frame.number == 0 or not video:
                base = now
            passed = int(frame.number * frame.seconds) if video else 0
            for index in frame.kept:
                place = (passed, index // frame.columns, index % frame.columns)
                found[:, row, column] = torch.tensor([base + step for step in place])
                column += 1
            now = base + max(frame.rows, frame.columns)
    return found


def placed(model: Any, inputs: Any, encoded: list[Frame]) -> list[tuple[int, int, Frame]]:
    """Row and first column of each frame's placeholders, in prompt order."""
    queues = {kind: deque(f for f in encoded if f.owner[0] == kind) for kind in (IMAGE, VIDEO)}
    tokens = {model.config.image_token_id: IMAGE, model.config.video_token_id: VIDEO}
    found = []
    for row, ids in enumerate(inputs["input_ids"].tolist()):
        column = 0
        while column < len(ids):
            if ids[column] not in tokens:
                column += 1
                continue
            frame = queues[tokens[ids[column]]].popleft()
            found.append((row, column, frame))
            column += len(frame.kept)
    assert not any(queues.values())
    return found


def frames(model: Any, inputs: Any, method: Any) -> list[Frame]:
    """Every frame of every image, then of every video, in the order of their pixels."""
    found = []
    for kind, name in ((IMAGE, "pixel_values"), (VIDEO, "pixel_values_videos")):
        if inputs.get(name) is None:
            continue
        pixels = inputs[name]
        seconds = inputs.get("second_per_grid_ts")
        for index, (t, h, w) in enumerate(inputs[f"{kind}_grid_thw"].tolist()):
            between = 1.0
            if model.config.model_type == "qwen2_5_vl" and kind == VIDEO:
                rate = model.config.vision_config.tokens_per_second
                between = rate * float(1 if seconds is None else seconds[index])
            for number in range(t):
                frame, pixels = pixels[: h * w], pixels[h * w :]
                owner = (kind, index)
                found.append(zip_frame(model, frame, h, w, method, owner, number, between))
        assert not len(pixels)
    return found


@torch.no_grad()
def zip_frame(
    model: Any,
    pixels: Tensor,
    h: int,
    w: int,
    method: Any,
    owner: tuple[str, int],
    number: int,
    seconds: float,
) -> Frame:
    """One frame [h * w, values], on its own."""
    vision = model.config.vision_config
    hidden_ND, deep, attention_HPP, keys_HPd = run_tower(model, pixels, h, w)
    merge = vision.spatial_merge_size
    order = tower_order(vision, h // merge, w // merge)
    heads, patches, _ = attention_HPP.shape
    received_HPN = torch.zeros(heads, patches, len(order), dtype=torch.float64)
    keys_HNd = torch.zeros(heads, len(order), keys_HPd.shape[-1], dtype=torch.float64)
    for place, token in enumerate(order):
        group = range(place * merge**2, (place + 1) * merge**2)
        for patch in group:
            received_HPN[:, :, token] += attention_HPP[:, :, patch] / len(group)
            keys_HNd[:, token] += keys_HPd[:, patch] / len(group)
    zipped = zip_view(method, hidden_ND, received_HPN, keys_HNd, False, "raster", dynamic=True)
    dominant, contextual = counts(method, len(hidden_ND), dynamic=True)
    alike = [layer[None] for layer in deep]
    if dominant + contextual < len(hidden_ND):
        alike = [
            reference.zip_tokens(
                layer[None],
                received_HPN.mean((0, 1))[None],
                keys_HNd.mean(0)[None],
                dominant=dominant,
                contextual=contextual,
                cls_token=False,
                merge=method.merge,
                order=method.order or "raster",
                assignment=zipped.assignment,
            ).tokens
            for layer in deep
        ]
    return Frame(
        owner,
        number,
        h // merge,
        w // merge,
        seconds,
        zipped,
        method.order or "raster",
        received_HPN.mean((0, 1)),
        [layer[0] for layer in alike],
    )


def run_tower(model: Any, pixels: Tensor, h: int, w: int) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """Merged tokens [N, D] and DeepStack features of the stock tower; of the block that is read, the
    attention [H, P, P] and the keys [H, P, d] after rotation, worked out from what its layer is given.
    """
    tower = model.model.visual
    seen: dict[str, Any] = {}
    attention = tower.blocks[block_of(model.config.vision_config)].attn
    hooks = [
        attention.register_forward_pre_hook(
            lambda module, args, kwargs: seen.update(angles=kwargs["position_embeddings"]),
            with_kwargs=True,
        ),
        attention.qkv.register_forward_hook(lambda module, args, out: seen.update(qkv=out)),
    ]
    out = tower(pixels.to(tower.dtype), grid_thw=torch.tensor([[1, h, w]]), return_dict=True)
    for hook in hooks:
        hook.remove()
    qkv_P3Hd = seen["qkv"].double().view(h * w, 3, attention.num_heads, -1)
    cos_Pd, sin_Pd = (angle.double() for angle in seen["angles"])
    q_HPd, k_HPd = (
        torch.stack([rotate(one_Pd, cos_Pd, sin_Pd) for one_Pd in qkv_P3Hd[:, part].unbind(1)])
        for part in (0, 1)
    )
    logits = torch.einsum("hqd,hkd->hqk", q_HPd, k_HPd) / q_HPd.shape[-1] ** 0.5
    deep = list(getattr(out, "deepstack_features", None) or [])
    return out.pooler_output, deep, logits.softmax(-1), k_HPd


def rotate(x_Pd: Tensor, cos_Pd: Tensor, sin_Pd: Tensor) -> Tensor:
    """Rotary: dimension c turns together with dimension c + d/2."""
    half = x_Pd.shape[1] // 2
    turned = torch.empty_like(x_Pd)
    for c in range(half):
        a, b = x_Pd[:, c], x_Pd[:, c + half]
        turned[:, c] = a * cos_Pd[:, c] - b * sin_Pd[:, c]
        turned[:, c + half] = b * cos_Pd[:, c + half] + a * sin_Pd[:, c + half]
    return turned


def block_of(vision: Any) -> int:
    full = getattr(vision, "fullatt_block_indexes", None)
    return vision.depth - 1 if full is None else max(full)


def tower_order(vision: Any, rows: int, columns: int) -> list[int]:
    """Raster indices of the merged tokens in the order that the tower's blocks see them."""
    if not hasattr(vision, "window_size"):
        return list(range(rows * columns))
    side = vision.window_size // vision.patch_size // vision.spatial_merge_size
    return [
        row * columns + column
        for top in range(0, rows, side)
        for left in range(0, columns, side)
        for row in range(top, min(top + side, rows))
        for column in range(left, min(left + side, columns))
    ]
