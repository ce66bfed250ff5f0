"""ViP-LLaVA: a LLaVA whose projector gets the features of several layers side by side."""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel, VipLlavaModel
from transformers.utils.generic import can_return_tuple

from vlmzip.attachment import Attachment, selections_of
from vlmzip.errors import UnsupportedModelError
from vlmzip.families.base import Card, explain_mismatch, register
from vlmzip.families.llava import Llava
from vlmzip.towers import Tower


@register
@dataclass(frozen=True)
class VipLlava(Llava):
    """K tokens an image; the deepest of the listed layers chooses for all of them.

    The projector begins with a layer norm, which takes back the magnitude that ``merge="reference"``
    adds to a merged token.
    """

    name: ClassVar[str] = "vipllava"
    card: ClassVar[Card] = Card(
        models="ViP-LLaVA",
        tower="CLIP (CLS sent on), several layers concatenated",
        layer="the deepest of vision_feature_layers, usually -2",
        compressed="before the projector, all layers alike",
        count="K",
        tested="tiny random models, CPU",
        untested="GPU, FlashAttention kernels, published checkpoints, FSDP, DeepSpeed",
    )

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """Read tower and layers; the model drops each layer's first token, so that must be CLS."""
        tower = Tower.from_config(config.vision_config, config.vision_feature_layers)
        if not tower.cls_token:
            raise UnsupportedModelError(
                f"a vipllava on a {config.vision_config.model_type!r} tower drops a patch as if it "
                "were a CLS token; supported: clip_vision_model"
            )
        return cls(tower, tower.patches)

    def attach(self, base: PreTrainedModel, state: Attachment) -> None:
        """Tap the tower, keep its CLS token, compress what reaches the projector."""
        self.tower.attach(base.vision_tower, state)
        state.patches.set_method(base, "get_image_features", _get_image_features)
        state.patches.set_method(base, "get_placeholder_mask", explain_mismatch)
        self.tower.compress_before(base.multi_modal_projector, state)


@functools.wraps(VipLlavaModel.get_image_features)
@can_return_tuple  # type: ignore[untyped-decorator]
def _get_image_features(
    self: Any,
    pixel_values: Tensor,
    vision_feature_layers: Any = None,
    vision_feature_layer: Any = None,  # its name from transformers 5.23 on
    **kwargs: Any,
) -> Any:
    """What the stock method does, but with the CLS token of every layer."""
    if vision_feature_layers is None:
        vision_feature_layers = vision_feature_layer
    state: Attachment = self._vlmzip
    tower: Tower = state.family.tower
    tower.check_layer(self.config, "vision_feature_layers", vision_feature_layers)
    state.family.check_unchanged(self.config)
    layers = tower.layer if isinstance(tower.layer, tuple) else (tower.layer,)
    with state.tap.listen() as reading:
        outputs = self.vision_tower(pixel_values, **{**kwargs, "output_hidden_states": True})
        features = torch.cat([outputs.hidden_states[layer] for layer in layers], dim=-1)
        outputs.pooler_output = self.multi_modal_projector(features)
    state.record(selections_of(reading.zipped, tower.grid, [1] * pixel_values.shape[0]))
    return outputs
