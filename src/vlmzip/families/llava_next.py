"""LLaVA-NeXT (LLaVA-1.6): a base view and crops of one image, each compressed on its own."""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers import LlavaNextModel, PreTrainedModel
from transformers.processing_utils import ProcessorMixin

from vlmzip.anyres import Anyres, pack_views, size_pairs, slice_views
from vlmzip.attachment import Attachment, selections_of
from vlmzip.families.base import Card, Family, explain_mismatch, register
from vlmzip.merging import Order
from vlmzip.methods.base import Method
from vlmzip.select_strategy import check_strategy, refuse_default
from vlmzip.towers import Tower


@register
@dataclass(frozen=True)
class LlavaNext(Family):
    """K tokens a view, in the reference code's order; no newline tokens, no unpadding.

    An image is 1 base view and the crops of its grid, which its size fixes, so K x (crops + 1)
    placeholders. The base view's tokens come first, then the crops' kept patches in the raster order of
    the whole image, then the crops' CLS tokens, then their contextual tokens, crop by crop; with
    ``order="raster"`` the contextual tokens stand among the patches, at their targets' places. Kept
    patches may lie in the padding round an image, as in the reference; so near K = N an image with much
    padding has more tokens than without compression, which cuts its padding off.
    """

    tower: Tower
    anyres: Anyres
    full: bool

    name: ClassVar[str] = "llava_next"
    processor_class: ClassVar[str] = "LlavaNextProcessor"
    order: ClassVar[Order] = "grouped"
    card: ClassVar[Card] = Card(
        models="LLaVA-NeXT (LLaVA-1.6)",
        tower="CLIP (CLS sent on) or SigLIP (no CLS)",
        layer="vision_feature_layer, usually -2",
        compressed="before the projector, every view on its own",
        count="K x (crops + 1), from the image's size",
        tested="tiny random models, CPU",
        untested="GPU, FlashAttention kernels, published checkpoints, FSDP, DeepSpeed",
    )

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """Read tower, layer and pinpoints; a SigLIP tower under the "default" strategy is refused."""
        tower = Tower.from_config(config.vision_config, config.vision_feature_layer)
        full = config.vision_feature_select_strategy == "full"
        refuse_default(tower, config)
        return cls(tower, Anyres.from_config(config), full)

    def attachment(self, method: Method) -> Attachment:
        """State for a fixed resolution and as many views as the pinpoints allow."""
        self._count(method)
        return Attachment(
            self, method, cls_token=self.tower.cls_token, views=self.anyres.most_views, dynamic=False
        )

    def attach(self, base: PreTrainedModel, state: Attachment) -> None:
        """Tap the tower, keep its CLS token, compress what reaches the projector, pack the views."""
        self.tower.attach(base.vision_tower, state)
        state.patches.set_method(base, "get_image_features", _get_image_features)
        state.patches.set_method(base, "pack_image_features", pack_image_features)
        state.patches.set_method(base, "get_placeholder_mask", explain_mismatch)
        self.tower.compress_before(base.multi_modal_projector, state)

    def image_tokens(self, method: Method, stock: int, image_inputs: Any, index: int) -> int:
        """K times the views of the image."""
        sizes = size_pairs(image_inputs["image_sizes"])
        views = [self.anyres.views(size) for size in sizes]
        self.anyres.check_processed(image_inputs["pixel_values"], views, index)
        return self.sized_image_tokens(method, stock, sizes[index])

    def sized_image_tokens(self, method: Method, stock: int, size: tuple[int, int]) -> int:
        """K times the views of an image of that size."""
        return self.anyres.views(size) * self._count(method)

    def check_expanded(self, method: Method, placeholders: int, token: str) -> None:
        """Placeholders of prompts without images: multiples of K, two views or more."""
        k = self._count(method)
        if placeholders % k or 0 < placeholders < 2 * k:
            raise ValueError(
                f"the text has {placeholders} {token} placeholders and no images were given; pass "
                f"images=, or write {k} placeholders for each view of the images encoded before"
            )

    def check_processor(self, processor: ProcessorMixin, config: Any, method: Method) -> None:
        """Check, on a dummy image and one size that needs no unpadding, that a processor fits."""
        super().check_processor(processor, config, method)
        base_tokens = self.tower.tokens(send_cls=self.full)
        self.anyres.check_processor(processor, base_tokens, self.tower.grid)

    def _count(self, method: Method) -> int:
        return self.anyres.count(method, self.tower.tokens(method.send_cls))


@functools.wraps(LlavaNextModel.get_image_features)
def _get_image_features(
    self: Any,
    pixel_values: Tensor,
    image_sizes: Tensor,
    vision_feature_layer: Any = None,
    vision_feature_select_strategy: str | None = None,
    **kwargs: Any,
) -> Any:
    """The stock method on all of the tower's tokens: "default" drops CLS before the projector."""
    state: Attachment = self._vlmzip
    family: LlavaNext = state.family
    family.tower.check_layer(self.config, "vision_feature_layer", vision_feature_layer)
    check_strategy(self.config, vision_feature_select_strategy)
    state.family.check_unchanged(self.config)
    views = family.anyres.views_in(pixel_values, image_sizes)
    with state.tap.listen() as reading:
        features = type(self).get_image_features(
            self,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            vision_feature_layer=family.tower.layer,
            vision_feature_select_strategy="full",
            **kwargs,
        )
    state.record(selections_of(reading.zipped, family.tower.grid, views))
    return features


def pack_image_features(
    self: Any, image_features: Any, image_sizes: Tensor, *args: Any, **kwargs: Any
) -> tuple[list[Tensor], Tensor]:
    """Lay the kept tokens of each image in order, instead of rows ended by newline tokens.

    Outside a compressed forward it is the stock method.

    Args:
        self: The base model.
        image_features: Per image the kept tokens [V, K, D] after the projector.
        image_sizes: [images, 2], height and width in pixels.
        args: For the stock method.
        kwargs: For the stock method.

    Returns:
        Per image its tokens [V * K, D], and the number of them.
    """
    state: Attachment = self._vlmzip
    reading = state.tap.reading
    if reading is None:
        stock = type(self).pack_image_features
        packed: tuple[list[Tensor], Tensor] = stock(self, image_features, image_sizes, *args, **kwargs)
        return packed
    assert reading.zipped is not None
    tower, anyres = state.family.tower, state.family.anyres
    cls_token = tower.cls_token and state.method.send_cls
    order = state.method.order or state.family.order
    images, start = [], 0
    for tokens_VKD, size in zip(image_features, size_pairs(image_sizes), strict=True):
        out = slice_views(reading.zipped, start, start + len(tokens_VKD))
        crops = anyres.grid(size)
        images.append(pack_views(tokens_VKD, out, crops, tower.grid, cls_token, order))
        start += len(tokens_VKD)
    return images, torch.tensor([len(image) for image in images], device=images[0].device)
