"""InternVL3-8B (OpenGVLab/InternVL3-8B-hf): InternViT-300M and Qwen2.5-7B, 256 tokens a view."""

import torch
from measure import arguments, compare, random_model
from transformers import InternVLConfig, InternVLForConditionalGeneration, Qwen2Config

from vlmzip import VisionZip

VIEWS = 1  # an image that is cut has one for each crop and one for the whole


def main() -> None:
    given = arguments("InternVL3-8B's shape")
    text = Qwen2Config(
        vocab_size=151674,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=given.layers,
        num_attention_heads=28,
        num_key_value_heads=4,
    )
    config = InternVLConfig(text_config=text, tie_word_embeddings=False)
    model = random_model(InternVLForConditionalGeneration, config, given.dtype)
    pixels = torch.randn(VIEWS, 3, 448, 448).to(model.dtype)
    methods = {f"tokens={tokens}": VisionZip(tokens=tokens) for tokens in (128, 64)}
    setting = f"{given.layers} LLM layers, {given.dtype}, {given.threads} threads"
    title = f"InternVL3-8B, {setting}, 448 x 448, views: {VIEWS}"
    compare(title, model, methods, lambda: model.get_image_features(pixels), "image", given.rounds)


if __name__ == "__main__":
    main()
