"""Qwen2-VL in vLLM: images of any size, compressed after the patch merger."""

from vllm.model_executor.models.qwen2_vl import (
    Qwen2VLForConditionalGeneration,
    Qwen2VLMultiModalProcessor,
    Qwen2VLProcessingInfo,
)

from vlmzip.vllm.no_videos import NoVideosInfo
from vlmzip.vllm.packed import CompressedPacked, PackedProcessor
from vlmzip.vllm.processing import compressed_processing


class Info(NoVideosInfo, Qwen2VLProcessingInfo):  # type: ignore[misc]
    """K placeholders an image."""


class Processor(PackedProcessor, Qwen2VLMultiModalProcessor):  # type: ignore[misc]
    """The stock processor, with the request's budget."""


@compressed_processing(Qwen2VLForConditionalGeneration, Info, Processor)
class VlmzipQwen2VLForConditionalGeneration(CompressedPacked, Qwen2VLForConditionalGeneration):  # type: ignore[misc]
    """The stock model; with settings in its config, K tokens an image reach the language model."""
