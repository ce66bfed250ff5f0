"""Idefics3: crops and the whole image, compressed after the connector's pixel shuffle."""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers import Idefics3Model, PreTrainedModel
from transformers.processing_utils import ProcessorMixin
from transformers.utils.generic import can_return_tuple

from vlmzip.attachment import Attachment
from vlmzip.families.base import Card, Family, foreign_prompt, register
from vlmzip.merging import Order
from vlmzip.methods.base import Method
from vlmzip.pixel_shuffle import ShuffledTower, runs


@register
@dataclass(frozen=True)
class Idefics3(Family):
    """K tokens a crop and K for the whole image; the tags that say which crop is which stay.

    The image processors resize every view to the model's view size, so no view has padding patches, and
    K follows from the image's size; views that only fill up a batch are dropped by the model itself. A
    ``pixel_attention_mask`` that pads part of a view is refused: padding would be scored or kept.

    Kept tokens are tokens of the language model's own space; ``merge="reference"`` makes contextual ones
    about twice as large there, ``"average"`` does not.

    The model is not told which crops are one image's. :attr:`Compressed.last` takes it from the prompt,
    where the whole image stands last, after a tag of its own; a tokenizer that has no token for the tag
    makes every view an entry.
    """

    shuffled: ShuffledTower

    name: ClassVar[str] = "idefics3"
    processor_class: ClassVar[str] = "Idefics3Processor"
    order: ClassVar[Order] = "raster"
    card: ClassVar[Card] = Card(
        models="Idefics3",
        tower="SigLIP-like (no CLS)",
        layer="the last block",
        compressed="after the connector, on tokens merged by its pixel shuffle, every view on its own",
        count="K x (crops + 1), K if the image is not split",
        tested="tiny random models, CPU",
        untested="GPU, FlashAttention kernels, published checkpoints, FSDP, DeepSpeed",
    )

    mismatch: ClassVar[str] = ""  # what else can be behind a wrong number of placeholders

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """Read tower and shuffle."""
        vision, side = config.vision_config, config.scale_factor
        return cls(ShuffledTower.from_config(vision, side=side, cls_token=False, layer=-1))

    def attachment(self, method: Method) -> Attachment:
        """State for views of a fixed size; a budget for whole images is refused."""
        self.shuffled.count(method)
        return Attachment(self, method, cls_token=False, views=1, dynamic=False)

    def attach(self, base: PreTrainedModel, state: Attachment) -> None:
        """Tap the tower, compress what the connector gives, check what goes into the prompt."""
        self.shuffled.tower.attach(base.vision_model, state)
        state.patches.set_method(base, "get_image_features", _get_image_features)
        # Newer releases of transformers put features into SmolVLM's prompts as in most models.
        for method in (_inputs_merger, _get_placeholder_mask):
            if hasattr(base, name := method.__name__[1:]):
                state.patches.set_method(base, name, method)

    def image_tokens(self, method: Method, stock: int, image_inputs: Any, index: int) -> int:
        """K times the image's views."""
        return self.shuffled.views(stock, image_inputs) * self.shuffled.count(method)

    def sized_image_tokens(self, method: Method, stock: int, size: tuple[int, int]) -> int:
        """K times the views, and the tags, which stock counts too."""
        n = self.shuffled.tokens
        # n + 3 with its tags for the whole image, n + 2 for a crop, 1 for a row of crops.
        views = 1 + max(0, stock - n - 3) // (n + 2)
        return stock - views * (n - self.shuffled.count(method))

    def check_expanded(self, method: Method, placeholders: int, token: str) -> None:
        """Placeholders of prompts without images must come in multiples of K."""
        self.shuffled.check_expanded(method, placeholders, token)

    def check_processor(self, processor: ProcessorMixin, config: Any, method: Method) -> None:
        """Check, on a dummy image, that a processor fits this model."""
        super().check_processor(processor, config, method)
        self.shuffled.check_length(processor, "image_seq_len")


@functools.wraps(Idefics3Model.get_image_features)
@can_return_tuple  # type: ignore[untyped-decorator]
def _get_image_features(
    self: Any, pixel_values: Tensor, pixel_attention_mask: Tensor | None = None, **kwargs: Any
) -> Any:
    """The stock method, listened to, and K of the tokens that it gives for each view."""
    state: Attachment = self._vlmzip
    shuffled: ShuffledTower = state.family.shuffled
    state.family.check_unchanged(self.config)
    shuffled.check_pixels(pixel_values)
    if pixel_attention_mask is not None:
        _check_unpadded(pixel_attention_mask, self.config.vision_config.patch_size)
    kwargs["return_dict"] = True
    with state.tap.listen() as reading:
        features = type(self).get_image_features(self, pixel_values, pixel_attention_mask, **kwargs)
    given = features.pooler_output
    if isinstance(given, Tensor):
        features.pooler_output = shuffled.compress(given, reading, state)
    else:  # newer releases: a tensor for each prompt, its views one after the other
        views = [len(one) // shuffled.tokens for one in given]
        every = torch.cat(list(given)).unflatten(0, (-1, shuffled.tokens))
        kept = shuffled.compress(every, reading, state).split(views)
        features.pooler_output = [one.flatten(0, 1) for one in kept]
    return features


def _check_unpadded(mask: Tensor, patch: int) -> None:
    """Refuse views that are in part padding; views that are nothing else only fill up a batch.

    Raises:
        ValueError: There are some.
    """
    patches = mask.flatten(0, -3).unfold(1, patch, patch).unfold(2, patch, patch).sum((-1, -2)) > 0
    patches = patches.flatten(1)
    unpadded = (patches.all(1) | ~patches.any(1)).all()
    message = (
        "pixel_attention_mask pads part of a view: padding patches would be scored and kept as if they "
        "were the image, and this family's image processors make none; resize views to the model's size"
    )
    if torch.compiler.is_compiling():
        torch._assert_async(unpadded, message)
    elif not unpadded:
        raise ValueError(message)


def _inputs_merger(self: Any, input_ids: Any, inputs_embeds: Any, image_hidden_states: Any) -> Any:
    """The stock method, which counts nothing, after a check."""
    _match_prompt(self, input_ids, inputs_embeds, image_hidden_states)
    return type(self).inputs_merger(self, input_ids, inputs_embeds, image_hidden_states)


def _get_placeholder_mask(self: Any, input_ids: Any, inputs_embeds: Any, image_features: Any) -> Any:
    """The stock method, after a check that says what was forgotten."""
    _match_prompt(self, input_ids, inputs_embeds, image_features)
    return type(self).get_placeholder_mask(self, input_ids, inputs_embeds, image_features)


def _match_prompt(self: Any, input_ids: Any, inputs_embeds: Any, features: Tensor) -> None:
    """Check that placeholders and tokens are as many; learn from the prompt which views are an image's.

    Raises:
        ValueError: They are not.
    """
    state: Attachment = self._vlmzip
    if input_ids is None:
        token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        mask_BS = (inputs_embeds == self.get_input_embeddings()(token)).all(-1)
    else:
        mask_BS = input_ids == self.config.image_token_id
    given = features.shape[:-1].numel()
    if torch.compiler.is_compiling():
        torch._assert_async(mask_BS.sum() == given, "image features and image tokens do not match")
    elif (wanted := int(mask_BS.sum())) != given:
        raise ValueError(
            f"the prompt has {wanted} image placeholders for {given} image tokens. "
            f"{foreign_prompt(state.method)}{state.family.mismatch}"
        )
    elif input_ids is not None:
        rows = zip(input_ids.tolist(), runs(mask_BS), strict=True)
        state.join([_views_of_images(ids, views) for ids, views in rows])


def _views_of_images(ids: list[int], views: list[tuple[int, int]]) -> list[int]:
    """How many views each image of a prompt has: its last follows the tag that the prompt's last does."""
    tags = [ids[start - 1] for start, _ in views]
    ends = [index + 1 for index, tag in enumerate(tags) if tag == tags[-1]]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
