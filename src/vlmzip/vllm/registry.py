"""What the plugin serves: model types, and the architecture names it registers for them.

Imports no vllm, so that the front ends can ask before anything is started.
"""

from dataclasses import dataclass
from typing import Any

from vlmzip.errors import UnsupportedModelError


@dataclass(frozen=True)
class Served:
    """One model type that the plugin serves.

    Attributes:
        stock: vLLM's and transformers' architecture name.
        target: Our vLLM model class, as "module:Class"; the module is imported when a model starts.
    """

    stock: str
    target: str

    @property
    def architecture(self) -> str:
        """The name that only the plugin registers: a vLLM without the plugin refuses it."""
        return f"Vlmzip{self.stock}"


SERVED: dict[str, Served] = {
    "llava": Served(
        stock="LlavaForConditionalGeneration",
        target="vlmzip.vllm.llava:VlmzipLlavaForConditionalGeneration",
    ),
    "llava_next": Served(
        stock="LlavaNextForConditionalGeneration",
        target="vlmzip.vllm.llava_next:VlmzipLlavaNextForConditionalGeneration",
    ),
    "llava_onevision": Served(
        stock="LlavaOnevisionForConditionalGeneration",
        target="vlmzip.vllm.llava_onevision:VlmzipLlavaOnevisionForConditionalGeneration",
    ),
    "qwen2_vl": Served(
        stock="Qwen2VLForConditionalGeneration",
        target="vlmzip.vllm.qwen2_vl:VlmzipQwen2VLForConditionalGeneration",
    ),
    "qwen2_5_vl": Served(
        stock="Qwen2_5_VLForConditionalGeneration",
        target="vlmzip.vllm.qwen2_5_vl:VlmzipQwen2_5_VLForConditionalGeneration",
    ),
}


def served(config: Any) -> Served:
    """What serves the model of this config.

    Raises:
        UnsupportedModelError: The plugin does not serve its model type.
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in SERVED:
        raise UnsupportedModelError(
            f"model_type {model_type!r} is not served with vLLM; served: {', '.join(sorted(SERVED))}"
        )
    return SERVED[model_type]
