"""Idefics3-8B (HuggingFaceM4/Idefics3-8B-Llama3): SigLIP-so400m at 364 pixels, 169 tokens a view."""

import torch
from measure import arguments, compare, random_model
from transformers import Idefics3Config, Idefics3ForConditionalGeneration, LlamaConfig

from vlmzip import VisionZip

VIEWS = 1  # an image that is split has one for each crop and one for the whole


def main() -> None:
    given = arguments("Idefics3-8B's shape")
    vision = {"intermediate_size": 4304, "num_hidden_layers": 27, "image_size": 364, "patch_size": 14}
    text = LlamaConfig(
        vocab_size=128259,
        intermediate_size=14336,
        num_hidden_layers=given.layers,
        num_key_value_heads=8,
        pad_token_id=128002,
    )
    config = Idefics3Config(vision_config=vision, text_config=text)
    model = random_model(Idefics3ForConditionalGeneration, config, given.dtype)
    pixels = torch.randn(1, VIEWS, 3, 364, 364).to(model.dtype)
    methods = {f"tokens={tokens}": VisionZip(tokens=tokens) for tokens in (64, 32)}
    setting = f"{given.layers} LLM layers, {given.dtype}, {given.threads} threads"
    title = f"Idefics3-8B-Llama3, {setting}, 364 x 364, views: {VIEWS}"
    compare(title, model, methods, lambda: model.get_image_features(pixels), "image", given.rounds)


if __name__ == "__main__":
    main()
