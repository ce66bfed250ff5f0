"""LLaVA-1.5, BakLLaVA and other LLaVAs with one view an image, on CLIP or SigLIP towers."""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor
from transformers import LlavaModel, PreTrainedModel

from vlmzip.attachment import Attachment, selections_of
from vlmzip.families.base import Card, Family, explain_mismatch, register
from vlmzip.merging import Order
from vlmzip.methods.base import Method
from vlmzip.select_strategy import check_strategy, refuse_default
from vlmzip.towers import Tower


@register
@dataclass(frozen=True)
class Llava(Family):
    """K tokens an image, compressed between the tower's layer -2 and the projector."""

    tower: Tower
    stock_tokens: int

    name: ClassVar[str] = "llava"
    processor_class: ClassVar[str] = "LlavaProcessor"
    order: ClassVar[Order] = "grouped"
    card: ClassVar[Card] = Card(
        models="LLaVA-1.5, BakLLaVA",
        tower="CLIP (CLS sent on) or SigLIP (no CLS)",
        layer="vision_feature_layer, usually -2",
        compressed="before the projector",
        count="K",
        tested="tiny random models, CPU",
        untested="GPU, FlashAttention kernels, published checkpoints, FSDP, DeepSpeed",
    )

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """Read tower and layer; a SigLIP tower under the "default" strategy is refused."""
        tower = Tower.from_config(config.vision_config, config.vision_feature_layer)
        default = config.vision_feature_select_strategy == "default"
        refuse_default(tower, config)
        return cls(tower, tower.patches + (tower.cls_token and not default))

    def attachment(self, method: Method) -> Attachment:
        """State for a fixed resolution and one view."""
        self._count(method)
        return Attachment(self, method, cls_token=self.tower.cls_token, views=1, dynamic=False)

    def attach(self, base: PreTrainedModel, state: Attachment) -> None:
        """Tap the tower, keep its CLS token, compress what reaches the projector."""
        self.tower.attach(base.vision_tower, state)
        state.patches.set_method(base, "get_image_features", _get_image_features)
        state.patches.set_method(base, "get_placeholder_mask", explain_mismatch)
        self.tower.compress_before(base.multi_modal_projector, state)

    def image_tokens(self, method: Method, stock: int, image_inputs: Any, index: int) -> int:
        """K, for every image."""
        return self.sized_image_tokens(method, stock, (0, 0))

    def sized_image_tokens(self, method: Method, stock: int, size: tuple[int, int]) -> int:
        """K, whatever the size."""
        if stock != self.stock_tokens:
            raise ValueError(
                f"the processor makes {stock} image tokens where this model has {self.stock_tokens}: "
                "its patch size, image size or vision_feature_select_strategy is another model's"
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
        return method.budget.count(self.tower.tokens(method.send_cls))


@functools.wraps(LlavaModel.get_image_features)
def _get_image_features(
    self: Any,
    pixel_values: Tensor,
    vision_feature_layer: Any = None,
    vision_feature_select_strategy: str | None = None,
    image_sizes: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """The stock method on all of the tower's tokens: "default" drops CLS before the projector."""
    state: Attachment = self._vlmzip
    tower: Tower = state.family.tower
    tower.check_layer(self.config, "vision_feature_layer", vision_feature_layer)
    check_strategy(self.config, vision_feature_select_strategy)
    state.family.check_unchanged(self.config)
    with state.tap.listen() as reading:
        features = type(self).get_image_features(
            self,
            pixel_values=pixel_values,
            vision_feature_layer=tower.layer,
            vision_feature_select_strategy="full",
            image_sizes=image_sizes,
            **kwargs,
        )
    state.record(selections_of(reading.zipped, tower.grid, [1] * pixel_values.shape[0]))
    return features
