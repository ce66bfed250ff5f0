"""Mini-Gemini-7B: an image in both resolutions, at the paper's budgets."""

import torch
from measure import arguments, compare, random_model
from transformers import LlamaConfig

from vlmzip import VisionZip
from vlmzip.mini_gemini import MiniGeminiConfig, MiniGeminiForConditionalGeneration


def main() -> None:
    given = arguments("Mini-Gemini-7B's shape")
    text = LlamaConfig(vocab_size=32064, num_hidden_layers=given.layers)
    model = random_model(MiniGeminiForConditionalGeneration, MiniGeminiConfig(text_config=text))
    low, high = torch.randn(1, 3, 336, 336).bfloat16(), torch.randn(1, 3, 768, 768).bfloat16()
    methods = {f"tokens={tokens}": VisionZip(tokens=tokens) for tokens in (192, 128, 64)}
    title = f"Mini-Gemini-7B, {given.layers} LLM layers, bf16, {given.threads} threads, 336 and 768"
    compare(title, model, methods, lambda: model.get_image_features(low, high), "image", given.rounds)


if __name__ == "__main__":
    main()
