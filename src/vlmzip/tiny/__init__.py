"""The embedded models: two small trained LLaVAs that ship with the package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

__all__ = ["NAMES", "load_tiny", "tiny_path", "trained_path"]

NAMES = ("tiny-llava", "tiny-siglip")


def tiny_path(name: str) -> Path:
    """The checkpoint folder of an embedded model, for ``from_pretrained`` and vLLM.

    Raises ValueError for a name that is not "tiny-llava" (CLIP tower with a CLS token) or
    "tiny-siglip" (SigLIP tower without one).
    """
    if name not in NAMES:
        raise ValueError(f"no embedded model is called {name!r}; choose one of: {', '.join(NAMES)}")
    return Path(__file__).parent / "checkpoints" / name


def trained_path(name: str) -> Path:
    """As :func:`tiny_path`, but the weights are there; else, too, it raises ValueError."""
    folder = tiny_path(name)
    if not all((folder / file).is_file() for file in ("config.json", "model.safetensors")):
        raise ValueError(
            f"the weights of {name} are not part of this installation; `make train-tiny` in a checkout "
            "trains them"
        )
    return folder


def load_tiny(name: str, **kwargs: Any) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """An embedded model in eval mode, float32, with its processor; no network is used.

    kwargs go to the model's ``from_pretrained`` (say ``dtype`` or ``attn_implementation``). Raises
    ValueError for an unknown name, or if the weights are not there.
    """
    folder = trained_path(name)
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder, local_files_only=True, **kwargs)
    return model.eval(), AutoProcessor.from_pretrained(folder, local_files_only=True)
