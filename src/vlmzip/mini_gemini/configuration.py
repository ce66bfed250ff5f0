"""Configuration of a Mini-Gemini: LLaVA's, and a second vision tower for high resolution."""

from typing import Any, ClassVar

from transformers import AutoConfig, ConvNextConfig, LlavaConfig


class MiniGeminiConfig(LlavaConfig):  # type: ignore[misc]
    """LLaVA's fields, of which ``vision_config`` is the low-resolution tower's, and two more.

    Attributes:
        high_vision_config: The ConvNeXt's. Default: the published models' ConvNeXt-L.
        high_image_size: Height and width in pixels that the ConvNeXt sees.

    Raises:
        ValueError: The towers' sizes do not fit each other, or a field asks for a model that
            Mini-Gemini is not.
    """

    model_type = "mini_gemini"
    sub_configs: ClassVar[dict[str, Any]] = {**LlavaConfig.sub_configs, "high_vision_config": AutoConfig}

    high_vision_config: Any = None
    high_image_size: int = 768

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in the towers' configs and check that they fit."""
        high = self.high_vision_config
        if high is None:
            high = {"hidden_sizes": [192, 384, 768, 1536], "depths": [3, 3, 27, 3]}
        if isinstance(high, dict):
            high = ConvNextConfig(**{k: v for k, v in high.items() if k != "model_type"})
        self.high_vision_config = high
        super().__post_init__(**kwargs)
        self._check()

    @property
    def grid(self) -> int:
        """Rows, and columns, of low-resolution patches: one high-resolution window for each."""
        side: int = self.vision_config.image_size // self.vision_config.patch_size
        return side

    def _check(self) -> None:
        if self.vision_config.model_type != "clip_vision_model":
            raise ValueError(
                f"a Mini-Gemini's low-resolution tower is a clip_vision_model, got "
                f"{self.vision_config.model_type!r}"
            )
        if self.vision_feature_select_strategy != "default" or not isinstance(
            self.vision_feature_layer, int
        ):
            raise ValueError(
                'a Mini-Gemini takes the patches (vision_feature_select_strategy="default") of one '
                f"layer, got {self.vision_feature_select_strategy!r} of {self.vision_feature_layer}"
            )
        rows, rest = divmod(self.high_image_size, self.high_vision_config.patch_size)
        if rest or rows % self.grid:
            raise ValueError(
                f"high_image_size={self.high_image_size} makes {rows} rows of high-resolution features, "
                f"which do not divide into {self.grid} windows; give a multiple of "
                f"{self.grid * self.high_vision_config.patch_size}"
            )
