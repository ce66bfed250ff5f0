"""Towers that pack images of any size and merge their patches: compress what the merger gives.

The patch merger is the projector, so the kept tokens are tokens of the language model's own space.
Shapes: V frames of one image or video, N merged tokens a frame, U patches a merged token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from transformers.vision_utils import get_vision_window_index

from vlmzip.attachment import Attachment, Selection, selections_of
from vlmzip.capture import tap_attention
from vlmzip.errors import UnsupportedModelError
from vlmzip.merging import ZipOutput
from vlmzip.methods.base import Method


@dataclass(frozen=True)
class Kept:
    """Which merged tokens of one image or video are sent on.

    Attributes:
        index_VK: [V, K] int64: the token of the frame at whose place each kept one stands, row by row.
        tokens: N, the frame's tokens before compression.
    """

    index_VK: Tensor
    tokens: int


@dataclass(frozen=True)
class PackedTower:
    """A tower that attends within each frame, over patches in consecutive groups of a merged token.

    Attributes:
        block: The block whose attention is read, the last that attends over a whole frame.
        merge: Patches a side of a merged token.
        patch: Pixels a side of a patch.
        frames: Video frames in a patch.
        channels: Colours.
        window: Pixels a side of the windows that the tower sorts its patches by; None: it does not.
    """

    block: int
    merge: int
    patch: int
    frames: int
    channels: int
    window: int | None = None

    @classmethod
    def from_config(cls, vision: Any) -> Self:
        """Read the tower's config.

        Raises:
            UnsupportedModelError: No block attends over whole frames, or a patch is not square.
        """
        full = list(range(vision.depth))
        window = None
        if hasattr(vision, "fullatt_block_indexes"):
            window = vision.window_size
            full = [index for index in full if index in vision.fullatt_block_indexes]
        if not full:
            raise UnsupportedModelError(
                "a tower whose blocks all attend within windows cannot be compressed: no block tells "
                "what attention a token gets from the whole image; vision_config.fullatt_block_indexes="
                f"{vision.fullatt_block_indexes} names none of its {vision.depth} blocks"
            )
        sizes = (vision.spatial_merge_size, vision.patch_size, vision.temporal_patch_size)
        if not all(isinstance(size, int) for size in sizes):
            raise UnsupportedModelError(
                f"patch and merge sizes must be single numbers, got (merge, patch, frames) = {sizes}"
            )
        channels = getattr(vision, "in_channels", 3)
        return cls(max(full), *sizes, channels, window)

    @property
    def patch_values(self) -> int:
        """Numbers that a processor makes of one patch."""
        return int(self.channels * self.frames * self.patch**2)

    def attach(self, tower: Any, state: Attachment) -> None:
        """Read q and k at the block. Every block runs: the output of the last reaches the merger."""
        tap_attention(tower.blocks[self.block].attn, state.tap, state.patches)

    def scores_and_keys(
        self, records: Sequence[tuple[Tensor, Tensor]], grid_thw: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One score and one key a merged token, the means over its patches, in raster order.

        Args:
            records: A pair a frame: scores [1, P] and keys [1, P, d], patches in the tower's order.
            grid_thw: [images, 3] int64, frames and patches in rows and columns.

        Returns:
            Scores [M] and keys [M, d], float32, of all frames' merged tokens one after the other.

        Raises:
            UnsupportedModelError: The tower did not attend frame by frame.
        """
        grid = grid_thw.tolist()
        patches = [h * w for t, h, w in grid for _ in range(t)]
        if [scores.shape[-1] for scores, _ in records] != patches:
            raise UnsupportedModelError(
                f"the tower should attend to frames of {patches} patches, but attended to "
                f"{[scores.shape[-1] for scores, _ in records]}"
            )
        unit = self.merge**2
        scores_M = torch.cat([scores.view(-1, unit).mean(1) for scores, _ in records])
        keys_Md = torch.cat([keys.view(-1, unit, keys.shape[-1]).mean(1) for _, keys in records])
        if self.window is not None:
            order, _ = get_vision_window_index(grid_thw, self.merge, self.window, self.patch)
            raster_M = order.to(scores_M.device).argsort()
            scores_M, keys_Md = scores_M[raster_M], keys_Md[raster_M]
        return scores_M, keys_Md

    def compress(
        self,
        output: Any,
        grid_thw: Tensor,
        records: Sequence[tuple[Tensor, Tensor]],
        state: Attachment,
    ) -> tuple[list[Selection], list[Kept]]:
        """Compress a tower's output in place, image by image and frame by frame.

        DeepStack features, if there are any, are merged as the tokens that they belong to.

        Args:
            output: ``pooler_output`` holds [V * N, D] an image, and ``deepstack_features``, if it is
                there, a list by layer of the same.
            grid_thw: [images, 3] int64.
            records: As in :meth:`scores_and_keys`.
            state: The model's state.
        """
        scores_M, keys_Md = self.scores_and_keys(records, grid_thw)
        layers = [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]
        parts: list[list[Tensor]] = [[] for _ in layers]
        selections, kept, start = [], [], 0
        for image, (t, h, w) in enumerate(grid_thw.tolist()):
            n = h * w // self.merge**2
            here = slice(start, start := start + t * n)
            features_MD = torch.cat([layer[image] for layer in layers], -1)
            out = self.zip_image(features_MD, scores_M[here], keys_Md[here], (t, h, w), state)
            for part, tokens in zip(parts, out.tokens.flatten(0, 1).chunk(len(layers), -1), strict=True):
                part.append(tokens)
            selections += selections_of(out, (h // self.merge, w // self.merge), [t])
            kept.append(Kept(places(out), n))
        output.pooler_output = tuple(parts[0])
        if len(parts) > 1:
            output.deepstack_features = [tuple(part) for part in parts[1:]]
        return selections, kept

    def zip_image(
        self,
        features_MD: Tensor,
        scores_M: Tensor,
        keys_Md: Tensor,
        thw: tuple[int, int, int],
        state: Attachment,
        method: Method | None = None,
    ) -> ZipOutput:
        """Compress one image, or one video frame by frame.

        Args:
            features_MD: Its merged tokens, in raster order.
            scores_M: Their scores, float32.
            keys_Md: Their keys, float32.
            thw: Its frames, and its patches in rows and columns.
            state: The model's state.
            method: The method with a budget of this image's own; None: the model's.

        Returns:
            The output, its leading axis over frames.
        """
        t, h, w = thw
        hidden_VND, scores_VN = features_MD.unflatten(0, (t, -1)), scores_M.unflatten(0, (t, -1))
        keys_VNd = keys_Md.unflatten(0, (t, -1))
        grid = (h // self.merge, w // self.merge)
        return state.zip_views(hidden_VND, scores_VN, keys_VNd, grid, method=method)


def places(out: ZipOutput) -> Tensor:
    """[V, K] int64: the token at whose place each kept one stands, in the order they are sent."""
    chosen_VK = torch.cat([out.dominant, out.contextual], 1)
    rows_VK = out.assignment.gather(1, chosen_VK)
    return torch.zeros_like(chosen_VK).scatter(1, rows_VK, chosen_VK)
