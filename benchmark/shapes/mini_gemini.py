"""Mini-Gemini-7B: an image in both resolutions, at the paper's budgets."""

import torch
from measure import arguments, compare, random_model
from transformers import LlamaConfig

from vlmzip import VisionZip
from vlmzip.mini_gemini import MiniGeminiConfig, MiniGeminiForConditionalGeneration


def main() -> None:
    given = arguments("Mini-Gemini-7B's shape")
    text = LlamaConfig(vocab_size=32064, num_hidden_layers=given.layers)
    config = MiniGeminiConfig(text_config=text)
    model = random_model(MiniGeminiForConditionalGeneration, config, given.dtype)
    low = torch.randn(1, 3, 336, 336).to(model.dtype)
    high = torch.randn(1, 3, 768, 768).to(model.dtype)
    methods = {f"tokens={tokens}": VisionZip(tokens=tokens) for tokens in (192, 128, 64)}
    setting = f"{given.layers} LLM layers, {given.dtype}, {given.threads} threads"
    title = f"Mini-Gemini-7B, {setting}, 336 and 768"
    compare(title, model, methods, lambda: model.get_image_features(low, high), "image", given.rounds)


if __name__ == "__main__":
    main()
