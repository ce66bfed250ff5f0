"""SmolVLM by hand: Idefics3's slow path; its processor takes images row by row only."""

from typing import Any

from slow.idefics3 import features, images

__all__ = ["features", "images", "process"]

NEEDS_TORCHVISION = True


def process(processor: Any, texts: list[str], rows: list[Any]) -> Any:
    given = rows if any(rows) else None
    return processor(text=texts, images=given, padding=True, return_tensors="pt")
