"""What a model family has to say: where to read, where to compress, how many placeholders."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import PreTrainedModel
from transformers.processing_utils import ProcessorMixin

from vlmzip.attachment import Attachment
from vlmzip.errors import UnsupportedModelError
from vlmzip.merging import Order
from vlmzip.methods.base import Method

REGISTRY: "dict[str, type[Family]]" = {}
FamilyType = TypeVar("FamilyType", bound="type[Family]")


def register(cls: FamilyType) -> FamilyType:
    """Class decorator: make a family known by its ``name``."""
    if cls.name in REGISTRY:
        raise ValueError(f"two families are called {cls.name!r}")
    REGISTRY[cls.name] = cls
    return cls


@dataclass(frozen=True)
class Card:
    """A family's row in ``vlmzip models`` and docs/models.md."""

    models: str
    tower: str
    layer: str
    compressed: str
    count: str
    tested: str
    untested: str


@dataclass(frozen=True)
class Family(ABC):
    """A family fitted to one model's config; pure data, shared by model side and processor side."""

    name: ClassVar[str]
    processor_class: ClassVar[str]
    order: ClassVar[Order]
    card: ClassVar[Card]

    @classmethod
    @abstractmethod
    def from_config(cls, config: Any) -> Self:
        """Read what matters from the model's config.

        Raises:
            UnsupportedModelError: This configuration cannot be compressed; the message says why.
        """

    @abstractmethod
    def attachment(self, method: Method) -> Attachment:
        """Fresh state for a model that ``method`` compresses.

        Raises:
            ValueError: The method's budget does not fit the model.
        """

    @abstractmethod
    def attach(self, base: PreTrainedModel, state: Attachment) -> None:
        """Fit ``state`` to the model's base model (``model.base_model``), through ``state.patches``."""

    def attach_generation(self, model: PreTrainedModel, state: Attachment) -> None:  # noqa: B027
        """Fit ``state`` to what generate() asks of the whole model; most families need nothing."""

    def placeholder(self, processor: Any) -> tuple[str, int]:
        """The token, and its id, that a prompt has once for each image token.

        Mostly it is what prompts are written with, before the processor multiplies it.
        """
        return processor.image_token, processor.image_token_id

    @abstractmethod
    def image_tokens(self, method: Method, stock: int, image_inputs: Any, index: int) -> int:
        """Placeholders of image ``index`` of a processed batch; ``stock`` without compression.

        Raises:
            ValueError: The processor was set up for another model.
        """

    @abstractmethod
    def sized_image_tokens(self, method: Method, stock: int, size: tuple[int, int]) -> int:
        """Placeholders of an image of (height, width) pixels; ``stock`` without compression."""

    def video_tokens(self, method: Method, stock: int, video_inputs: Any, index: int) -> int:
        """Placeholders of video ``index`` of a processed batch; ``stock`` without compression.

        Raises:
            UnsupportedModelError: The family takes no videos.
            ValueError: The processor was set up for another model.
        """
        raise UnsupportedModelError(
            f"videos of a {self.name} model cannot be compressed; pass images, or remove the compression"
        )

    @abstractmethod
    def check_expanded(self, method: Method, placeholders: int, token: str) -> None:
        """Check prompts without images (or videos): placeholders must be expanded already.

        Raises:
            ValueError: They cannot be.
        """

    def least_in_a_row(self, method: Method) -> int:
        """The fewest placeholders that one image of a prompt that is expanded already can have."""
        return 1

    @classmethod
    def processor_type(cls) -> Any:
        """The class that ``processor_class`` names."""
        return getattr(transformers, cls.processor_class)

    def check_unchanged(self, config: Any) -> None:
        """Refuse a forward after ``config`` was changed in what compress() had read from it.

        Raises:
            ValueError: It was.
            UnsupportedModelError: It was, and what it says now cannot be compressed at all.
        """
        if not torch.compiler.is_compiling() and type(self).from_config(config) != self:
            raise ValueError(
                "the model's config (vision_feature_select_strategy, vision_feature_layer or the "
                "vision tower's) was changed after compress(); remove the compression and compress again"
            )

    def check_processor(self, processor: ProcessorMixin, config: Any, method: Method) -> None:
        """Check, on a dummy image, that a processor fits this model.

        Raises:
            ValueError: It is another model's, or it cannot process an image.
        """
        if not isinstance(processor, self.processor_type()):
            raise ValueError(
                f"a {self.name} model needs a {self.processor_class}, got "
                f"{type(processor).__name__}: the processor is another model's"
            )
        _, placeholder = self.placeholder(processor)
        if placeholder != config.image_token_id:
            raise ValueError(
                f"the processor's image token has id {placeholder}, the model's "
                f"{config.image_token_id}: the processor is another model's"
            )
        try:
            inputs = processor(images=[Image.new("RGB", (64, 48))], text=[processor.image_token])
        except Exception as error:
            raise ValueError(f"the processor cannot process an image: {error}") from error
        # Some processors return tensors unasked.
        stock = [int(token) for token in inputs["input_ids"][0]].count(config.image_token_id)
        self.image_tokens(method, stock, inputs, 0)


def check_video_processor(family: Family, processor: Any, config: Any, method: Method) -> None:
    """Check, on a dummy video, that a processor fits a model.

    A model without a video token has its frames where images go.

    Raises:
        ValueError: It is another model's, or it cannot process a video.
    """
    placeholder = getattr(config, "video_token_id", config.image_token_id)
    if hasattr(config, "video_token_id") and processor.video_token_id != config.video_token_id:
        raise ValueError(
            f"the processor's video token has id {processor.video_token_id}, the model's "
            f"{config.video_token_id}: the processor is another model's"
        )
    frames = np.zeros((2, 64, 48, 3), dtype=np.uint8)  # some refuse a single frame
    try:
        # Some take videos prompt by prompt only.
        inputs = processor(videos=[[frames]], text=[processor.video_token], return_tensors="pt")
    except Exception as error:
        raise ValueError(f"the processor cannot process a video: {error}") from error
    stock = inputs["input_ids"][0].tolist().count(placeholder)
    family.video_tokens(method, stock, inputs, 0)


def place_in_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
    """``get_placeholder_mask`` of a model with videos: its masks tell the prompt's order of media."""
    image_mask_BS1, video_mask_BS1 = explain_mismatch(self, *args, **kwargs)
    self._vlmzip.arrange(image=image_mask_BS1.squeeze(-1), video=video_mask_BS1.squeeze(-1))
    return image_mask_BS1, video_mask_BS1


def explain_mismatch(self: Any, *args: Any, **kwargs: Any) -> Any:
    """``get_placeholder_mask`` of a compressed model, whose error says what was forgotten.

    Raises:
        ValueError: Placeholders and image tokens are not as many.
    """
    stock = type(self).get_placeholder_mask
    if torch.compiler.is_compiling():
        return stock(self, *args, **kwargs)
    try:
        return stock(self, *args, **kwargs)
    except ValueError as error:
        raise ValueError(f"{error}. {foreign_prompt(self._vlmzip.method)}") from error


def foreign_prompt(method: Method) -> str:
    """What to tell someone whose prompt has other counts of placeholders than images have tokens."""
    return (
        f"This model is compressed with {method.settings()}; the prompt was not made by the processor "
        "that was compressed with it. Pass that to compress(model, processor, method), or write one "
        "placeholder for each kept token"
    )
