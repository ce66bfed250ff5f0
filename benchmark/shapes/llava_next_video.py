"""LLaVA-NeXT-Video-7B (llava-hf/LLaVA-NeXT-Video-7B-hf): an image of three views, a video of 8 frames."""

import torch
from measure import arguments, compare, random_model
from transformers import LlamaConfig, LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

from vlmzip import VisionZip


def main() -> None:
    given = arguments("LLaVA-NeXT-Video-7B's shape")
    text = LlamaConfig(vocab_size=32064, num_hidden_layers=given.layers)
    config = LlavaNextVideoConfig(text_config=text)
    model = random_model(LlavaNextVideoForConditionalGeneration, config, given.dtype)
    title = f"LLaVA-NeXT-Video-7B, {given.layers} LLM layers, {given.dtype}, {given.threads} threads"

    pixels = torch.randn(1, 3, 3, 336, 336).to(model.dtype)
    sizes = torch.tensor([[336, 672]])
    methods = {f"total_tokens={total}": VisionZip(total_tokens=total) for total in (640, 320)}
    compare(
        f"{title}, image 672 x 336",
        model,
        methods,
        lambda: model.get_image_features(pixels, sizes),
        "image",
        given.rounds,
    )
    frames = torch.randn(1, 8, 3, 336, 336).to(model.dtype)
    methods = {f"tokens={tokens}": VisionZip(tokens=tokens) for tokens in (32, 16)}
    compare(
        f"{title}, video of 8 frames",
        model,
        methods,
        lambda: model.get_video_features(frames),
        "video",
        given.rounds,
    )


if __name__ == "__main__":
    main()
