"""Multimodal rotary positions: kept tokens stay where they stood in the uncompressed prompt.

The model's own ``get_rope_index`` is called on the prompt with all placeholders put back, and the kept
tokens' columns are picked from what it gives. Text after an image therefore follows the whole image,
as uncompressed. Shapes: B prompts, T tokens of the compressed prompt, F of the uncompressed one.
"""

import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlmzip.attachment import Attachment
from vlmzip.families.base import foreign_prompt, place_in_prompt
from vlmzip.patch_merger import Kept
from vlmzip.unprune import KINDS, unprune

_PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


class MropeAttachment(Attachment):
    """The state of a compressed M-RoPE model: it also knows what the prompt under way keeps."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.prompt = Prompt()


class Prompt:
    """By kind, what the images and videos of the calling thread's prompt under way keep.

    Features carry it with them, because a caller may encode now and run the model later.
    """

    def __init__(self) -> None:
        self._local = threading.local()

    def __reduce__(self) -> tuple[Any, ...]:
        return Prompt, ()

    @property
    def kept(self) -> dict[str, list[Kept]]:
        """Empty outside a forward."""
        return getattr(self._local, "kept", {})

    @contextmanager
    def of(self, features: Mapping[str, Any] | None) -> Iterator[None]:
        """A forward on features that were encoded before, if any; it may encode others itself."""
        known = {kind: getattr(output, "_vlmzip_kept", None) for kind, output in (features or {}).items()}
        self._local.kept = {kind: kept for kind, kept in known.items() if kept is not None}
        try:
            yield
        finally:
            self._local.kept = {}


def attach(base: PreTrainedModel, state: MropeAttachment) -> None:
    """Compress what the tower's features methods return, and give the kept tokens their positions."""
    state.patches.lend(base, "rope_deltas")
    state.patches.set_forward(base, _forward)
    for name, method in (
        ("get_image_features", _get_image_features),
        ("get_video_features", _get_video_features),
        ("get_placeholder_mask", place_in_prompt),
        ("get_rope_index", _get_rope_index),
        ("compute_3d_position_ids", _compute_3d_position_ids),
    ):
        state.patches.set_method(base, name, method)


def attach_generation(model: PreTrainedModel, state: MropeAttachment) -> None:
    """Let generate() encode before it makes positions: they follow from what is kept."""
    name = "_prepare_position_ids_for_generation"
    if hasattr(type(model), name):
        state.patches.set_method(model, name, _prepare_position_ids_for_generation)


# --- features -----------------------------------------------------------------------------------


def _get_image_features(
    self: Any, pixel_values: Tensor, image_grid_thw: Tensor | None = None, **kwargs: Any
) -> Any:
    return _features(self, "image", pixel_values, image_grid_thw, **kwargs)


def _get_video_features(
    self: Any, pixel_values_videos: Tensor, video_grid_thw: Tensor | None = None, **kwargs: Any
) -> Any:
    return _features(self, "video", pixel_values_videos, video_grid_thw, **kwargs)


def _features(self: Any, kind: str, pixels: Tensor, grid_thw: Tensor | None, **kwargs: Any) -> Any:
    """The stock method, its output compressed."""
    state: MropeAttachment = self._vlmzip
    stock = getattr(type(self), f"get_{kind}_features")
    if state.tap.reading is not None:
        return stock(self, pixels, grid_thw, **kwargs)  # qwen3_vl's for videos calls the one for images
    if grid_thw is None:
        raise ValueError(f"{kind}_grid_thw is missing; the processor returns it beside the pixels")
    return_dict = kwargs.pop("return_dict", None)
    with state.tap.listen() as reading:
        output = stock(self, pixels, grid_thw, return_dict=True, **kwargs)
    selections, kept = state.family.tower.compress(output, grid_thw, reading.take(), state)
    state.record(selections, kind)
    state.prompt.kept[kind] = kept
    output._vlmzip_kept = kept
    as_output = self.config.return_dict if return_dict is None else return_dict
    return output if as_output else output.to_tuple()


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    with self._vlmzip.prompt.of(kwargs.get("mm_encoder_outputs")):
        return self._vlmzip_forward(*args, **kwargs)


# --- positions ----------------------------------------------------------------------------------


def _get_rope_index(self: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """The stock positions of the uncompressed prompt, picked at the kept tokens.

    Returns:
        Positions [3, B, T], and [B, 1]: the position after the last, less the tokens so far.

    Raises:
        ValueError: The prompt's placeholders are not the kept tokens of the images and videos that
            this forward encoded.
    """
    state: MropeAttachment = self._vlmzip
    stock = type(self).get_rope_index
    call = inspect.signature(stock).bind(self, *args, **kwargs)
    given = call.arguments
    grids = {kind: given.get(f"{kind}_grid_thw") for kind in KINDS}
    if all(grid is None for grid in grids.values()):
        plain: tuple[Tensor, Tensor] = stock(*call.args, **call.kwargs)
        return plain
    for kind, grid in grids.items():
        if grid is not None:
            _check_features(self, kind, grid)
    types_BT = given["mm_token_type_ids"]
    full = unprune(types_BT, state.prompt.kept)
    if full is None:
        counts = {kind: int((types_BT == number).sum()) for kind, number in KINDS.items()}
        raise ValueError(
            f"the prompt's placeholders ({counts['image']} image, {counts['video']} video) are not the "
            f"tokens that its images and videos keep. {foreign_prompt(state.method)}"
        )
    mask_BT = given.get("attention_mask")
    if mask_BT is None:
        mask_BT = torch.ones_like(types_BT)
    if mask_BT.shape != types_BT.shape:
        raise ValueError(
            f"attention_mask {list(mask_BT.shape)} and mm_token_type_ids {list(types_BT.shape)} must be "
            "of the same tokens"
        )
    mask_BF = mask_BT.gather(1, full.source_BF) * full.real_BF
    given["input_ids"] = given["input_ids"].gather(1, full.source_BF)
    given["mm_token_type_ids"] = types_BT.gather(1, full.source_BF)
    given["attention_mask"] = mask_BF
    positions_3BF, deltas_B1 = stock(*call.args, **call.kwargs)
    column_3BT = full.column_BT.expand(3, -1, -1)
    dropped_B1 = mask_BF.bool().sum(1, keepdim=True) - mask_BT.bool().sum(1, keepdim=True)
    return positions_3BF.gather(2, column_3BT), deltas_B1 + dropped_B1


def _check_features(self: Any, kind: str, grid_thw: Tensor) -> None:
    """Refuse features whose selection is not known, or that are not of these grids."""
    kept = self._vlmzip.prompt.kept.get(kind)
    if kept is None:
        raise ValueError(
            f"{kind}_grid_thw was given, but not what the {kind}s keep: positions of a compressed model "
            f"follow from its features. Pass the {kind}s' pixels, or what get_{kind}_features of this "
            "compressed model returned, in the same forward"
        )
    merge = self._vlmzip.family.tower.merge
    wanted = (grid_thw.prod(-1) // merge**2).tolist()
    found = [len(entry.index_VK) * entry.tokens for entry in kept]
    if wanted != found:
        raise ValueError(
            f"{kind}_grid_thw is of {kind}s of {wanted} tokens, the features are of {kind}s of {found}"
        )


# --- later turns on a reused cache --------------------------------------------------------------


def _compute_3d_position_ids(self: Any, *args: Any, **kwargs: Any) -> Tensor | None:
    """The stock positions of a forward; also where images come after what the cache holds."""
    stock = type(self).compute_3d_position_ids
    given = inspect.signature(stock).bind(self, *args, **kwargs).arguments
    ids, types = given.get("input_ids"), given.get("mm_token_type_ids")
    cache = given.get("past_key_values")
    past = 0 if cache is None else cache.get_seq_length()
    _check_types(self, ids, types)
    if past and ids is not None and types is not None and types.any():
        return _later_positions(self, ids, types, past, given)
    positions: Tensor | None = stock(self, *args, **kwargs)
    return positions


def _prepare_position_ids_for_generation(self: Any, inputs_tensor: Tensor, model_kwargs: Any) -> Tensor:
    """The stock positions of generate(), after encoding: ``model_kwargs`` then holds the features."""
    base = self.base_model
    _encode(base, model_kwargs)
    ids, types = model_kwargs.get("input_ids"), model_kwargs.get("mm_token_type_ids")
    ids = inputs_tensor if ids is None or not ids.shape[1] else ids
    cache, mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
    past = 0 if cache is None else cache.get_seq_length()
    with base._vlmzip.prompt.of(model_kwargs.get("mm_encoder_outputs")):
        _check_types(base, ids if ids.ndim == 2 else None, types)
        if past and types is not None:
            fresh = ids.shape[1] if mask is None else mask.shape[1] - past
            ids, types = ids[:, -fresh:], types[:, -fresh:]
            if types.any():
                later = _later_positions(base, ids, types, past, model_kwargs)
                before = later.new_zeros(3, later.shape[1], past)  # cached; generate() cuts it off
                return torch.cat([before, later], 2)
        stock = type(self)._prepare_position_ids_for_generation
        positions: Tensor = stock(self, inputs_tensor, model_kwargs)
        return positions


def _check_types(base: Any, ids: Tensor | None, types: Tensor | None) -> None:
    if ids is not None and types is None and base._vlmzip.prompt.kept:
        raise ValueError(
            "mm_token_type_ids is missing: without it kept tokens would lose their positions; the "
            "processor returns it beside input_ids"
        )


def _encode(base: Any, model_kwargs: dict[str, Any]) -> None:
    """Put features in the place of pixels, as generate() itself does a little later."""
    features = dict(model_kwargs.get("mm_encoder_outputs") or {})
    for kind, name in _PIXELS.items():
        if model_kwargs.get(name) is None or features.get(kind) is not None:
            continue
        encode = getattr(base, f"get_{kind}_features")
        names = set(inspect.signature(encode).parameters) & set(model_kwargs)
        features[kind] = encode(**{name: model_kwargs[name] for name in names}, return_dict=True)
        del model_kwargs[name]
        model_kwargs["mm_encoder_outputs"] = features


def _later_positions(
    base: Any, ids_BT: Tensor, types_BT: Tensor, past: int, given: Mapping[str, Any]
) -> Tensor:
    """Positions [3, B, T] of tokens with images, after ``past`` tokens in the cache.

    Some transformers versions count such images as text, which would take the kept tokens' places
    away from them. Here they go on where the cached prompt ended.
    """
    kept = base._vlmzip.prompt.kept
    grids = {
        name: given[name][-len(kept[kind]) :] if given.get(name) is not None and kept.get(kind) else None
        for kind, name in (
            ("image", "image_grid_thw"),
            ("video", "video_grid_thw"),
            ("video", "second_per_grid_ts"),
        )
    }
    mask = given.get("attention_mask")
    if mask is None:
        mask = torch.ones(len(ids_BT), past + ids_BT.shape[1], dtype=torch.int64, device=ids_BT.device)
    seen_B1 = mask[:, :past].sum(1, keepdim=True)
    # A cached prompt without images leaves no deltas: its positions count padding too.
    old_B1 = past - seen_B1 if base.rope_deltas is None else base.rope_deltas.to(mask.device)
    positions, deltas = base.get_rope_index(
        ids_BT, mm_token_type_ids=types_BT, attention_mask=mask[:, past:], **grids
    )
    base.rope_deltas = old_B1 + deltas
    shifted: Tensor = positions + seen_B1 + old_B1
    return shifted
