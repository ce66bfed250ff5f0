"""Telling one model from another: weights, settings, prompt and preprocessing."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

__all__ = ["fingerprint"]


def fingerprint(model: Any, processor: Any) -> str:
    """SHA-256 over whatever makes a model answer as it does, where it was loaded from left out."""
    digest = hashlib.sha256()
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "vlmzip")}
    image_processor = processor.image_processor.to_dict()
    for part in (config, image_processor, processor.chat_template, processor.tokenizer.get_vocab()):
        digest.update(f"{_sorted(part)}\n".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sorted(part: Any) -> str:
    if isinstance(part, dict):
        return "{" + ", ".join(f"{key!r}: {_sorted(part[key])}" for key in sorted(part, key=str)) + "}"
    return repr(part)
