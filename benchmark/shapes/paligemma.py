"""PaliGemma 2 3B (google/paligemma2-3b-pt-224 and -448): one image, 256 or 1,024 tokens."""

import argparse

import torch
from measure import arguments, compare, random_model
from transformers import Gemma2Config, PaliGemmaConfig, PaliGemmaForConditionalGeneration

from vlmzip import VisionZip


def main() -> None:
    given = arguments("PaliGemma 2 3B's shape, at two of its resolutions")
    measure(given, 224, (128, 64))
    measure(given, 448, (256, 64))


def measure(given: argparse.Namespace, side: int, budgets: tuple[int, ...]) -> None:
    """One resolution: an image of side x side pixels."""
    vision = {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": side,
        "patch_size": 14,
        "vision_use_head": False,
    }
    config = PaliGemmaConfig(
        vision_config=vision,
        text_config=Gemma2Config(vocab_size=257216, num_hidden_layers=given.layers),
        image_token_index=257152,
        projection_dim=2304,
    )
    model = random_model(PaliGemmaForConditionalGeneration, config, given.dtype)
    pixels = torch.randn(1, 3, side, side).to(model.dtype)
    setting = f"{given.layers} LLM layers, {given.dtype}, {given.threads} threads"
    compare(
        f"paligemma2-3b, {setting}, {side} x {side}",
        model,
        {f"tokens={tokens}": VisionZip(tokens=tokens) for tokens in budgets},
        lambda: model.get_image_features(pixels),
        "image",
        given.rounds,
        lambda ids: {"token_type_ids": torch.zeros_like(ids)},  # image and prompt see each other
    )


if __name__ == "__main__":
    main()
