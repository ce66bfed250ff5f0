"""Serving with vLLM: the plugin, and what starts an engine that cannot run uncompressed.

Nothing here imports vLLM until vLLM itself loads the plugin.
"""

from vlmzip.vllm.engine import engine_args

__all__ = ["engine_args"]
