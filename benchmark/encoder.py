"""What compression costs inside the vision encoder: CLIP-L/14-336, random weights.

Compares, interleaved in one process, a LLaVA-1.5-shaped encoder with a small projector:
  plain     all layers by SDPA, no compression
  zipped    the same with VisionZip attached: one attention row, last layer not run, K tokens
  original  eager attention in every layer and all attention matrices kept, as the released code
            does to get its scores; the selection itself is not counted

    python benchmark/encoder.py --dtype bfloat16 --batch 1 --rounds 10 --threads 2
"""

import json
import statistics
import time
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from vlmzip import VisionZip, compress

Sample = dict[str, float]


def build(dtype: torch.dtype) -> LlavaForConditionalGeneration:
    """CLIP-L/14-336 with a language model too small to matter."""
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
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, vocab_size=64
    )
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=3)
    return LlavaForConditionalGeneration(config).to(dtype).eval()


@torch.inference_mode()
def encode(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> None:
    """Tower and projector; compressed in between if the model is."""
    model.get_image_features(pixels)


@torch.inference_mode()
def encode_with_attentions(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> None:
    """The tower as the released code runs it."""
    model.model.vision_tower(pixels, output_attentions=True, output_hidden_states=True)


def measure(dtype: torch.dtype, batch: int, tokens: int, rounds: int) -> dict[str, Sample]:
    """Run the three in turn, ``rounds`` times after a warm-up, and compare within each round."""
    stock, small = build(dtype), build(dtype)
    compress(small, None, VisionZip(tokens=tokens))
    eager = build(dtype)
    eager.set_attn_implementation("eager")
    pixels = torch.randn(batch, 3, 336, 336, dtype=dtype)
    runs = {
        "plain": (encode, stock),
        "zipped": (encode, small),
        "original": (encode_with_attentions, eager),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for turn in track(range(rounds + 1), "rounds", console=Console(stderr=True), transient=True):
        for name, (run, model) in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run(model, pixels)
            if turn:
                seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {name: summary(samples, seconds["plain"]) for name, samples in seconds.items()}


def summary(samples: list[tuple[float, float]], base: list[tuple[float, float]]) -> Sample:
    """Medians of wall and CPU time, and the median ratio to the plain run of the same round."""
    return {
        "wall_s": statistics.median(wall for wall, _ in samples),
        "cpu_s": statistics.median(cpu for _, cpu in samples),
        "wall_ratio": statistics.median(s[0] / b[0] for s, b in zip(samples, base, strict=True)),
        "cpu_ratio": statistics.median(s[1] / b[1] for s, b in zip(samples, base, strict=True)),
    }


def main(
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    batch: Annotated[int, typer.Option(min=1, help="Images a forward.")] = 1,
    tokens: Annotated[int, typer.Option(min=1, max=577, help="Tokens an image keeps.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count, after one that warms up.")] = 10,
    threads: Annotated[int, typer.Option(min=1, help="torch threads.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Time the CLIP-L/14-336 encoder plain, with VisionZip, and as the released code runs it."""
    torch.set_num_threads(threads)
    results = measure(getattr(torch, dtype), batch, tokens, rounds)
    if as_json:
        print(json.dumps({"dtype": dtype, "batch": batch, "tokens": tokens, "rows": results}))
        return
    table = Table(title=f"CLIP-L/14-336, {dtype}, batch {batch}, {tokens} tokens, {threads} threads")
    for column in ("encoder", "wall s", "CPU s", "wall / plain", "CPU / plain"):
        table.add_column(column, justify="left" if column == "encoder" else "right")
    for name, row in results.items():
        table.add_row(
            name,
            f"{row['wall_s']:.3f}",
            f"{row['cpu_s']:.3f}",
            f"{row['wall_ratio']:.3f}",
            f"{row['cpu_ratio']:.3f}",
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
