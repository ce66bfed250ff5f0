"""Qwen2.5-VL-7B: one image, at the shares that the paper's authors report and at 64 tokens."""

from measure import arguments
from one_image import compare_one_image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

SIDE = 448  # pixels: 32 x 32 patches, 256 merged tokens


def main() -> None:
    given = arguments("Qwen2.5-VL-7B's shape")
    config = Qwen2_5_VLConfig(
        vision_config={"hidden_size": 1280},
        text_config={
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": given.layers,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24]},
        },
    )
    compare_one_image("qwen2.5-vl-7b", Qwen2_5_VLForConditionalGeneration, config, SIDE, given)


if __name__ == "__main__":
    main()
