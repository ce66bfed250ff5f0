"""Qwen2-VL-7B (Qwen/Qwen2-VL-7B-Instruct): one image, at two shares and at 64 tokens."""

from measure import arguments
from one_image import compare_one_image
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

SIDE = 448  # pixels: 32 x 32 patches, 256 merged tokens


def main() -> None:
    given = arguments("Qwen2-VL-7B's shape")
    config = Qwen2VLConfig(
        text_config={
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": given.layers,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24]},
        },
    )
    compare_one_image("qwen2-vl-7b", Qwen2VLForConditionalGeneration, config, SIDE, given)


if __name__ == "__main__":
    main()
