"""What a request may not bring: images that would fill the memory, fields that nobody reads."""

from collections.abc import Mapping
from typing import Any

from transformers.processing_utils import ImagesKwargs, TextKwargs, VideosKwargs
from vllm.multimodal.parse import ImageProcessorItems

from vlmzip.images import check_shape
from vlmzip.vllm.settings import REQUEST_KEY

_GROUPS = ("images_kwargs", "text_kwargs", "videos_kwargs", "common_kwargs", "return_tensors")


def check_images(items: Any) -> None:
    """Check the images of a request, those that the server does not have already.

    Raises:
        ValueError: One is so elongated that resizing its shorter side would blow it up.
    """
    images = items.get("image")
    if not isinstance(images, ImageProcessorItems):
        return
    for i in range(images.get_count()):
        if images.get(i) is not None:
            check_shape(*images.get_image_size(i))


def check_fields(fields: Mapping[str, object], processor: Any) -> None:
    """Check the ``mm_processor_kwargs`` of a request; the processor would ignore what it does not know.

    Raises:
        ValueError: There is a field that it does not know.
    """
    known = {REQUEST_KEY, *_GROUPS}
    own = getattr(getattr(processor, "image_processor", None), "valid_kwargs", None)
    for kind in (ImagesKwargs, TextKwargs, VideosKwargs, own):
        known |= set(getattr(kind, "__annotations__", ()))
    if unknown := sorted(set(fields) - known):
        raise ValueError(
            f"mm_processor_kwargs has unknown fields: {', '.join(unknown)}; "
            f"to choose how many tokens an image keeps give {REQUEST_KEY!r}"
        )
