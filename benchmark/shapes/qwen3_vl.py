"""Qwen3-VL-8B (Qwen/Qwen3-VL-8B-Instruct): one image, at two shares and at 64 tokens.

DeepStack features go into the first three layers of the language model; with fewer --layers, into those.
"""

from measure import arguments
from one_image import compare_one_image
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

SIDE = 512  # pixels: 32 x 32 patches, 256 merged tokens


def main() -> None:
    given = arguments("Qwen3-VL-8B's shape")
    rope = {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        vision_config={"out_hidden_size": 4096},
        text_config={
            "intermediate_size": 12288,
            "num_hidden_layers": given.layers,
            "num_key_value_heads": 8,
            "rope_parameters": rope | {"rope_theta": 5_000_000},
        },
    )
    compare_one_image("qwen3-vl-8b", Qwen3VLForConditionalGeneration, config, SIDE, given)


if __name__ == "__main__":
    main()
