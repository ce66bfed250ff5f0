"""The processor: LLaVA's, which makes each image in two resolutions."""

from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate
from transformers import BatchFeature, LlavaProcessor
from transformers.processing_utils import MultiModalData


class MiniGeminiProcessor(LlavaProcessor):  # type: ignore[misc]
    """Processes images at the high resolution, then scales the result down for the CLIP tower.

    The low-resolution pixels are interpolated (bilinear, without antialiasing) from the normalised
    high-resolution ones, as the published code does, not made from the image anew.

    Args:
        image_processor: Makes square images of the high resolution, normalised as CLIP's.
        tokenizer: Knows ``image_token``.
        patch_size: The CLIP tower's, in pixels.
        vision_feature_select_strategy: "default", the CLS token is dropped.
        chat_template: For ``apply_chat_template``.
        image_token: Where an image goes.
        num_additional_image_tokens: 1, the CLS token.
        low_image_size: Height and width in pixels of the CLIP tower's images.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int = 14,
        vision_feature_select_strategy: str = "default",
        chat_template: str | None = None,
        image_token: str = "<image>",
        num_additional_image_tokens: int = 1,
        low_image_size: int = 336,
    ) -> None:
        self.low_image_size = low_image_size
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
        )

    @property
    def model_input_names(self) -> list[str]:
        """The stock names, and ``pixel_values_high``."""
        return [*super().model_input_names, "pixel_values_high"]

    def _process_images(self, images: Any, **kwargs: Any) -> Any:
        high = self.image_processor(images, **kwargs)
        pixels = torch.from_numpy(np.stack([np.asarray(one) for one in high["pixel_values"]]))
        size = (self.low_image_size, self.low_image_size)
        low = interpolate(pixels, size=size, mode="bilinear", align_corners=False)
        processed = BatchFeature({"pixel_values": low.numpy(), "pixel_values_high": high["pixel_values"]})
        count = len(processed["pixel_values"])
        return processed, [self.replace_image_token(processed, index, **kwargs) for index in range(count)]

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> Any:
        if image_sizes is None:
            return MultiModalData()
        tokens = (self.low_image_size // self.patch_size) ** 2
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[tokens] * count, num_image_patches=[1] * count)
