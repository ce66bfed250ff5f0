"""The model: LLaVA, whose image tokens first mine a high-resolution feature map.

Shapes: B images, N low-resolution patches, K of them, W high-resolution positions in a patch's window,
D channels of the low-resolution tower, C of all the high-resolution stages together.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, scaled_dot_product_attention
from transformers import AutoModel, LlavaForConditionalGeneration, LlavaModel
from transformers.utils.generic import can_return_tuple

from vlmzip.mini_gemini.configuration import MiniGeminiConfig


class PatchInfoMining(nn.Module):
    """Cross-attention from each low-resolution token to its own high-resolution window.

    Mini-Gemini, section 3.2: one head, the result is added to the token.

    Args:
        low: D, channels of the tokens.
        high: C, channels of the windows.
    """

    def __init__(self, low: int, high: int) -> None:
        super().__init__()
        self.query = nn.Sequential(nn.LayerNorm(low), nn.Linear(low, low))
        self.key = nn.Sequential(nn.LayerNorm(high), nn.Linear(high, low))
        self.value = nn.Sequential(nn.LayerNorm(high), nn.Linear(high, low))

    def forward(self, tokens_BKD: Tensor, windows_BKWC: Tensor) -> Tensor:
        """Tokens [B, K, D] and each one's window [B, K, W, C]: the mined tokens [B, K, D]."""
        query_BK1D = self.query(tokens_BKD).unsqueeze(2)
        key_BKWD, value_BKWD = self.key(windows_BKWC), self.value(windows_BKWC)
        mined_BK1D = scaled_dot_product_attention(query_BK1D, key_BKWD, value_BKWD)
        return tokens_BKD + mined_BK1D.squeeze(2)


class HighResolutionTower(nn.Module):
    """A ConvNeXt's stem and stages, all of whose feature maps are used.

    Args:
        config: A ``ConvNextConfig``.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        # Its parts alone: a ConvNextModel inside another model refuses set_attn_implementation().
        model = AutoModel.from_config(config)
        self.embeddings = model.embeddings
        self.stages = model.encoder.stages

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, H, W] to [B, C, H/4, W/4]: the stages' maps, scaled to the first one's, side by side."""
        features = self.embeddings(pixel_values.to(self.embeddings.patch_embeddings.weight.dtype))
        maps: list[Tensor] = []
        for stage in self.stages:
            features = stage(features)
            # float32 as published: bfloat16 is too coarse for positions between pixels.
            size = maps[0].shape[-2:] if maps else features.shape[-2:]
            scaled = interpolate(features.float(), size=size, mode="bilinear", align_corners=False)
            maps.append(scaled.to(features.dtype))
        return torch.cat(maps, dim=1)


class MiniGeminiModel(LlavaModel):  # type: ignore[misc]
    """Two vision towers, patch info mining, projector and language model, without LM head."""

    config_class = MiniGeminiConfig
    config: MiniGeminiConfig

    def __init__(self, config: MiniGeminiConfig) -> None:
        super().__init__(config)
        high: Any = config.high_vision_config
        self.high_vision_tower = HighResolutionTower(high)
        self.mining = PatchInfoMining(config.vision_config.hidden_size, sum(high.hidden_sizes))
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def get_image_features(
        self, pixel_values: Tensor, pixel_values_high: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Encode images.

        Args:
            pixel_values: [B, 3, h, w], at the low-resolution tower's size.
            pixel_values_high: [B, 3, H, W], the same images at ``config.high_image_size``.
            kwargs: For the low-resolution tower.

        Returns:
            The low-resolution tower's output, its ``pooler_output`` a list of B tensors [N, D_llm].

        Raises:
            ValueError: There is no ``pixel_values_high``, or it has another size.
        """
        outputs, hidden_BND = self.encode_low(pixel_values, **kwargs)
        windows_BNWC = self.high_windows(pixel_values_high, len(pixel_values))
        features = self.multi_modal_projector(self.mining(hidden_BND[:, 1:], windows_BNWC))
        outputs.pooler_output = list(features)
        return outputs

    def encode_low(
        self,
        pixel_values: Tensor,
        vision_feature_layer: int | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Tensor]:
        """The low-resolution tower's output, and its tokens [B, 1 + N, D] with the CLS token.

        Raises:
            ValueError: A layer or strategy is asked for that is not the config's.
        """
        for name, asked in (
            ("vision_feature_layer", vision_feature_layer),
            ("vision_feature_select_strategy", vision_feature_select_strategy),
        ):
            if asked not in (None, getattr(self.config, name)):
                raise ValueError(
                    f"{name}={asked!r} differs from the config's {getattr(self.config, name)!r}; "
                    "Mini-Gemini takes it from the config alone"
                )
        outputs = self.vision_tower(pixel_values, **{**kwargs, "output_hidden_states": True})
        return outputs, outputs.hidden_states[self.config.vision_feature_layer]

    def high_windows(self, pixel_values_high: Tensor | None, images: int) -> Tensor:
        """The high-resolution features under each low-resolution patch, [B, N, W, C].

        All stages' maps, scaled up to the first one's size, side by side.

        Raises:
            ValueError: There are no high-resolution pixels, of other size, or of other images.
        """
        side = self.config.high_image_size
        found = None if pixel_values_high is None else tuple(pixel_values_high.shape)
        if pixel_values_high is None or found != (images, 3, side, side):
            raise ValueError(
                f"pixel_values_high must be {(images, 3, side, side)} for these pixel_values, "
                f"got {found}; let a MiniGeminiProcessor make both"
            )
        map_BCHW: Any = self.high_vision_tower(pixel_values_high)
        split = (self.config.grid, -1)
        map_BCysxs = map_BCHW.unflatten(3, split).unflatten(2, split)
        windows_BNWC: Tensor = map_BCysxs.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)
        return windows_BNWC

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_high: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """LLaVA's, with images in two resolutions.

        Raises:
            ValueError: Both pixels and ``mm_encoder_outputs`` are given, or inputs do not fit.
        """
        if pixel_values is not None:
            if mm_encoder_outputs:
                raise ValueError("give pixel_values or mm_encoder_outputs, not both")
            asked = {
                name: kwargs.pop(name, None)
                for name in ("vision_feature_layer", "vision_feature_select_strategy")
            }
            features = self.get_image_features(pixel_values, pixel_values_high, return_dict=True, **asked)
            mm_encoder_outputs = {"image": features}
        return super().forward(input_ids=input_ids, mm_encoder_outputs=mm_encoder_outputs, **kwargs)


class MiniGeminiForConditionalGeneration(LlavaForConditionalGeneration):  # type: ignore[misc]
    """A Mini-Gemini that answers: :class:`MiniGeminiModel` and an LM head."""

    config_class = MiniGeminiConfig
    config: MiniGeminiConfig

    def __init__(self, config: MiniGeminiConfig) -> None:
        super(LlavaForConditionalGeneration, self).__init__(config)  # whose __init__ makes a LlavaModel
        self.model = MiniGeminiModel(config)
        text: Any = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def get_image_features(
        self, pixel_values: Tensor, pixel_values_high: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """See :meth:`MiniGeminiModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, pixel_values_high, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_high: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """LLaVA's, with images in two resolutions."""
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            pixel_values_high=pixel_values_high,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            logits_to_keep=logits_to_keep,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
