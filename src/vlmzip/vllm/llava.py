"""LLaVA-1.5 and others with one view an image in vLLM, on CLIP or SigLIP towers."""

import re
from typing import Any

from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.llava import (
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.model_executor.models.utils import StageMissingLayer, WeightsMapper

from vlmzip.errors import UnsupportedModelError
from vlmzip.vllm.encoder import ViewEncoder, project
from vlmzip.vllm.processing import CompressedInfo, CompressedProcessor, compressed_processing
from vlmzip.vllm.settings import REQUEST_KEY, engine_compression

# transformers 5 writes a tower's weights without "vision_model", which vLLM and the hub's files have.
TOWER_NAMES = WeightsMapper(
    orig_to_new_regex={
        re.compile(
            r"^((?:model\.)?vision_tower\.)(?=(?:embeddings|encoder|pre_layrnorm|post_layernorm|head)\.)"
        ): r"\1vision_model."
    }
)


class Info(CompressedInfo, LlavaProcessingInfo):  # type: ignore[misc]
    """K placeholders an image."""


class Processor(CompressedProcessor, LlavaMultiModalProcessor):  # type: ignore[misc]
    """The stock processor, with the request's budget."""

    def _check_processed(self, processed: Any) -> None:
        side = self.info.ctx.get_hf_config().vision_config.image_size
        for pixels_CHW in processed["pixel_values"]:
            if tuple(pixels_CHW.shape[-2:]) != (side, side):
                height, width = pixels_CHW.shape[-2:]
                raise ValueError(
                    f"the request's mm_processor_kwargs made an image of {height} x {width} pixels, this "
                    f"model takes {side} x {side}; leave size and crop_size as they are"
                )


@compressed_processing(LlavaForConditionalGeneration, Info, Processor)
class VlmzipLlavaForConditionalGeneration(LlavaForConditionalGeneration):  # type: ignore[misc]
    """The stock model; with settings in its config, K tokens an image reach the projector."""

    hf_to_vllm_mapper = LlavaForConditionalGeneration.hf_to_vllm_mapper | TOWER_NAMES

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = vllm_config.model_config.hf_config
        self.compression = engine_compression(vllm_config.model_config)
        self.encoder: ViewEncoder | None = None
        if self.compression is None or isinstance(self.vision_tower, StageMissingLayer):
            return
        if not isinstance(config.vision_feature_layer, int):
            raise UnsupportedModelError(
                f"vision_feature_layer={config.vision_feature_layer}: vLLM's LLaVA takes the features of "
                "one layer only"
            )
        self.encoder = ViewEncoder.of_tower(self.vision_tower, self.compression, vllm_config)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Tokens of each image, [K, D]; embeddings that a client made are passed on as they are."""
        asked = kwargs.pop(REQUEST_KEY, None)
        if self.encoder is None or kwargs.get("pixel_values") is None:
            return super().embed_multimodal(**kwargs)
        pixels_BCHW: Tensor = self._parse_and_validate_image_input(**kwargs)["pixel_values"]
        outs = self.encoder.encode(pixels_BCHW, [1] * len(pixels_BCHW), asked.tolist())
        return [tokens_1KD[0] for tokens_1KD in project(self.multi_modal_projector, outs)]

    def get_mm_lora_token_counts(
        self, *, modality: str, mm_kwargs: Any, num_mm_embeds: int
    ) -> tuple[int, int | None]:
        """Tokens of an image in the tower, CLS included, and in the projector.

        Without ``mm_kwargs``: the most that go with so many embeddings, of which an image has one or
        more.
        """
        if self.compression is None:
            counts: tuple[int, int | None] = super().get_mm_lora_token_counts(
                modality=modality, mm_kwargs=mm_kwargs, num_mm_embeds=num_mm_embeds
            )
            return counts
        family: Any = self.compression.family
        images = num_mm_embeds if mm_kwargs is None else 1
        return images * family.tower.tokens(send_cls=True), num_mm_embeds
