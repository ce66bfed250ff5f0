"""CLIP- and SigLIP-like vision towers: which block to read, which blocks need not run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn

from vlmzip.attachment import Attachment
from vlmzip.capture import skip_while_armed, tap_attention
from vlmzip.errors import UnsupportedModelError
from vlmzip.methods.base import Grid

FeatureLayer = int | tuple[int, ...]

_HAS_CLS = {"clip_vision_model": True, "siglip_vision_model": False}
_REFUSED = {
    "pixtral": "it packs images of any size into one sequence, so an image has no fixed number of "
    "tokens to keep a budget of",
    "siglip2_vision_model": "its images have any number of patches; compress_tower() takes it on its own",
}


def feature_layer(value: Any) -> FeatureLayer:
    """A config's or caller's ``vision_feature_layer`` as a hashable value."""
    return tuple(value) if isinstance(value, Sequence) else value


@dataclass(frozen=True)
class Tower:
    """A tower of fixed resolution, read at one block.

    Attributes:
        grid: (h, w) of the patches.
        cls_token: Token 0 is a CLS token.
        layer: The ``vision_feature_layer`` that is read: an index into the hidden states, or several
            whose features are concatenated.
        block: The block that is read: the one whose output the deepest of these layers is.
    """

    grid: Grid
    cls_token: bool
    layer: FeatureLayer
    block: int

    @classmethod
    def from_config(cls, vision: Any, layer: Any) -> Self:
        """Read the tower's config.

        Raises:
            UnsupportedModelError: The tower is of an unknown kind, or ``layer`` names no block.
        """
        if vision.model_type not in _HAS_CLS:
            reason = _REFUSED.get(vision.model_type, "its layout is not known")
            raise UnsupportedModelError(
                f"a {vision.model_type!r} vision tower cannot be compressed: {reason}. "
                f"Supported towers: {', '.join(_HAS_CLS)}"
            )
        side = vision.image_size // vision.patch_size
        return cls.reading((side, side), _HAS_CLS[vision.model_type], vision.num_hidden_layers, layer)

    @classmethod
    def reading(cls, grid: Grid, cls_token: bool, depth: int, layer: Any) -> Self:
        """A tower of ``depth`` blocks that is read at ``layer``.

        Raises:
            UnsupportedModelError: ``layer`` names no block.
        """
        layer = feature_layer(layer)
        listed = layer if isinstance(layer, tuple) else (layer,)
        if not listed or not all(-depth - 1 <= index <= depth for index in listed):
            raise UnsupportedModelError(
                f"vision_feature_layer={layer} does not exist in a tower of {depth} layers"
            )
        # hidden_states[0] is the embedding, hidden_states[i] the output of block i - 1.
        block = max(index % (depth + 1) for index in listed) - 1
        if block < 0:
            raise UnsupportedModelError(
                f"vision_feature_layer={layer} is the embedding: no attention was paid yet"
            )
        return cls(grid, cls_token, layer, block)

    @property
    def patches(self) -> int:
        """Patch tokens of a view."""
        return self.grid[0] * self.grid[1]

    def tokens(self, send_cls: bool) -> int:
        """N, the tokens that the tower hands on."""
        return self.patches + (self.cls_token and send_cls)

    def attach(self, tower: nn.Module, state: Attachment) -> None:
        """Read q and k at the block; do not run the blocks after it, whose output nobody uses."""
        encoder: Any = getattr(tower, "vision_model", tower)
        blocks = encoder.encoder.layers
        tap_attention(blocks[self.block].self_attn, state.tap, state.patches)
        for block in blocks[self.block + 1 :]:
            skip_while_armed(block, state.tap, state.patches)

    def compress_before(self, projector: nn.Module, state: Attachment) -> None:
        """Compress what reaches the projector, in forwards that the tap listens to."""
        state.patches.set(projector, "_vlmzip", state)
        state.patches.pre_hook(projector, _compress_input)

    def check_layer(self, config: Any, name: str, given: Any) -> None:
        """Refuse a forward that asks for other layers than the ones that were attached to.

        Args:
            config: The model's config, whose value counts if ``given`` is None.
            name: The config's field.
            given: The caller's argument.

        Raises:
            ValueError: They differ.
        """
        asked = feature_layer(getattr(config, name) if given is None else given)
        if asked != self.layer:
            raise ValueError(
                f"{name}={asked} differs from {self.layer}, which compress() attached to; "
                f"remove the compression, set config.{name}, and compress again"
            )


def _compress_input(projector: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """Pre-hook of a projector: K tokens a view instead of N."""
    state: Attachment = projector._vlmzip
    reading = state.tap.reading
    if reading is None or reading.late:
        return None
    (hidden,) = args
    ((scores, keys),) = reading.take()
    reading.zipped = state.zip_views(hidden, scores, keys, state.family.tower.grid)
    return (reading.zipped.tokens,)
