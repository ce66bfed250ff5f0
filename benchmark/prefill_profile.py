"""Where a compressed prefill spends its time: LLaVA-1.5-7B shapes, random weights.

The language model has the real width and a few of its 32 layers; its time grows with the number of
layers, so the share that 32 layers would take is shown beside the measured one, as computed.

    python benchmark/prefill_profile.py --layers 2 --tokens 64 --threads 2
"""

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from vlmzip import VisionZip, compress
from vlmzip.attachment import Attachment
from vlmzip.capture import Tap

REAL_LAYERS = 32
TEXT_TOKENS = 40
IMAGE_TOKEN = 3

Clock = dict[str, float]


def build(dtype: torch.dtype, layers: int) -> LlavaForConditionalGeneration:
    """LLaVA-1.5-7B's shapes with ``layers`` language model layers."""
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    text = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        vocab_size=32064,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(0)
        return LlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(default)


def timed(clock: Clock, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, adding its wall time to ``clock[name]``."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        clock[name] += time.perf_counter() - start
        return result

    return run


@contextmanager
def stopwatches(model: LlavaForConditionalGeneration, clock: Clock) -> Iterator[None]:
    """Time the parts of a prefill; what they contain of each other is taken off by the caller."""
    inner = model.model
    parts: dict[str, nn.Module] = {
        "vision tower": inner.vision_tower,
        "projector": inner.multi_modal_projector,
        "language model": inner.language_model,
    }
    note, zip_views = Tap.note, Attachment.zip_views
    try:
        for name, module in parts.items():
            module.forward = timed(clock, name, module.forward)
        Tap.note = timed(clock, "scores and keys", note)  # type: ignore[method-assign]
        Attachment.zip_views = timed(clock, "select and merge", zip_views)  # type: ignore[method-assign]
        yield
    finally:
        for module in parts.values():
            del module.forward
        Tap.note, Attachment.zip_views = note, zip_views  # type: ignore[method-assign]


@torch.inference_mode()
def prefill(model: LlavaForConditionalGeneration, image_tokens: int, pixels: torch.Tensor) -> Clock:
    """One forward over the prompt: seconds by part."""
    ids = torch.tensor([[5] * TEXT_TOKENS + [IMAGE_TOKEN] * image_tokens])
    clock: Clock = defaultdict(float)
    with stopwatches(model, clock):
        start = time.perf_counter()
        model(input_ids=ids, pixel_values=pixels, logits_to_keep=1)
        clock["total"] = time.perf_counter() - start
    clock["vision tower"] -= clock["scores and keys"]
    measured = sum(seconds for name, seconds in clock.items() if name != "total")
    clock["rest"] = clock["total"] - measured
    return clock


def measure(
    dtype: torch.dtype, layers: int, tokens: int, rounds: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Plain and compressed prefill in turn: median seconds by part, and shares of the total."""
    model = build(dtype, layers)
    pixels = torch.randn(1, 3, 336, 336, dtype=dtype)
    runs: dict[str, list[Clock]] = {"plain": [], "zipped": []}
    for turn in track(range(rounds + 1), "rounds", console=Console(stderr=True), transient=True):
        plain = prefill(model, 576, pixels)
        with compress(model, None, VisionZip(tokens=tokens)):
            zipped = prefill(model, tokens, pixels)
        if turn:
            runs["plain"].append(plain)
            runs["zipped"].append(zipped)
    return {name: shares(clocks, layers) for name, clocks in runs.items()}


def shares(clocks: list[Clock], layers: int) -> dict[str, dict[str, float]]:
    """Median seconds by part; the share of the total, and with all of the real layers."""
    names = [name for name in clocks[0] if name != "total"]
    seconds = {name: statistics.median(clock[name] for clock in clocks) for name in names}
    real = dict(seconds)
    real["language model"] *= REAL_LAYERS / layers
    return {
        name: {
            "seconds": seconds[name],
            "share": seconds[name] / sum(seconds.values()),
            "share_32_layers": real[name] / sum(real.values()),
        }
        for name in names
    }


def main(
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "float32",
    layers: Annotated[int, typer.Option(min=1, help="Language model layers, of the real 32.")] = 2,
    tokens: Annotated[int, typer.Option(min=1, max=577, help="Tokens the image keeps.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count, after one warm-up.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="torch threads.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Time the parts of a LLaVA-1.5-7B-shaped prefill, plain and compressed."""
    torch.set_num_threads(threads)
    results = measure(getattr(torch, dtype), layers, tokens, rounds)
    if as_json:
        print(json.dumps({"dtype": dtype, "layers": layers, "tokens": tokens, "rows": results}))
        return
    title = f"prefill, LLaVA-1.5-7B shapes, {layers} of {REAL_LAYERS} layers, {dtype}, {threads} threads"
    table = Table("prefill", "part", "ms", "share", "computed share, 32 layers", title=title)
    for run, parts in results.items():
        for name, row in parts.items():
            ms, share, real = row["seconds"] * 1e3, row["share"], row["share_32_layers"]
            table.add_row(run, name, f"{ms:.1f}", f"{share:.1%}", f"{real:.1%}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
