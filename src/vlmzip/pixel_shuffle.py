"""Towers whose patches a pixel shuffle puts together: compress what the projector gives.

A merged token holds a square block of the patches' raster; its score and its key are the block's
means. Every view (an image, a crop of one, a video's frame) has as many merged tokens and keeps K.
Shapes: V views, P patches, N merged tokens a view.
"""

from dataclasses import dataclass
from itertools import groupby
from typing import Any, Self

import numpy as np
from torch import Tensor

from vlmzip.attachment import Attachment, selections_of
from vlmzip.capture import Reading
from vlmzip.errors import UnsupportedModelError
from vlmzip.methods.base import Grid, Method
from vlmzip.towers import Tower


@dataclass(frozen=True)
class ShuffledTower:
    """A tower of fixed resolution and the pixel shuffle behind it.

    Attributes:
        tower: The tower, and the block that is read.
        side: Patches a side of a merged token.
        pixels: Pixels a side of a view.
    """

    tower: Tower
    side: int
    pixels: int

    @classmethod
    def from_config(cls, vision: Any, *, side: int, cls_token: bool, layer: Any) -> Self:
        """Read the tower's config.

        Raises:
            UnsupportedModelError: Views or patches are not square, or the shuffle does not divide them.
        """
        pixels, patch = _side(vision, "image_size"), _side(vision, "patch_size")
        patches = pixels // patch
        if patches % side:
            raise UnsupportedModelError(
                f"a view of {patches} x {patches} patches cannot be merged in blocks of {side} x {side}: "
                "image_size, patch_size and the shuffle's factor do not fit each other"
            )
        depth = vision.num_hidden_layers
        return cls(Tower.reading((patches, patches), cls_token, depth, layer), side, pixels)

    @property
    def grid(self) -> Grid:
        """Rows and columns of a view's merged tokens."""
        rows, columns = self.tower.grid
        return rows // self.side, columns // self.side

    @property
    def tokens(self) -> int:
        """N, a view's merged tokens."""
        return self.grid[0] * self.grid[1]

    def count(self, method: Method) -> int:
        """K, the tokens that a view keeps.

        Raises:
            ValueError: The budget does not fit, or is one for whole images.
        """
        if method.budget.total_tokens is not None:
            raise ValueError(
                f"total_tokens={method.budget.total_tokens} is shared out over the most views that an "
                "image can have, which is a setting of this family's processor, of which the model's "
                "config says nothing; give tokens=, dominant= with contextual=, or keep=, per view"
            )
        return method.budget.count(self.tokens)

    def views(self, stock: int, inputs: Any) -> int:
        """Views of an image or video for which the uncompressed processor writes ``stock`` placeholders.

        Args:
            stock: N for each view.
            inputs: What the processor made, with pixels [..., height, width] of the view size.

        Raises:
            ValueError: The processor was set up for another model.
        """
        views, odd = divmod(stock, self.tokens)
        given = inputs["pixel_values_videos" if "pixel_values_videos" in inputs else "pixel_values"]
        size = _view_size(given)
        if odd or size != (self.pixels, self.pixels):
            raise ValueError(
                f"the processor makes {stock} tokens of views of {size} pixels where this model has "
                f"{self.tokens} for each view of {(self.pixels, self.pixels)}: its image size, crop size "
                "or number of tokens a view is another model's"
            )
        return views

    def check_length(self, processor: Any, name: str) -> None:
        """Check the attribute that says how many placeholders a processor writes for a view.

        Raises:
            ValueError: It is not N.
        """
        if getattr(processor, name) != self.tokens:
            raise ValueError(
                f"the processor's {name}={getattr(processor, name)} is not this model's {self.tokens}: "
                "the processor is another model's"
            )

    def check_expanded(self, method: Method, placeholders: int, token: str) -> None:
        """Placeholders of prompts without images must come in multiples of K.

        Raises:
            ValueError: They do not.
        """
        if placeholders % self.count(method):
            raise ValueError(
                f"the text has {placeholders} {token} placeholders and nothing to put there; pass "
                f"images, or write {self.count(method)} placeholders for each view encoded before"
            )

    def check_pixels(self, pixel_values: Tensor) -> None:
        """Check the size of the views [..., height, width] that a forward is given.

        Raises:
            ValueError: It is not the model's.
        """
        if tuple(pixel_values.shape[-2:]) != (self.pixels, self.pixels):
            raise ValueError(
                f"pixel_values of shape {list(pixel_values.shape)} hold views of another size than this "
                f"compressed model's {self.pixels} x {self.pixels} pixels; use this model's processor"
            )

    def compress(self, features_VND: Tensor, reading: Reading, state: Attachment) -> Tensor:
        """The kept tokens [V, K, D] of the projector's output; each view is recorded on its own."""
        ((scores, keys),) = reading.take()
        first = int(self.tower.cls_token)
        scores_VN = self._means(scores[:, first:].unsqueeze(-1)).squeeze(-1)
        keys_VNd = self._means(keys[:, first:])
        out = state.zip_views(features_VND, scores_VN, keys_VNd, self.grid, pooled=True)
        state.record(selections_of(out, self.grid, [1] * len(features_VND)))
        return out.tokens

    def _means(self, patches_VPd: Tensor) -> Tensor:
        rows, columns = self.grid
        v, _, d = patches_VPd.shape
        return patches_VPd.view(v, rows, self.side, columns, self.side, d).mean((2, 4)).flatten(1, 2)


def runs(mask_BS: Tensor) -> list[list[tuple[int, int]]]:
    """Where placeholders stand in a row: row by row, (start, length) of each unbroken run of them."""
    found = []
    for row in mask_BS.tolist():
        here, start = [], 0
        for placeholder, group in groupby(row):
            length = len(list(group))
            if placeholder:
                here.append((start, length))
            start += length
        found.append(here)
    return found


def _side(vision: Any, name: str) -> int:
    value = getattr(vision, name)
    sides = set(value) if isinstance(value, list | tuple) else {value}
    if len(sides) != 1:
        raise UnsupportedModelError(
            f"vision_config.{name}={value} is not square, and a pixel shuffle takes square views only"
        )
    return int(sides.pop())


def _view_size(pixels: Any) -> tuple[int, ...]:
    """Height and width of the first view in arrays or tensors, however deep in lists."""
    while isinstance(pixels, list | tuple):
        pixels = next(item for item in pixels if len(item))
    return tuple(int(length) for length in np.shape(pixels)[-2:])
