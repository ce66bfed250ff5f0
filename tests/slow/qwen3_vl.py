"""Qwen3-VL by hand: as Qwen2-VL, and DeepStack features are merged and added alike."""

from typing import Any

import torch
from torch import Tensor

from contract import embedded, placeholders
from slow.qwen2_vl import NEEDS_TORCHVISION, features, frames, images, placed, positions

__all__ = ["NEEDS_TORCHVISION", "features", "images", "logits", "positions"]


def logits(
    model: Any, inputs: Any, features: list[Tensor], method: Any, where: Tensor | None = None
) -> Tensor:
    """[B, T, V]: the stock LLM, given embeddings, positions (or where) and DeepStack features."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    encoded = [frame for _, _, frame in placed(model, inputs, frames(model, inputs, method))]
    embeds = embedded(model, ids, features)
    deep = [torch.cat(layer).to(embeds.dtype) for layer in zip(*(f.deep for f in encoded), strict=True)]
    out = model.model.language_model(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=positions(model, inputs, method) if where is None else where,
        visual_pos_masks=placeholders(model, ids),
        deepstack_visual_embeds=deep or None,
        use_cache=False,
    )
    return model.lm_head(out.last_hidden_state)
