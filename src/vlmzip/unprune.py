"""The uncompressed prompt of a compressed one: every placeholder that was left out, put back.

Shapes: B prompts, T tokens of the compressed prompt, F of the uncompressed one.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmzip.patch_merger import Kept

KINDS = {"image": 1, "video": 2}  # as in mm_token_type_ids


@dataclass(frozen=True)
class Unpruned:
    """The uncompressed prompt, in terms of the compressed one.

    Attributes:
        source_BF: Which token of the compressed prompt each one repeats.
        real_BF: False where a shorter prompt is padded, on the left.
        column_BT: Where each token of the compressed prompt stands.
    """

    source_BF: Tensor
    real_BF: Tensor
    column_BT: Tensor


def unprune(types_BT: Tensor, kept: Mapping[str, list[Kept]]) -> Unpruned | None:
    """Put all placeholders back; None if the prompt's placeholders are not those of ``kept``.

    Args:
        types_BT: ``mm_token_type_ids``: 0 text, 1 image, 2 video.
        kept: By kind, what each image or video of the prompts keeps, in prompt order.
    """
    tokens = types_BT.shape[1]
    types = types_BT.flatten()
    width = torch.ones_like(types, dtype=torch.int64)  # uncompressed tokens that begin here
    first = torch.arange(len(types), device=types.device)  # the first token of the same frame
    offset = torch.zeros_like(width)
    for kind, number in KINDS.items():
        place = (types == number).nonzero()[:, 0]
        frames = [(frame, entry.tokens) for entry in kept.get(kind, ()) for frame in entry.index_VK]
        if len(place) != sum(len(frame) for frame, _ in frames):
            return None
        if not frames:
            continue
        sizes = torch.tensor([len(frame) for frame, _ in frames], device=types.device)
        starts = sizes.cumsum(0) - sizes
        row = torch.arange(len(place), device=types.device) - starts.repeat_interleave(sizes)
        begin = place[starts].repeat_interleave(sizes)
        if (place != begin + row).any() or (place // tokens != begin // tokens).any():
            return None
        width[place] = 0
        width[place[starts]] = torch.tensor([n for _, n in frames], device=types.device)
        first[place] = begin
        offset[place] = torch.cat([frame for frame, _ in frames]).to(types.device)
    width_BT = width.view_as(types_BT)
    lengths = width_BT.sum(1, keepdim=True)
    longest = int(lengths.max())
    start_BT = width_BT.cumsum(1) - width_BT + longest - lengths
    column_BT = (start_BT.flatten()[first] + offset).view_as(types_BT)
    real_BF = torch.arange(longest, device=types.device) >= longest - lengths
    source_BF = torch.zeros_like(real_BF, dtype=torch.int64)
    here = torch.arange(tokens, device=types.device).repeat(len(types_BT))
    source_BF[real_BF] = here.repeat_interleave(width)
    return Unpruned(source_BF, real_BF, column_BT)
