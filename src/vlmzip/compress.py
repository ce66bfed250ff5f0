"""compress(): fit a method to one model and one processor, and take it back."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from transformers import PreTrainedModel
from transformers.processing_utils import ProcessorMixin

from vlmzip.attachment import Attachment, Selection
from vlmzip.families import Family, family_of
from vlmzip.methods import Method, from_settings
from vlmzip.processing import (
    CompressedProcessor,
    Placeholders,
    compress_processor,
    restore_processor,
)


def compress(model: Any, processor: Any, method: Method | None = None) -> "Compressed":
    """Compress the image tokens of this model, and size this processor's placeholders to match.

    Only these two instances change; :meth:`Compressed.remove` gives them back as they were.

    Args:
        model: A transformers vision-language model of a supported family, or a peft model round one.
        processor: Its processor. None: the caller sizes the placeholders, or wants features only.
        method: What to do, such as ``VisionZip(tokens=64)``. None: what ``model.config.vlmzip`` says.

    Returns:
        A handle, also a context manager that removes the compression at its end.

    Raises:
        TypeError: ``model``, ``processor`` or ``method`` is of the wrong kind.
        ValueError: The budget does not fit, something is compressed already, or the processor is
            another model's.
        UnsupportedModelError: The model's family or configuration cannot be compressed.
    """
    model = _unwrap(model)
    family = family_of(model.config)
    method = settle(method if method is not None else stored_method(model.config), family)
    if _attachment(model) is not None:
        raise ValueError("this model is already compressed; call remove() on its handle first")
    state = family.attachment(method)
    if processor is not None:
        _check_processor(processor, family, model, method)
    try:
        state.patches.set(model.base_model, "_vlmzip", state)
        family.attach(model.base_model, state)
        family.attach_generation(model, state)
    except Exception:
        state.patches.undo()
        raise
    if processor is not None:
        compress_processor(processor, Placeholders(family, method))
    return Compressed(model, processor)


class Compressed:
    """A compressed model and, if one was given, its processor.

    Attributes:
        model: The model, compressed until :meth:`remove`.
        processor: The processor, or None.
        method: The method, its ``order`` settled.
        family: The model's family, fitted to its config.
    """

    def __init__(self, model: Any, processor: ProcessorMixin | None = None) -> None:
        """Take hold of a compressed model; also of a copy that ``copy.deepcopy`` made of one.

        Raises:
            TypeError: It is no transformers model, nor a peft model round one.
            ValueError: The model is not compressed.
        """
        model = _unwrap(model)
        state = _attachment(model)
        if state is None:
            raise ValueError("this model is not compressed; call compress(model, processor, method)")
        self._state: Attachment | None = state
        self.model: PreTrainedModel = model
        self.processor = processor
        self.method: Method = state.method
        self.family: Family = state.family

    @property
    def last(self) -> tuple[Selection, ...]:
        """What became of the latest images: one entry an image or video, in prompt order.

        Of the calling thread's latest eager forward that had images; empty before the first.

        Raises:
            RuntimeError: The latest forward was compiled, or the compression was removed.
        """
        if self._state is None:
            raise RuntimeError("the compression was removed; nothing is recorded any more")
        return self._state.last

    def remove(self) -> None:
        """Give model and processor back as they were. A second call does nothing."""
        if self._state is None:
            return
        self._state.patches.undo()
        self._state = None
        if isinstance(self.processor, CompressedProcessor):
            restore_processor(self.processor)

    def save_pretrained(self, folder: str | Path) -> None:
        """Save a checkpoint that remembers its settings, for ``compress(model, processor)``.

        transformers loads it uncompressed by its model_type; its architecture name is one that only
        vlmzip's vLLM plugin registers, so that vLLM without the plugin refuses it.

        Raises:
            RuntimeError: The compression was removed.
            ValueError: The model holds adapters, whose weights would load under names nobody reads.
        """
        if self._state is None:
            raise RuntimeError("the compression was removed; save before remove()")
        if any(name.endswith(".base_layer") for name, _ in self.model.named_modules()):
            raise ValueError(
                "the model holds peft adapters, and its checkpoint would load without its weights; "
                "call merge_and_unload() on the peft model before save_pretrained()"
            )
        self.model.save_pretrained(folder)
        if self.processor is not None:
            self.processor.save_pretrained(folder)
        path = Path(folder) / "config.json"
        config = json.loads(path.read_text())
        config["architectures"] = [f"Vlmzip{type(self.model).__name__}"]
        config["vlmzip"] = self.method.settings()
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()


def _unwrap(model: Any) -> PreTrainedModel:
    if hasattr(model, "_orig_mod"):
        raise TypeError("this model was compiled by torch.compile; compress it first, then compile")
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(
            f"model must be a transformers PreTrainedModel, got {type(model).__name__}; for a vision "
            "tower of your own see zip_tokens()"
        )
    return inner


def _attachment(model: PreTrainedModel) -> Attachment | None:
    state: Attachment | None = vars(model.base_model).get("_vlmzip")
    return state


def stored_method(config: Any) -> Method:
    """The method that a checkpoint's config remembers in ``vlmzip``.

    Raises:
        ValueError: It remembers none, or none that is known.
    """
    settings = getattr(config, "vlmzip", None)
    if settings is None:
        raise ValueError(
            "no method was given and model.config.vlmzip holds none; pass one, such as "
            "VisionZip(tokens=64)"
        )
    if not isinstance(settings, Mapping):
        raise ValueError(f"model.config.vlmzip must be a settings dict, got {settings!r}")
    return from_settings(settings)


def settle(method: Any, family: Family) -> Method:
    """The method for a family: its ``order`` is the family's own, unless it has one.

    Raises:
        TypeError: It is no method.
        ValueError: It does not choose among the vision tower's tokens.
    """
    if not isinstance(method, Method):
        raise TypeError(f"method must be a vlmzip method such as VisionZip(tokens=64), got {method!r}")
    if method.kind != "encoder":
        raise ValueError(
            f"method {method.name!r} is of kind {method.kind!r}; only methods that choose among the "
            "vision tower's tokens fit here"
        )
    return replace(method, order=method.order or family.order)


def _check_processor(processor: Any, family: Family, model: PreTrainedModel, method: Method) -> None:
    if isinstance(processor, CompressedProcessor):
        raise ValueError("this processor is already compressed; call remove() on its handle first")
    if not isinstance(processor, ProcessorMixin):
        raise TypeError(
            f"processor must be a transformers processor or None, got {type(processor).__name__}"
        )
    family.check_processor(processor, model.config, method)
