"""Fewer image tokens for vision-language models: VisionZip on Hugging Face transformers."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmzip.compress import Compressed, compress
    from vlmzip.compress_tower import CompressedTower, compress_tower
    from vlmzip.errors import UnsupportedModelError
    from vlmzip.families import families
    from vlmzip.merging import ZipOutput, zip_tokens
    from vlmzip.methods import Method, methods
    from vlmzip.methods.random import Random
    from vlmzip.methods.uniform import Uniform
    from vlmzip.methods.visionzip import VisionZip
    from vlmzip.tiny import load_tiny, tiny_path

__version__ = "0.1.0"

# Public names are imported when first used: torch and transformers take seconds, `vlmzip --help`
# should not.
_HOMES = {
    "Compressed": "vlmzip.compress",
    "CompressedTower": "vlmzip.compress_tower",
    "Method": "vlmzip.methods",
    "Random": "vlmzip.methods.random",
    "Uniform": "vlmzip.methods.uniform",
    "UnsupportedModelError": "vlmzip.errors",
    "VisionZip": "vlmzip.methods.visionzip",
    "ZipOutput": "vlmzip.merging",
    "compress": "vlmzip.compress",
    "compress_tower": "vlmzip.compress_tower",
    "families": "vlmzip.families",
    "load_tiny": "vlmzip.tiny",
    "methods": "vlmzip.methods",
    "tiny_path": "vlmzip.tiny",
    "zip_tokens": "vlmzip.merging",
}

__all__ = [
    "Compressed",
    "CompressedTower",
    "Method",
    "Random",
    "Uniform",
    "UnsupportedModelError",
    "VisionZip",
    "ZipOutput",
    "compress",
    "compress_tower",
    "families",
    "load_tiny",
    "methods",
    "tiny_path",
    "zip_tokens",
]


class _Package(ModuleType):
    """This package: a submodule does not take a function's name away when it is imported."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name == "vllm":
        return import_module("vlmzip.vllm")
    if name not in _HOMES:
        raise AttributeError(f"module 'vlmzip' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Package
