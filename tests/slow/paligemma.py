"""PaliGemma by hand: what the last block chooses, and the prompt as a prefix that sees all of itself."""

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from contract import embedded
from slow import zip_view
from slow.llava import project, run_tower
from vlmzip.tiny.random.paligemma import build

ANSWER_TYPE = 1  # token_type_ids: what follows the prefix


def builds() -> dict[str, Any]:
    return {"gemma": lambda: build(112), "gemma2": lambda: build(112, "gemma2")}


def prompt(processor: Any, images: int, text: str) -> str:
    return processor.image_token * images + text


def process(processor: Any, texts: list[str], images: list[list[Image.Image]]) -> dict[str, Any]:
    """Prompts as the processor makes them; those without images are the tokenizer's own business."""
    flat = [one for row in images for one in row]
    if flat:
        inputs = dict(processor(text=texts, images=flat, padding=True, return_tensors="pt"))
        del inputs["labels"]  # of a suffix, and there is none
        return inputs
    written = [f"{processor.tokenizer.bos_token}{text}\n" for text in texts]
    return dict(
        processor.tokenizer(written, padding=True, return_tensors="pt", return_token_type_ids=True)
    )


def features(model: Any, inputs: Any, method: Any) -> list[Tensor]:
    if inputs.get("pixel_values") is None:
        return []
    return [project(model, zip_image(model, one, method).tokens[0]) for one in inputs["pixel_values"]]


def zip_image(model: Any, pixels: Tensor, method: Any) -> Any:
    """What one image [3, H, W] keeps: [1, K, D] before the projector."""
    hidden_ND, attention_HNN, keys_HNd = read(model, pixels)
    return zip_view(method, hidden_ND, attention_HNN, keys_HNd, False, "raster")


@torch.no_grad()
def read(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of one image [3, H, W] tokens [N, D], the last block's attention [H, N, N] and keys [H, N, d]."""
    tower = model.model.vision_tower
    states, attentions = run_tower(tower, pixels[None].to(tower.dtype))
    block = tower.encoder.layers[len(tower.encoder.layers) - 1]
    keys_ND = block.self_attn.k_proj(block.layer_norm1(states[len(states) - 2]))[0]
    keys_HNd = keys_ND.unflatten(-1, (block.self_attn.num_heads, -1)).transpose(0, 1)
    return tower.post_layernorm(states[len(states) - 1])[0], attentions[-1][0], keys_HNd


def logits(model: Any, inputs: Any, features: list[Tensor], method: Any) -> Tensor:
    """The prompt sees all of itself, whatever the window; an answer, and what follows it, looks back."""
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    before_answer = (inputs["token_type_ids"] == 1).cumsum(1) == 0
    window = getattr(model.config.text_config, "sliding_window", None) or ids.shape[1]
    full = torch.zeros(len(ids), ids.shape[1], ids.shape[1], dtype=torch.bool)
    sliding = full.clone()
    for row in range(len(ids)):
        for query in range(ids.shape[1]):
            for key in range(ids.shape[1]):
                together = before_answer[row, query] and before_answer[row, key]
                full[row, query, key] = real[row, key] and (together or key <= query)
                near = query - window < key <= query
                sliding[row, query, key] = real[row, key] and (together or near)
    masks = {"full_attention": full, "sliding_attention": sliding}
    return run_language_model(model, embedded(model, ids, features), real, masks, first_position=1)


def run_language_model(
    model: Any, embeds: Tensor, real: Tensor, seen: dict[str, Tensor], first_position: int
) -> Tensor:
    """Logits [B, T, V] of embeddings [B, T, D]; `seen` has the keys each query sees [B, T, T]."""
    masks = {
        kind: torch.where(mask, 0.0, torch.finfo(embeds.dtype).min).to(embeds.dtype)[:, None]
        for kind, mask in seen.items()
    }
    sliding = getattr(model.config.text_config, "sliding_window", None) is not None
    out = model.model.language_model(
        inputs_embeds=embeds,
        attention_mask=masks if sliding else masks["full_attention"],
        position_ids=(real.cumsum(-1) - 1).clamp(min=0) + first_position,
        use_cache=False,
    )
    return model.lm_head(out.last_hidden_state)
