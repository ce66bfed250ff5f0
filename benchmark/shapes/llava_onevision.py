"""LLaVA-OneVision-7B: an image of three views and a video of four frames."""

import torch
from measure import arguments, compare, random_model
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, Qwen2Config

from vlmzip import VisionZip


def main() -> None:
    given = arguments("LLaVA-OneVision-7B's shape")
    text = Qwen2Config(
        vocab_size=152000,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=given.layers,
        num_attention_heads=28,
        num_key_value_heads=4,
    )
    config = LlavaOnevisionConfig(text_config=text)
    model = random_model(LlavaOnevisionForConditionalGeneration, config, given.dtype)
    title = f"llava-onevision-qwen2-7b, {given.layers} LLM layers, {given.dtype}, {given.threads} threads"
    methods = {f"tokens={tokens}": VisionZip(tokens=tokens) for tokens in (128, 64)}

    pixels = torch.randn(1, 3, 3, 384, 384).to(model.dtype)
    sizes = torch.tensor([[384, 768]])
    compare(
        f"{title}, image 768 x 384",
        model,
        methods,
        lambda: model.get_image_features(pixels, sizes),
        "image",
        given.rounds,
    )
    frames = torch.randn(1, 4, 3, 384, 384).to(model.dtype)
    methods = {f"tokens={tokens}": VisionZip(tokens=tokens) for tokens in (32, 16)}
    compare(
        f"{title}, video of 4 frames",
        model,
        methods,
        lambda: model.get_video_features(frames),
        "video",
        given.rounds,
    )


if __name__ == "__main__":
    main()
