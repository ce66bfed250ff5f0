"""What compression saves on a model of a published shape: tokens, time and memory of one prompt.

Weights are random and the language model has few layers, so only counts and ratios mean anything.
Uncompressed and compressed runs alternate in one process; times are the process's CPU time, medians
over the rounds, ratios medians of each round's own ratio.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.initialization import no_init_weights

from vlmzip import compress
from vlmzip.methods import Method

TEXT = 40  # text tokens round the image or video
Row = dict[str, float]


def arguments(about: str) -> argparse.Namespace:
    """--rounds, --threads, --layers and --dtype."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=1, help="layers of the language model")
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=("bfloat16", "float32"),
        help="CPUs without bf16 instructions are many times slower in bfloat16",
    )
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    return given


def random_model(cls: type, config: Any, dtype: str = "bfloat16") -> Any:
    """A model of that config; the same weights every time, quickly: one random block repeated."""
    block = 0.02 * torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with no_init_weights():
            model = cls(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    for name, weights in model.named_parameters():
        size = weights.numel()
        weights.data.copy_(block.repeat(-(-size // len(block)))[:size].view_as(weights))
        if weights.ndim == 1 and "norm" in name and name.endswith("weight"):
            weights.data += 1
    return model


def compare(
    name: str,
    model: Any,
    methods: Mapping[str, Method],
    encode: Callable[[], Any],
    kind: str,
    rounds: int,
    beside: Callable[[torch.Tensor], dict[str, Any]] | None = None,
) -> None:
    """Print a table: a row uncompressed, and one for each method.

    Args:
        name: The table's title.
        model: An uncompressed model.
        methods: By row name.
        encode: Calls ``get_image_features`` or ``get_video_features``.
        kind: "image" or "video".
        rounds: Rounds; if there are several, the first one warms up and does not count.
        beside: Makes what the model needs beside the prompt's ids [1, T], such as token types.
    """
    runs: dict[str, list[Row]] = {"none": [], **{row: [] for row in methods}}
    for _ in range(rounds):
        runs["none"].append(once(model, encode, kind, beside))
        progress("none", runs["none"][-1])
        for row, method in methods.items():
            with compress(model, None, method):
                runs[row].append(once(model, encode, kind, beside))
            progress(row, runs[row][-1])
    first = min(1, rounds - 1)
    print(f"{name}, rounds that count: {rounds - first}")
    print(f"{'':18}{'tokens':>8}{'encode ms':>11}{'prefill ms':>12}", end="")
    print(f"{'encode x':>10}{'prefill x':>11}{'both x':>8}{'cache MB':>10}{'peak MB':>9}")
    for row, found in runs.items():
        stock, found = runs["none"][first:], found[first:]
        print(f"{row:18}{found[0]['tokens']:8.0f}", end="")
        print(f"{middle(found, 'encode'):11.0f}{middle(found, 'prefill'):12.0f}", end="")
        for column, width in (("encode", 10), ("prefill", 11), ("both", 8)):
            paired = [a[column] / b[column] for a, b in zip(stock, found, strict=True)]
            print(f"{statistics.median(paired):{width}.2f}", end="")
        print(f"{found[0]['cache']:10.1f}{middle(found, 'peak'):9.0f}")


def progress(row: str, found: Row) -> None:
    """Say on stderr what a run took: on a CPU it takes long."""
    print(row, {column: round(value) for column, value in found.items()}, file=sys.stderr, flush=True)


def middle(found: list[Row], column: str) -> float:
    """Median of a column."""
    return statistics.median(row[column] for row in found)


@torch.no_grad()
def once(
    model: Any,
    encode: Callable[[], Any],
    kind: str,
    beside: Callable[[torch.Tensor], dict[str, Any]] | None = None,
) -> Row:
    """One image or video encoded, and a prompt of it prefilled. CPU time in ms, memory in MB."""
    held = reset_peak()
    start = time.process_time()
    features = encode()
    middle_time = time.process_time()
    tokens = sum(one.shape[:-1].numel() for one in features.pooler_output)
    token = getattr(model.config, f"{kind}_token_id")
    ids = torch.tensor([[1] * 8 + [token] * tokens + [1] * (TEXT - 8)])
    given = {"input_ids": ids, "mm_encoder_outputs": {kind: features}, **(beside(ids) if beside else {})}
    out = model(**given, use_cache=True, logits_to_keep=1)
    end = time.process_time()
    cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in out.past_key_values.layers)
    return {
        "tokens": tokens,
        "encode": 1e3 * (middle_time - start),
        "prefill": 1e3 * (end - middle_time),
        "both": 1e3 * (end - start),
        "cache": cache / 1e6,
        "peak": read_peak() - held,
    }


def reset_peak() -> float:
    """Set the process's peak of resident memory to what it holds now, MB (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return read_peak()


def read_peak() -> float:
    """The peak since then, MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    return float("nan")
