"""LLaVA-OneVision in vLLM: a base view and crops of an image, each compressed on its own; no videos."""

from typing import Any

from vllm.model_executor.models.llava_next import LlavaNextProcessingInfo
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)

from vlmzip.vllm.llava import TOWER_NAMES
from vlmzip.vllm.llava_next import AnyresProcessor, CompressedAnyres
from vlmzip.vllm.no_videos import NoVideosInfo
from vlmzip.vllm.processing import compressed_processing


class Info(NoVideosInfo, LlavaOnevisionProcessingInfo):  # type: ignore[misc]
    """K placeholders a view; every image is cut into crops, also where it shares its prompt."""

    def get_image_size_with_most_features(self) -> Any:
        """The pinpoint of most views; the stock model shrinks what has many, so it names another."""
        return LlavaNextProcessingInfo.get_image_size_with_most_features(self)


class Processor(AnyresProcessor, LlavaOnevisionMultiModalProcessor):  # type: ignore[misc]
    """The stock processor, with the request's budget."""


@compressed_processing(LlavaOnevisionForConditionalGeneration, Info, Processor)
class VlmzipLlavaOnevisionForConditionalGeneration(
    CompressedAnyres,
    LlavaOnevisionForConditionalGeneration,  # type: ignore[misc]
):
    """The stock model; with settings in its config, K tokens a view reach the projector."""

    hf_to_vllm_mapper = LlavaOnevisionForConditionalGeneration.hf_to_vllm_mapper | TOWER_NAMES
