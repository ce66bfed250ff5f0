"""``vision_feature_select_strategy``: what LLaVA-like models say about the CLS token."""

from typing import Any

from vlmzip.errors import UnsupportedModelError
from vlmzip.towers import Tower


def refuse_default(tower: Tower, config: Any) -> None:
    """Refuse the "default" strategy on a tower without a CLS token.

    Raises:
        UnsupportedModelError: It would drop an image patch.
    """
    if config.vision_feature_select_strategy == "default" and not tower.cls_token:
        raise UnsupportedModelError(
            'vision_feature_select_strategy="default" drops the first token as CLS, but a '
            f"{config.vision_config.model_type!r} tower has none: an image patch would be lost; set "
            'config.vision_feature_select_strategy = "full", in the processor too'
        )


def check_strategy(config: Any, given: str | None) -> None:
    """Refuse a caller's ``vision_feature_select_strategy`` that is not the config's.

    Raises:
        ValueError: Compression decides about the CLS token by ``send_cls``.
    """
    if given not in (None, config.vision_feature_select_strategy):
        raise ValueError(
            f"vision_feature_select_strategy={given!r} was passed, but this model is compressed and "
            "its method's send_cls decides about the CLS token; leave the argument out"
        )
