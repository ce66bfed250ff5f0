"""compress_tower(): a vision tower on its own, for VLMs that transformers does not know."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from vlmzip.attachment import Attachment
from vlmzip.merging import ZipOutput
from vlmzip.methods import Method
from vlmzip.towers import Tower


def compress_tower(tower: Any, method: Method, *, layer: int = -2) -> "CompressedTower":
    """Make a callable that runs a vision tower and compresses what it sees.

    Args:
        tower: A transformers CLIP, SigLIP or SigLIP 2 vision model.
        method: Such as ``VisionZip(tokens=64)``. Its ``order``, if None, is "grouped".
        layer: Index into the tower's hidden states: features, scores and keys come from there. -2 is
            what LLaVA and the paper read.

    Returns:
        A callable; see :class:`CompressedTower`. In between, the tower itself works as before.

    Raises:
        TypeError: ``tower`` is not a transformers model, or ``method`` is not a method.
        ValueError: The budget does not fit, or the tower is compressed already.
        UnsupportedModelError: The tower is of a kind that cannot be compressed.
    """
    if not isinstance(tower, PreTrainedModel):
        raise TypeError(f"tower must be a transformers vision model, got {type(tower).__name__}")
    if not isinstance(method, Method):
        raise TypeError(f"method must be a vlmzip method such as VisionZip(tokens=64), got {method!r}")
    config = tower.config
    packed = config.model_type == "siglip2_vision_model"
    if packed:
        spec = Tower.reading((0, 0), cls_token=False, depth=config.num_hidden_layers, layer=layer)
    else:
        spec = Tower.from_config(config, layer)
        method.budget.count(spec.tokens(method.send_cls))
    return CompressedTower(tower, method, spec, packed)


class CompressedTower:
    """A vision tower whose calls end in compression.

    ``compressed(pixel_values)`` takes what the tower takes and returns a
    :class:`vlmzip.ZipOutput` with ``tokens`` [B, K, D], not projected, and the scores.
    """

    def __init__(self, tower: PreTrainedModel, method: Method, spec: Tower, packed: bool) -> None:
        """Attach to the tower instance; use :func:`compress_tower`.

        Args:
            tower: The vision model.
            method: What to do.
            spec: Where the tower is read.
            packed: Images come as padded lists of patches, each with a shape of its own (SigLIP 2).
        """
        self._spec = spec
        self._tower = tower
        self._packed = packed
        self._state: Attachment = Attachment(
            self, method, cls_token=spec.cls_token, views=1, dynamic=packed
        )
        if "_vlmzip" in vars(tower):
            raise ValueError("this tower is already compressed; call remove() on its handle first")
        try:
            spec.attach(tower, self._state)
        except Exception:
            self._state.patches.undo()
            raise
        self._state.patches.set(tower, "_vlmzip", self._state)

    def __call__(self, pixel_values: Tensor, **kwargs: Any) -> ZipOutput:
        """Encode and compress.

        Args:
            pixel_values: What the tower takes: [B, 3, H, W], or a SigLIP 2 batch of patches.
            kwargs: The tower's other arguments. A SigLIP 2 tower needs ``pixel_attention_mask`` and
                ``spatial_shapes``; all images of a batch must then keep as many tokens.

        Raises:
            RuntimeError: The handle was removed, or the tower gave NaN or infinite values.
            ValueError: The images of a batch would keep different numbers of tokens.
        """
        if vars(self._tower).get("_vlmzip") is not self._state:
            raise RuntimeError("this handle was removed; call compress_tower() again")
        if self._packed and not {"pixel_attention_mask", "spatial_shapes"} <= kwargs.keys():
            raise ValueError("a SigLIP 2 tower needs pixel_attention_mask= and spatial_shapes=")
        with self._state.tap.listen() as reading:
            if self._packed:
                reading.valid = kwargs["pixel_attention_mask"].bool()
            output = self._tower(pixel_values, output_hidden_states=True, **kwargs)
            ((scores, keys),) = reading.take()
        hidden: Tensor = output.hidden_states[self._spec.layer]
        if not self._packed:
            out: ZipOutput = self._state.zip_views(hidden, scores, keys, self._spec.grid)
            return out
        outs = []
        for i, (h, w) in enumerate(kwargs["spatial_shapes"].tolist()):
            part = (slice(i, i + 1), slice(h * w))
            outs.append(self._state.zip_views(hidden[part], scores[part], keys[part], (h, w)))
        return _stack(outs)

    def __enter__(self) -> "CompressedTower":
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Give the tower back as it was. A second call does nothing."""
        self._state.patches.undo()


def _stack(outs: list[ZipOutput]) -> ZipOutput:
    """One output of images that differ in size; missing tokens have assignment -1 and score 0."""
    if len({(out.dominant.shape[1], out.contextual.shape[1]) for out in outs}) > 1:
        kept = ", ".join(str(out.tokens.shape[1]) for out in outs)
        raise ValueError(
            f"the images of this batch keep different numbers of tokens ({kept}), or some of them all "
            "they have; give tokens= below the number of every image's, or encode them one by one"
        )
    longest = max(out.assignment.shape[1] for out in outs)
    scores = [out.scores for out in outs if out.scores is not None]
    return ZipOutput(
        tokens=torch.cat([out.tokens for out in outs]),
        dominant=torch.cat([out.dominant for out in outs]),
        contextual=torch.cat([out.contextual for out in outs]),
        assignment=torch.cat(
            [pad(out.assignment, (0, longest - out.assignment.shape[1]), value=-1) for out in outs]
        ),
        scores=torch.cat([pad(score, (0, longest - score.shape[1])) for score in scores]),
    )
