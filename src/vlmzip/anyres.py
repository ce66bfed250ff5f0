"""Images cut into crops: how many views an image has, and the order its kept tokens stand in.

An image is encoded as a base view, the whole image shrunk, and gh x gw crops of the resolution among
the model's grid pinpoints that fits it best. Everything here follows from the image's size alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

from vlmzip.errors import UnsupportedModelError
from vlmzip.merging import Order, ZipOutput
from vlmzip.methods.base import Grid, Method

Size = tuple[int, int]


@dataclass(frozen=True)
class Anyres:
    """A model's grid pinpoints.

    Attributes:
        pinpoints: Resolutions (height, width) in pixels that images are fitted into.
        side: Height and width of a view in pixels.
    """

    pinpoints: tuple[Size, ...]
    side: int

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """Read a model's config.

        Raises:
            UnsupportedModelError: A pinpoint is not made of whole views, or there is none.
        """
        side = config.vision_config.image_size
        pinpoints = tuple((int(height), int(width)) for height, width in config.image_grid_pinpoints)
        odd = [size for size in pinpoints if min(size) < side or size[0] % side or size[1] % side]
        if odd or not pinpoints:
            raise UnsupportedModelError(
                f"image_grid_pinpoints must be multiples of the vision tower's image size {side}, "
                f"got {odd[0] if odd else 'none'}"
            )
        return cls(pinpoints, side)

    @property
    def most_views(self) -> int:
        """The most views an image can have: the base view and the largest grid of crops."""
        return 1 + max(height * width for height, width in self.pinpoints) // self.side**2

    def grid(self, size: Size) -> Grid:
        """Rows and columns of crops of an image of (height, width) pixels."""
        height, width = select_best_resolution(size, list(self.pinpoints))
        return height // self.side, width // self.side

    def views(self, size: Size) -> int:
        """Views of an image of (height, width) pixels: the base view and its crops."""
        rows, columns = self.grid(size)
        return 1 + rows * columns

    def count(self, method: Method, n: int) -> int:
        """K of a view of ``n`` tokens; the error explains budgets that are meant for a whole image.

        Raises:
            ValueError: The budget does not fit.
        """
        views = self.most_views
        try:
            return method.budget.count(n, views=views)
        except ValueError as error:
            budget = method.budget
            asked = budget.tokens or (budget.dominant or 0) + (budget.contextual or 0)
            if not 2 <= asked // views <= n:
                raise
            raise ValueError(
                f"{error}. tokens=, dominant= and contextual= count per view here, and an image is "
                f"encoded as up to {views} views; if {asked} is a total over {views} views, give "
                f"total_tokens={asked} or tokens={asked // views}"
            ) from error

    def views_in(self, pixel_values: Any, sizes: Any, single: Sequence[bool] = ()) -> list[int]:
        """Views per image of a batch, checked against its pixels.

        Args:
            pixel_values: [images, most views, C, H, W], or the views of all images one after the other.
            sizes: [images, 2], heights and widths in pixels, a tensor or lists.
            single: Per image, whether it is not cut into crops; none is, if empty.

        Raises:
            ValueError: Sizes are missing, or the pixels are not theirs.
        """
        if sizes is None:
            raise ValueError(
                "image_sizes is missing, and the number of an image's crops follows from it; pass on "
                "all that the processor returned: model(**inputs)"
            )
        pairs = size_pairs(sizes)
        whole = single or [False] * len(pairs)
        views = [1 if one else self.views(size) for size, one in zip(pairs, whole, strict=True)]
        shape = list(pixel_values.shape)
        wanted = [len(pairs), max(views, default=0)] if len(shape) == 5 else [sum(views)]
        if shape[0] != wanted[0] or shape[len(wanted) - 1] < wanted[-1]:
            raise ValueError(
                f"pixel_values of shape {shape} do not fit image_sizes {pairs}: with this model's "
                f"image_grid_pinpoints these images are {views} views; pass pixel_values and "
                "image_sizes of the same images, from this model's processor"
            )
        return views

    def check_processor(self, processor: Any, base_tokens: int, grid: Grid) -> None:
        """Check that a processor cuts images as the model expects, and counts as it does.

        Args:
            processor: The processor.
            base_tokens: Tokens of a view, as the uncompressed model hands them on.
            grid: Rows and columns of a view's patches.

        Raises:
            ValueError: It is another model's.
        """
        given = tuple((int(h), int(w)) for h, w in processor.image_processor.image_grid_pinpoints)
        if given != self.pinpoints:
            raise ValueError(
                f"the processor's image_grid_pinpoints {given} are not the model's {self.pinpoints}: "
                "the processor is another model's"
            )
        size = min(self.pinpoints, key=lambda pinpoint: pinpoint[0] * pinpoint[1])
        height, width = (crops * patches for crops, patches in zip(self.grid(size), grid, strict=True))
        expected = base_tokens + height * (width + 1)  # an image of that very size has no padding
        stock = processor._get_num_multimodal_tokens(image_sizes=[size]).num_image_tokens[0]
        if stock != expected:
            raise ValueError(
                f"the processor makes {stock} image tokens of an image of {size} pixels where this model "
                f"has {expected}: its patch size, image size, num_additional_image_tokens or "
                "vision_feature_select_strategy is another model's"
            )

    def check_processed(self, pixel_values: Any, views: list[int], index: int) -> None:
        """Check the processed image ``index`` of a batch whose images have ``views`` each.

        Raises:
            ValueError: The call's own settings cut or sized it otherwise than the model expects.
        """
        shape = pixel_values[index].shape
        if shape[0] not in (views[index], max(views)) or tuple(shape[-2:]) != (self.side, self.side):
            raise ValueError(
                f"the processor made views of shape {tuple(shape)} of the image, this model expects "
                f"{views[index]} of {self.side} x {self.side} pixels: image_grid_pinpoints, size or "
                "crop_size are another model's; leave them as this model's processor has them"
            )


def size_pairs(sizes: Any) -> list[Size]:
    """Image sizes, a tensor or array [images, 2] or lists, as (height, width) pairs."""
    rows = sizes.tolist() if hasattr(sizes, "tolist") else sizes
    return [(int(height), int(width)) for height, width in rows]


def crop_order(out: ZipOutput, crops: Grid, grid: Grid, cls_token: bool, order: Order) -> Tensor:
    """The order that the kept tokens of an image's crops go to the language model in.

    Kept patches stand at their places in the raster of the whole image; then come the crops' CLS
    tokens, crop by crop. Under "grouped" their contextual tokens follow, crop by crop (as in
    VisionZip's code); under "raster" each stands at its target's place in the whole image.

    Args:
        out: What became of the crops, C = gh * gw views with K tokens each.
        crops: (gh, gw), rows and columns of crops.
        grid: (h, w), rows and columns of a crop's patches.
        cls_token: Token 0 of a crop is its CLS token.
        order: "grouped" or "raster".

    Returns:
        [C * K] int64, indices into the crops' kept tokens, crop after crop.
    """
    source_CK = torch.cat([out.dominant, out.contextual], 1)
    row_CK = out.assignment.gather(1, source_CK)
    device, (c, k) = source_CK.device, source_CK.shape
    crop_C1 = torch.arange(c, device=device).unsqueeze(1)
    (rows, columns), patch_CK = grid, source_CK - int(cls_token)
    y_CK = crop_C1 // crops[1] * rows + patch_CK // columns
    x_CK = crop_C1 % crops[1] * columns + patch_CK % columns
    place_CK = y_CK * (crops[1] * columns) + x_CK
    patches = c * rows * columns
    if cls_token:
        place_CK = torch.where(source_CK == 0, patches + crop_C1, place_CK)
    if order == "grouped":
        m = out.contextual.shape[1]
        after_CM = patches + c + torch.arange(c * m, device=device).view(c, m)
        place_CK = torch.cat([place_CK[:, : k - m], after_CM], 1)
    return (crop_C1 * k + row_CK).flatten()[place_CK.flatten().argsort()]


def pack_views(
    tokens_VKD: Tensor, out: ZipOutput, crops: Grid, grid: Grid, cls_token: bool, order: Order
) -> Tensor:
    """One image's kept tokens [V * K, D]: its base view's, then its crops' as :func:`crop_order` says.

    Nothing marks the ends of rows, since kept tokens are not in rows, and padding is not cut off.

    Args:
        tokens_VKD: The kept tokens, V = 1 + gh * gw views, or 1.
        out: What became of these views.
        crops: (gh, gw), rows and columns of crops.
        grid: (h, w), rows and columns of a view's patches.
        cls_token: Token 0 of a view is its CLS token.
        order: "grouped" or "raster".
    """
    if len(tokens_VKD) == 1:
        return tokens_VKD[0]
    order_T = crop_order(slice_views(out, 1, None), crops, grid, cls_token, order)
    return torch.cat([tokens_VKD[0], tokens_VKD[1:].flatten(0, 1)[order_T]])


def slice_views(out: ZipOutput, start: int, end: int | None) -> ZipOutput:
    """Some of the views of a method's output."""
    views = slice(start, end)
    return ZipOutput(out.tokens[views], out.dominant[views], out.contextual[views], out.assignment[views])
