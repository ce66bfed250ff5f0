"""Fewer image tokens for vision-language models: VisionZip on Hugging Face transformers."""

from vlmzip.compress import Compressed, compress
from vlmzip.errors import UnsupportedModelError
from vlmzip.families import families
from vlmzip.merging import ZipOutput, zip_tokens
from vlmzip.methods import Method, methods
from vlmzip.methods.random import Random
from vlmzip.methods.uniform import Uniform
from vlmzip.methods.visionzip import VisionZip

__version__ = "0.1.0"

__all__ = [
    "Compressed",
    "Method",
    "Random",
    "Uniform",
    "UnsupportedModelError",
    "VisionZip",
    "ZipOutput",
    "compress",
    "families",
    "methods",
    "zip_tokens",
]
