"""Qwen2.5-VL by hand: as Qwen2-VL; the tower's blocks see its patches window by window."""

from typing import Any

from slow.qwen2_vl import NEEDS_TORCHVISION, features, images, positions
from vlmzip.tiny.random.qwen2_5_vl import build

__all__ = ["NEEDS_TORCHVISION", "builds", "features", "images", "positions"]


def builds() -> dict[str, Any]:
    return {"tiny": build, "a window block last": lambda: build(full=(0, 2))}
