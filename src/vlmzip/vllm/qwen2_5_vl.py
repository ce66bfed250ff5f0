"""Qwen2.5-VL in vLLM: images of any size, compressed after the patch merger."""

from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)

from vlmzip.vllm.no_videos import NoVideosInfo
from vlmzip.vllm.packed import CompressedPacked, PackedProcessor
from vlmzip.vllm.processing import compressed_processing


class Info(NoVideosInfo, Qwen2_5_VLProcessingInfo):  # type: ignore[misc]
    """K placeholders an image."""


class Processor(PackedProcessor, Qwen2_5_VLMultiModalProcessor):  # type: ignore[misc]
    """The stock processor, with the request's budget."""


@compressed_processing(Qwen2_5_VLForConditionalGeneration, Info, Processor)
class VlmzipQwen2_5_VLForConditionalGeneration(
    CompressedPacked,
    Qwen2_5_VLForConditionalGeneration,  # type: ignore[misc]
):
    """The stock model; with settings in its config, K tokens an image reach the language model."""
