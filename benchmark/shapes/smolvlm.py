"""SmolVLM2-2.2B (HuggingFaceTB/SmolVLM2-2.2B-Instruct): SigLIP-so400m at 384 pixels, 81 tokens a view."""

import torch
from measure import arguments, compare, random_model
from transformers import LlamaConfig, SmolVLMConfig, SmolVLMForConditionalGeneration

from vlmzip import VisionZip

VIEWS = 1  # a frame is one; an image that is split has one for each crop and one for the whole


def main() -> None:
    given = arguments("SmolVLM2-2.2B's shape")
    vision = {"intermediate_size": 4304, "num_hidden_layers": 27, "image_size": 384, "patch_size": 14}
    text = LlamaConfig(
        vocab_size=49280,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=given.layers,
        pad_token_id=2,
    )
    config = SmolVLMConfig(
        vision_config=vision, text_config=text, scale_factor=3, image_token_id=49190, pad_token_id=2
    )
    model = random_model(SmolVLMForConditionalGeneration, config, given.dtype)
    pixels = torch.randn(1, VIEWS, 3, 384, 384).to(model.dtype)
    methods = {f"tokens={tokens}": VisionZip(tokens=tokens) for tokens in (32, 16)}
    setting = f"{given.layers} LLM layers, {given.dtype}, {given.threads} threads"
    title = f"SmolVLM2-2.2B, {setting}, 384 x 384, views: {VIEWS}"
    compare(title, model, methods, lambda: model.get_image_features(pixels), "image", given.rounds)


if __name__ == "__main__":
    main()
