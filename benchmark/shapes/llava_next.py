"""LLaVA-NeXT-7B (v1.6, Vicuna): an image of five views, at the paper's budgets."""

import torch
from measure import arguments, compare, random_model
from transformers import LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

from vlmzip import VisionZip


def main() -> None:
    given = arguments("LLaVA-NeXT-7B's shape")
    text = LlamaConfig(vocab_size=32064, num_hidden_layers=given.layers)
    config = LlavaNextConfig(text_config=text)
    model = random_model(LlavaNextForConditionalGeneration, config, given.dtype)
    pixels = torch.randn(1, 5, 3, 336, 336).to(model.dtype)
    sizes = torch.tensor([[672, 672]])
    methods = {f"total_tokens={total}": VisionZip(total_tokens=total) for total in (640, 320, 160)}
    setting = f"{given.layers} LLM layers, {given.dtype}, {given.threads} threads"
    title = f"llava-v1.6-vicuna-7b, {setting}, image 672 x 672"
    compare(title, model, methods, lambda: model.get_image_features(pixels, sizes), "image", given.rounds)


if __name__ == "__main__":
    main()
