"""PaliGemma and PaliGemma 2: one view an image, a SigLIP tower that is read at its last block."""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from torch import Tensor
from transformers import PaliGemmaModel, PreTrainedModel

from vlmzip.attachment import Attachment, selections_of
from vlmzip.errors import UnsupportedModelError
from vlmzip.families.base import Card, Family, explain_mismatch, register
from vlmzip.merging import Order
from vlmzip.methods.base import Method
from vlmzip.towers import Tower


@register
@dataclass(frozen=True)
class PaliGemma(Family):
    """K tokens an image, compressed before the one linear layer that is the projector.

    The last block chooses, by the attention that patches receive; the tokens are its output after the
    tower's final layer norm, which is what the projector gets. The projector has a bias, and tokens are
    merged before it, so a merged token has it once. The prompt stays a prefix that sees itself in both
    directions: the kept tokens are in it as all tokens were.
    """

    tower: Tower
    side: int

    name: ClassVar[str] = "paligemma"
    processor_class: ClassVar[str] = "PaliGemmaProcessor"
    order: ClassVar[Order] = "raster"
    card: ClassVar[Card] = Card(
        models="PaliGemma, PaliGemma 2",
        tower="SigLIP (no CLS)",
        layer="the last block",
        compressed="before the projector, after the tower's last layer norm",
        count="K",
        tested="tiny random models on Gemma and Gemma 2, CPU; training with suffixes",
        untested="GPU, FlashAttention kernels, published checkpoints, FSDP, DeepSpeed",
    )

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """Read the tower; one with a CLS token is refused."""
        return cls(siglip_tower(config), config.vision_config.image_size)

    def attachment(self, method: Method) -> Attachment:
        """State for a fixed resolution and one view."""
        self._count(method)
        return Attachment(self, method, cls_token=False, views=1, dynamic=False)

    def attach(self, base: PreTrainedModel, state: Attachment) -> None:
        """Tap the tower; compress what reaches the projector. Every block runs: the last is read."""
        self.tower.attach(base.vision_tower, state)
        state.patches.set_method(base, "get_image_features", _get_image_features)
        state.patches.set_method(base, "get_placeholder_mask", explain_mismatch)
        self.tower.compress_before(base.multi_modal_projector, state)

    def image_tokens(self, method: Method, stock: int, image_inputs: Any, index: int) -> int:
        """K, for every image."""
        check_pixels(image_inputs["pixel_values"], self.side)
        return self.sized_image_tokens(method, stock, (0, 0))

    def sized_image_tokens(self, method: Method, stock: int, size: tuple[int, int]) -> int:
        """K, whatever the size."""
        if stock != self.tower.patches:
            raise ValueError(
                f"the processor makes {stock} image tokens where this model has {self.tower.patches}: "
                "its image_seq_length is another model's"
            )
        return self._count(method)

    def check_expanded(self, method: Method, placeholders: int, token: str) -> None:
        """Placeholders of prompts without images must come in multiples of K."""
        if placeholders % self._count(method):
            raise ValueError(
                f"the text has {placeholders} {token} placeholders and no images were given; pass "
                f"images=, or write {self._count(method)} placeholders for each image encoded before"
            )

    def _count(self, method: Method) -> int:
        return method.budget.count(self.tower.patches)


def siglip_tower(config: Any) -> Tower:
    """The tower of a model that hands its SigLIP's last hidden state on.

    Raises:
        UnsupportedModelError: The tower is of another kind; a CLS token would count as a patch.
    """
    tower = Tower.from_config(config.vision_config, -1)
    if tower.cls_token:
        raise UnsupportedModelError(
            f"a {config.model_type} with a {config.vision_config.model_type!r} tower is not supported: "
            "its CLS token would count as a patch; supported: siglip_vision_model"
        )
    return tower


def check_pixels(pixel_values: Any, side: int) -> None:
    """Check the size of processed images, on the first: a processor's token count is a mere setting.

    Raises:
        ValueError: The images are of another size than the tower's.
    """
    height, width = np.shape(pixel_values[0])[-2:]
    if (height, width) != (side, side):
        raise ValueError(
            f"the processor makes images of {height} x {width} pixels where this model takes {side} x "
            f"{side}: its size is another model's"
        )


@functools.wraps(PaliGemmaModel.get_image_features)
def _get_image_features(self: Any, pixel_values: Tensor, **kwargs: Any) -> Any:
    """The stock method, listened to."""
    state: Attachment = self._vlmzip
    state.family.check_unchanged(self.config)
    with state.tap.listen() as reading:
        features = type(self).get_image_features(self, pixel_values, **kwargs)
    state.record(selections_of(reading.zipped, state.family.tower.grid, [1] * len(pixel_values)))
    return features
