"""Gemma 3: a SigLIP tower, its patches pooled and projected; crops of pan-and-scan."""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor
from transformers import Gemma3Model, PreTrainedModel
from transformers.utils.generic import can_return_tuple

from vlmzip.attachment import Attachment, selections_of
from vlmzip.errors import UnsupportedModelError
from vlmzip.families.base import Card, Family, explain_mismatch, register
from vlmzip.families.paligemma import check_pixels, siglip_tower
from vlmzip.merging import Order
from vlmzip.methods.base import Grid, Method
from vlmzip.towers import Tower


@register
@dataclass(frozen=True)
class Gemma3(Family):
    """K of the pooled tokens that an image, or a pan-and-scan crop, has after the projector.

    The tower's last block chooses; scores and keys are averaged over the same blocks of patches as the
    tokens are, so a kept token is one that the language model knows. In its space ``merge="reference"``
    gives a merged token about twice the magnitude (its target plus the mean of the others), which the
    projector's own norm, before it, cannot take back; ``merge="average"`` does not.

    A crop is an image of its own to the model, which does not learn whose crop it is: it has K tokens
    and an entry in ``zipped.last``, after the image it was cut from. A ``total_tokens`` budget can
    therefore not be shared out, and is refused where an image is cut. The tokens between an image's begin
    and end tokens see each other, however many are left; the processor marks those that it writes.
    """

    tower: Tower
    side: int
    grid: Grid

    name: ClassVar[str] = "gemma3"
    processor_class: ClassVar[str] = "Gemma3Processor"
    order: ClassVar[Order] = "raster"
    card: ClassVar[Card] = Card(
        models="Gemma 3 (4B and larger)",
        tower="SigLIP (no CLS)",
        layer="the last block",
        compressed="after the projector, on pooled tokens",
        count="K, K x (crops + 1) with pan-and-scan",
        tested="tiny random models, CPU; pan-and-scan; several images in a prompt",
        untested="GPU, FlashAttention kernels, published checkpoints, FSDP, DeepSpeed; a new image on a "
        "reused cache, whose mask transformers 5.19 itself gets wrong",
    )

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """Read tower and pooling; a tower with a CLS token is refused."""
        tower = siglip_tower(config)
        wanted = int(config.mm_tokens_per_image**0.5)
        if not 1 <= wanted <= tower.grid[0]:
            raise UnsupportedModelError(
                f"mm_tokens_per_image={config.mm_tokens_per_image} cannot be pooled from a grid of "
                f"{tower.grid[0]} x {tower.grid[1]} patches"
            )
        kernel = tower.grid[0] // wanted
        pooled = tower.grid[0] // kernel
        return cls(tower, config.vision_config.image_size, (pooled, pooled))

    def attachment(self, method: Method) -> Attachment:
        """State for a fixed resolution and one view."""
        self._count(method)
        return Attachment(self, method, cls_token=False, views=1, dynamic=False)

    def attach(self, base: PreTrainedModel, state: Attachment) -> None:
        """Tap the tower; compress what the projector gives. Every block runs: the last is read."""
        self.tower.attach(base.vision_tower, state)
        state.patches.set_method(base, "get_image_features", _get_image_features)
        state.patches.set_method(base, "get_placeholder_mask", explain_mismatch)

    def placeholder(self, processor: Any) -> tuple[str, int]:
        """The tokenizer's image token; prompts are written with the begin-of-image token."""
        return processor.tokenizer.image_token, processor.tokenizer.image_token_id

    def image_tokens(self, method: Method, stock: int, image_inputs: Any, index: int) -> int:
        """K for the image, and K for each of its crops."""
        check_pixels(image_inputs["pixel_values"], self.side)
        return self.sized_image_tokens(method, stock, (0, 0))

    def sized_image_tokens(self, method: Method, stock: int, size: tuple[int, int]) -> int:
        """K times the views that the processor made of the image."""
        views, odd = divmod(stock, self._tokens)
        if odd or not views:
            raise ValueError(
                f"the processor makes {stock} image tokens where this model has {self._tokens} for each "
                "image and crop: its image_seq_length is another model's"
            )
        if views > 1 and method.budget.total_tokens is not None:
            raise ValueError(
                f"total_tokens={method.budget.total_tokens} is for whole images, but pan-and-scan cut "
                f"one into {views - 1} crops, images of their own to the model; give tokens=, which "
                "counts per view, or leave do_pan_and_scan out"
            )
        return views * self._count(method)

    def check_expanded(self, method: Method, placeholders: int, token: str) -> None:
        """Placeholders of prompts without images must come in multiples of K."""
        if placeholders % self._count(method):
            raise ValueError(
                f"the text has {placeholders} {token} placeholders and no images were given; pass "
                f"images=, or write {self._count(method)} placeholders for each image encoded before"
            )

    @property
    def _tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def _count(self, method: Method) -> int:
        return method.budget.count(self._tokens)


@functools.wraps(Gemma3Model.get_image_features)
@can_return_tuple  # type: ignore[untyped-decorator]
def _get_image_features(self: Any, pixel_values: Tensor, **kwargs: Any) -> Any:
    """The stock method, listened to, and K of the pooled tokens that its projector gives."""
    state: Attachment = self._vlmzip
    family: Gemma3 = state.family
    family.check_unchanged(self.config)
    with state.tap.listen() as reading:
        features = type(self).get_image_features(self, pixel_values, **{**kwargs, "return_dict": True})
        ((scores_BN, keys_BNd),) = reading.take()
    pool = self.multi_modal_projector.avg_pool
    rows = family.tower.grid[0]
    keys_BMd = pool(keys_BNd.transpose(1, 2).unflatten(2, (rows, -1))).flatten(2).transpose(1, 2)
    scores_BM = pool(scores_BN.unflatten(1, (rows, -1))).flatten(1)
    out = state.zip_views(features.pooler_output, scores_BM, keys_BMd, family.grid, pooled=True)
    features.pooler_output = out.tokens
    state.record(selections_of(out, family.grid, [1] * len(pixel_values)))
    return features
