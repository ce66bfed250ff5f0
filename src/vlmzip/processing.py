"""The processor side: K placeholder tokens an image instead of N."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers.image_utils import make_flat_list_of_images
from transformers.video_utils import make_batched_videos

from vlmzip.errors import UnsupportedModelError
from vlmzip.methods.base import Method

if TYPE_CHECKING:
    from vlmzip.families.base import Family


@dataclass(frozen=True)
class Placeholders:
    """How many placeholder tokens an image gets: the same rule as the model side's."""

    family: "Family"
    method: Method


class CompressedProcessor:
    """Mixed into the class of one processor instance; the class keeps its name, so it saves as before."""

    _vlmzip: Placeholders

    def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
        """The placeholder string of one image, with K placeholder tokens in it."""
        stock: str = super().replace_image_token(image_inputs, image_idx, **kwargs)  # type: ignore[misc]
        rule = self._vlmzip
        token, _ = rule.family.placeholder(self)
        k = rule.family.image_tokens(rule.method, stock.count(token), image_inputs, image_idx)
        return _resized(stock, token, k)

    def replace_video_token(self, video_inputs: Any, video_idx: int, **kwargs: Any) -> str:
        """The placeholder string of one video; some models have their frames where images go."""
        stock: str = super().replace_video_token(video_inputs, video_idx, **kwargs)  # type: ignore[misc]
        token: str = self.video_token  # type: ignore[attr-defined]
        if token not in stock:
            token = self.image_token  # type: ignore[attr-defined]
        rule = self._vlmzip
        k = rule.family.video_tokens(rule.method, stock.count(token), video_inputs, video_idx)
        return _resized(stock, token, k)

    def validate_inputs(
        self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any
    ) -> None:
        """Stock's checks, after ours: newer releases count placeholders too, and refuse expanded prompts.

        So stock sees none of them where nothing is given to put there; what is given it sees, as some
        processors insist on images, or check them prompt by prompt.
        """
        if isinstance(text, list) and all(isinstance(prompt, str) for prompt in text):
            media = {"image": (images, make_flat_list_of_images), "video": (videos, make_batched_videos)}
            for kind, (given, flat) in media.items():
                token = getattr(self, f"{kind}_token", None)
                if token and given is not None:
                    self._check_placeholders(text, token, len(flat(given)), f"{kind}s")
                elif token:
                    self._check_placeholders(text, token, 0, f"{kind}s")
                    text = [prompt.replace(token, "") for prompt in text]
        super().validate_inputs(images=images, text=text, videos=videos, **kwargs)  # type: ignore[misc]

    def get_text_with_replacements(
        self,
        text: list[str],
        images_replacements: Sequence[str] = (),
        videos_replacements: Sequence[str] = (),
        *args: Any,
    ) -> Any:
        """Expand the prompts, after checking that images, videos and placeholders are as many."""
        self._check_placeholders(text, self.image_token, len(images_replacements), "images")  # type: ignore[attr-defined]
        if video_token := getattr(self, "video_token", None):
            self._check_placeholders(text, video_token, len(videos_replacements), "videos")
        return super().get_text_with_replacements(  # type: ignore[misc]
            text, images_replacements, videos_replacements, *args
        )

    def _check_placeholders(self, text: list[str], token: str, given: int, kind: str) -> None:
        wanted = sum(prompt.count(token) for prompt in text)
        if given and wanted != given:
            raise ValueError(
                f"the text has {wanted} {token} placeholders for {given} {kind}; "
                f"write {token} once for each of the {kind}"
            )
        if given:
            return
        rule = self._vlmzip
        filled = rule.family.placeholder(self)[0] if kind == "images" else token
        count = sum(prompt.count(filled) for prompt in text)
        least = rule.family.least_in_a_row(rule.method)
        rows = re.compile(f"(?:{re.escape(filled)})+")
        forgotten = any(len(row) < least * len(filled) for prompt in text for row in rows.findall(prompt))
        if forgotten or (wanted and not count):
            raise ValueError(f"the text has {wanted} {token} and no images were given; pass images=")
        rule.family.check_expanded(rule.method, count, filled)

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> Any:
        data = super()._get_num_multimodal_tokens(image_sizes=image_sizes, **kwargs)  # type: ignore[misc]
        rule = self._vlmzip
        if getattr(data, "num_video_tokens", None) is not None:
            raise UnsupportedModelError(
                f"the tokens that a compressed {rule.family.name} keeps of a video are not known from "
                "video_sizes alone; call the processor on the video"
            )
        if image_sizes is not None:
            data.num_image_tokens = [
                rule.family.sized_image_tokens(rule.method, stock, size)
                for stock, size in zip(data.num_image_tokens, image_sizes, strict=True)
            ]
        return data

    def __reduce__(self) -> tuple[Any, ...]:
        stock = stock_class(self)
        return _rebuild, (stock, self.__dict__)


def _resized(stock: str, token: str, k: int) -> str:
    """``stock`` with k placeholders; text between crops or frames stays, each of which gets as many."""
    runs = re.compile(f"(?:{re.escape(token)})+")
    return runs.sub(token * (k // len(runs.findall(stock))), stock)


def stock_class(processor: Any) -> type:
    """The class of a processor before :func:`compress_processor`."""
    cls: type = type(processor)
    return cls.__mro__[2] if isinstance(processor, CompressedProcessor) else cls


def compress_processor(processor: Any, rule: Placeholders) -> None:
    """Make this instance write K placeholders an image."""
    cls = type(processor)
    processor.__class__ = type(
        cls.__name__,
        (CompressedProcessor, cls),
        {"__module__": cls.__module__, "__doc__": cls.__doc__},
    )
    processor._vlmzip = rule


def restore_processor(processor: Any) -> None:
    """Take :func:`compress_processor` back."""
    processor.__class__ = stock_class(processor)
    del processor._vlmzip


def _rebuild(stock: type, state: dict[str, Any]) -> Any:
    processor: Any = object.__new__(stock)
    processor.__dict__.update(state)
    compress_processor(processor, state["_vlmzip"])
    return processor
