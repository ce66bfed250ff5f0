"""Mini-Gemini (arXiv 2403.18814), which transformers does not have; importing this registers it.

``AutoConfig``, ``AutoModelForImageTextToText`` and ``AutoProcessor`` then know ``mini_gemini``.
docs/mini-gemini.md says what is as published and where we had to decide.
"""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from vlmzip.mini_gemini.configuration import MiniGeminiConfig
from vlmzip.mini_gemini.modeling import (
    MiniGeminiForConditionalGeneration,
    MiniGeminiModel,
    PatchInfoMining,
)
from vlmzip.mini_gemini.processing import MiniGeminiProcessor

AutoConfig.register(MiniGeminiConfig.model_type, MiniGeminiConfig, exist_ok=True)
AutoModelForImageTextToText.register(MiniGeminiConfig, MiniGeminiForConditionalGeneration, exist_ok=True)
AutoProcessor.register(MiniGeminiConfig, MiniGeminiProcessor, exist_ok=True)

__all__ = [
    "MiniGeminiConfig",
    "MiniGeminiForConditionalGeneration",
    "MiniGeminiModel",
    "MiniGeminiProcessor",
    "PatchInfoMining",
]
