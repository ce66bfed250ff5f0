"""Video-LLaVA-7B: a video of eight frames, at the paper's 136 tokens and twice that."""

import torch
from measure import arguments, compare, random_model
from transformers import LlamaConfig, VideoLlavaConfig, VideoLlavaForConditionalGeneration

from vlmzip import VisionZip


def main() -> None:
    given = arguments("Video-LLaVA-7B's shape")
    text = LlamaConfig(vocab_size=32064, num_hidden_layers=given.layers)
    config = VideoLlavaConfig(text_config=text)
    model = random_model(VideoLlavaForConditionalGeneration, config, given.dtype)
    pixels = torch.randn(1, 8, 3, 224, 224).to(model.dtype)
    methods = {f"tokens={tokens}": VisionZip(tokens=tokens) for tokens in (34, 17)}
    title = f"Video-LLaVA-7B, {given.layers} LLM layers, {given.dtype}, {given.threads} threads, 8 frames"
    compare(title, model, methods, lambda: model.model.get_video_features(pixels), "video", given.rounds)


if __name__ == "__main__":
    main()
