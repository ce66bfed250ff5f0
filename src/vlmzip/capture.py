"""Reading q and k off one attention layer of one model instance, whatever attention it runs.

transformers hands q, k and v, as the softmax sees them, to a function looked up by the name in the
attention module's config. The tapped module gets a copy of that config which names a function of
ours; that function notes the scores and keys and then calls the one the encoder is configured for.
So the layer keeps SDPA or FlashAttention, LoRA layers are seen through, and nothing else changes.
"""

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from vlmzip.attention import cls_attention, mean_keys, received_attention
from vlmzip.errors import UnsupportedModelError
from vlmzip.merging import ZipOutput
from vlmzip.patch import Patches

CAPTURE = "vlmzip_capture"
CAPTURE_FLASH = "vlmzip_capture_flash"  # encoders look for "flash" in the name


class Reading:
    """What one forward of a compressed model leaves on its way.

    Attributes:
        records: Scores [B, N] and keys [B, N, d], float32, one pair a call of the tapped layer; one
            a packed sequence, if the layer packs several.
        zipped: The compression step's output, once it has run.
        valid: Which tokens are no padding, [B, N] bool; None if all are.
        late: Tokens are compressed at a later step than the projector's input.
    """

    def __init__(self) -> None:
        self.valid: Tensor | None = None
        self.late = False
        self.records: list[tuple[Tensor, Tensor]] = []
        self.zipped: ZipOutput | None = None

    def take(self) -> list[tuple[Tensor, Tensor]]:
        """The records, which are then gone.

        Raises:
            UnsupportedModelError: The layer was not called, or not through transformers' interface.
        """
        if not self.records:
            raise UnsupportedModelError(
                "the vision tower's attention was not seen: the tapped layer did not run through "
                "transformers' attention interface. Was the vision tower or its attention replaced "
                "after compress()? Call compress() last"
            )
        records, self.records = self.records, []
        return records


class Tap:
    """Carries scores and keys from the tapped layer to the compression step of the same forward.

    It records only while armed: a gradient checkpoint runs the layer again in the backward pass, and
    a vision tower may be called on its own. Each thread has its own reading. Compiled code cannot
    look up thread-local state and takes the latest one, so threads take turns in the encoder: where
    only the tower is compiled they would read each other's.
    """

    def __init__(self, cls_token: bool) -> None:
        self.cls_token = cls_token
        self._turn = threading.RLock()
        self._local = threading.local()
        self._latest: Reading | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Tap, (self.cls_token,)  # a copied model starts with no reading

    @property
    def reading(self) -> Reading | None:
        """The reading of the forward under way, None outside one."""
        if torch.compiler.is_compiling():
            return self._latest
        return getattr(self._local, "reading", None)

    @contextmanager
    def listen(self) -> Iterator[Reading]:
        """Arm the tap for one forward of the encoder."""
        if torch.compiler.is_compiling():
            self._latest = reading = Reading()
            try:
                yield reading
            finally:
                self._latest = None
            return
        with self._turn:
            self._latest = self._local.reading = reading = Reading()
            try:
                yield reading
            finally:
                self._latest = self._local.reading = None

    def note(self, query: Tensor, key: Tensor, scale: float, mask: Tensor | None) -> None:
        """Record one call of the tapped layer, if armed: query and key [B, H, N, d]."""
        reading = self.reading
        if reading is None:
            return
        if mask is not None and mask.ndim == 2:  # FlashAttention's: which keys are no padding
            mask = mask[:, None, None, :].bool()
        if reading.valid is not None:  # encoders mask padding as keys only, not as queries
            mask = reading.valid[:, None, None, :] & reading.valid[:, None, :, None]
        with torch.no_grad():
            if self.cls_token:
                scores = cls_attention(query, key, scale, mask)
            else:
                scores = received_attention(query, key, scale, mask)
            reading.records.append((scores, mean_keys(key)))


class TappedConfig:
    """Mixin for the tapped layer's config: names our function, follows the encoder's choice."""

    _vlmzip_encoder_config: Any

    @property
    def _attn_implementation(self) -> str:
        encoder = self._vlmzip_encoder_config._attn_implementation or ""
        return CAPTURE_FLASH if "flash" in encoder else CAPTURE


class _AsEncoder:
    """The tapped module as it looks to an attention function: with the encoder's own config."""

    def __init__(self, module: nn.Module, config: Any) -> None:
        self._module = module
        self.config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def tap_attention(attention: nn.Module, tap: Tap, patches: Patches) -> None:
    """Make ``attention`` leave its scores and keys with ``tap``; undone by ``patches``.

    Raises:
        UnsupportedModelError: The module does not look its attention function up by config.
        ValueError: It is tapped already.
    """
    config = getattr(attention, "config", None)
    if not hasattr(config, "_attn_implementation"):
        raise UnsupportedModelError(
            f"{type(attention).__name__} has no config with an attention implementation to read from"
        )
    if isinstance(config, TappedConfig):
        raise ValueError("this vision tower is already compressed; call remove() on its handle first")
    twin = copy.copy(config)
    twin.__class__ = type(type(config).__name__, (TappedConfig, type(config)), {})
    object.__setattr__(twin, "_vlmzip_encoder_config", config)
    patches.set(attention, "config", twin)
    patches.set(attention, "_vlmzip_tap", tap)


def skip_while_armed(layer: nn.Module, tap: Tap, patches: Patches) -> None:
    """Do not run ``layer``, whose output nobody uses, in forwards that end in compression.

    Its output is then NaN, so that whoever does look at the last hidden state is not misled.

    Raises:
        ValueError: Another compression skips it already.
    """
    if "_vlmzip_tap" in vars(layer):
        raise ValueError("this vision tower is already compressed; call remove() on its handle first")
    patches.set(layer, "_vlmzip_tap", tap)
    patches.set_forward(layer, _skip_or_run)


def _skip_or_run(layer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    if layer._vlmzip_tap.reading is not None:
        return hidden_states.new_full((), torch.nan).expand_as(hidden_states)
    return layer._vlmzip_forward(hidden_states, *args, **kwargs)


def _capture(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function of a tapped layer: note scores and keys, then attend as configured."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    for part in _sequences(kwargs.get("cu_seq_lens_q")):
        module._vlmzip_tap.note(query[:, :, part], key[:, :, part], scale, attention_mask)
    config = module.config._vlmzip_encoder_config
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, _eager(module))
    result: tuple[Tensor, Tensor | None] = attend(
        _AsEncoder(module, config), query, key, value, attention_mask, scaling=scaling, **kwargs
    )
    return result


def _sequences(bounds: Tensor | None) -> list[slice]:
    """The sequences that one call packs: FlashAttention gets all at once, with their boundaries."""
    if bounds is None:
        return [slice(None)]
    return [slice(start, end) for start, end in pairwise(bounds.tolist())]


def _eager(module: nn.Module) -> Callable[..., Any] | None:
    """The eager attention of the file that defines the module's class, transformers' default."""
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


AttentionInterface.register(CAPTURE, _capture)
AttentionInterface.register(CAPTURE_FLASH, _capture)
