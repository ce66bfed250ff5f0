"""ViP-LLaVA-7B (llava-hf/vip-llava-7b-hf): one image, at the paper's budgets for LLaVA-1.5."""

import torch
from measure import arguments, compare, random_model
from transformers import LlamaConfig, VipLlavaConfig, VipLlavaForConditionalGeneration

from vlmzip import VisionZip


def main() -> None:
    given = arguments("ViP-LLaVA-7B's shape")
    text = LlamaConfig(vocab_size=32064, num_hidden_layers=given.layers)
    model = random_model(VipLlavaForConditionalGeneration, VipLlavaConfig(text_config=text), given.dtype)
    pixels = torch.randn(1, 3, 336, 336).to(model.dtype)
    methods = {f"tokens={tokens}": VisionZip(tokens=tokens) for tokens in (192, 128, 64)}
    title = f"vip-llava-7b, {given.layers} LLM layers, {given.dtype}, {given.threads} threads, 336 x 336"
    compare(title, model, methods, lambda: model.get_image_features(pixels), "image", given.rounds)


if __name__ == "__main__":
    main()
