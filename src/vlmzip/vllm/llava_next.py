"""LLaVA-NeXT (LLaVA-1.6) in vLLM: a base view and crops of an image, each compressed on its own."""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.model_executor.models.utils import StageMissingLayer

from vlmzip.anyres import pack_views, size_pairs
from vlmzip.vllm.encoder import ViewEncoder, project
from vlmzip.vllm.llava import TOWER_NAMES
from vlmzip.vllm.processing import CompressedInfo, CompressedProcessor, compressed_processing
from vlmzip.vllm.settings import REQUEST_KEY, engine_compression


class Info(CompressedInfo, LlavaNextProcessingInfo):  # type: ignore[misc]
    """K placeholders a view; how many views an image has follows from its size."""


class AnyresProcessor(CompressedProcessor):
    """Before a stock processor of images that are cut into crops."""

    def _check_processed(self, processed: Any) -> None:
        family: Any = self.info.compression.family
        views = [family.anyres.views(size) for size in size_pairs(processed["image_sizes"])]
        for index in range(len(views)):
            family.anyres.check_processed(processed["pixel_values"], views, index)


class Processor(AnyresProcessor, LlavaNextMultiModalProcessor):  # type: ignore[misc]
    """The stock processor, with the request's budget."""


class CompressedAnyres:
    """Before a stock model whose images are cut into crops; K tokens a view reach the projector."""

    vision_tower: nn.Module
    multi_modal_projector: nn.Module
    select_layers: Any = None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.compression = engine_compression(vllm_config.model_config)
        self.encoder: ViewEncoder | None = None
        if self.compression is not None and not isinstance(self.vision_tower, StageMissingLayer):
            self.encoder = ViewEncoder.of_tower(
                self.vision_tower, self.compression, vllm_config, select_layers=self.select_layers
            )

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Tokens of each image, [V * K, D]; embeddings that a client made are passed on as they are."""
        asked = kwargs.pop(REQUEST_KEY, None)
        if self.encoder is None or kwargs.get("pixel_values") is None:
            return super().embed_multimodal(**kwargs)  # type: ignore[misc]
        stock: Any = self
        inputs = stock._parse_and_validate_image_input(**kwargs)
        sizes = size_pairs(inputs["image_sizes"])
        family, method = self.encoder.state.family, self.encoder.state.method
        views = [family.anyres.views(size) for size in sizes]
        pixels_VCHW = _join_views(inputs["pixel_values"], views)
        outs = self.encoder.encode(pixels_VCHW, views, asked.tolist())
        tokens = project(self.multi_modal_projector, outs)
        grid, cls_token = family.tower.grid, family.tower.cls_token and method.send_cls
        order = method.order or family.order
        return [
            pack_views(tokens_VKD, out, family.anyres.grid(size), grid, cls_token, order)
            for tokens_VKD, out, size in zip(tokens, outs, sizes, strict=True)
        ]


@compressed_processing(LlavaNextForConditionalGeneration, Info, Processor)
class VlmzipLlavaNextForConditionalGeneration(
    CompressedAnyres,
    LlavaNextForConditionalGeneration,  # type: ignore[misc]
):
    """The stock model; with settings in its config, K tokens a view reach the projector."""

    hf_to_vllm_mapper = LlavaNextForConditionalGeneration.hf_to_vllm_mapper | TOWER_NAMES

    def get_mm_lora_token_counts(
        self, *, modality: str, mm_kwargs: Any, num_mm_embeds: int
    ) -> tuple[int, int | None]:
        """Tokens of an image in the tower, CLS tokens included, and in the projector.

        Without ``mm_kwargs``: the most that go with so many embeddings, of which a view has one or more.
        """
        if self.compression is None:
            counts: tuple[int, int | None] = super().get_mm_lora_token_counts(
                modality=modality, mm_kwargs=mm_kwargs, num_mm_embeds=num_mm_embeds
            )
            return counts
        family: Any = self.compression.family
        sizes = mm_kwargs.get("image_sizes") if mm_kwargs else None
        views = num_mm_embeds if sizes is None else family.anyres.views(tuple(sizes.data.tolist()))
        return views * family.tower.tokens(send_cls=True), num_mm_embeds


def _join_views(pixel_values: Any, views: list[int]) -> Tensor:
    """The views of all images, one after the other; images that were processed together are padded.

    Args:
        pixel_values: [images, most views, C, H, W], or for each image [its views or more, C, H, W].
        views: How many views each image has.

    Raises:
        ValueError: An image has fewer.
    """
    for pixels_VCHW, count in zip(pixel_values, views, strict=True):
        if len(pixels_VCHW) < count:
            raise ValueError(
                f"an image came with {len(pixels_VCHW)} views where its size makes {count}: the "
                "processor's image_grid_pinpoints are not the model's"
            )
    return torch.cat([pixels[:count] for pixels, count in zip(pixel_values, views, strict=True)])
