"""Stock server and compressed server under the same load: what it costs each, and the ratios."""

import asyncio
import contextlib
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

from vlmzip.benchmark.serve_load import (
    MODEL,
    Client,
    Load,
    Sample,
    run_alone,
    run_closed,
    run_open,
    run_text,
    watch_blocks,
)
from vlmzip.benchmark.serve_process import Server
from vlmzip.vllm.command import QUIET, program, serve_command
from vlmzip.vllm.engine import Plan, default_arguments

Say = Callable[[str], None]
SIDES = ("stock", "compressed")
# Both servers; the client reads from usage how much of a prompt the prefix cache held.
_COMMON = ["--served-model-name", MODEL, "--enable-prompt-tokens-details"]
_WARM_UP = 99  # a round that is not measured


@dataclass
class Seen:
    """All that was measured of one server."""

    alone: list[Sample] = field(default_factory=list)
    first_turns: list[Sample] = field(default_factory=list)
    second_turns: list[Sample] = field(default_factory=list)
    arrivals: list[Sample] = field(default_factory=list)
    closed_seconds: float = 0.0
    blocks: int = 0
    text: dict[str, list[Sample]] = field(default_factory=lambda: {side: [] for side in SIDES})


def compare(
    plan: Plan,
    options: Sequence[str],
    load: Load,
    *,
    rounds: int,
    together: bool,
    folder: Path,
    say: Say,
) -> dict[str, Any]:
    """Start both servers, drive both, and report; see docs/serving.md for what is measured.

    Args:
        plan: What the compressed server serves.
        options: Options of ``vllm serve`` for both.
        load: What both are asked to do.
        rounds: How often; stock and compressed take turns.
        together: Keep both servers up and let them take turns, instead of starting one at a time.
        folder: Where the servers' logs go.
        say: Told what is going on.

    Raises:
        RuntimeError: A server did not start, or a request failed.
    """
    servers = dict(zip(SIDES, _servers(plan, options, folder), strict=True))
    seen = {side: Seen() for side in SIDES}
    rate = load.rate
    with contextlib.ExitStack() as up:
        if together:
            for side in SIDES:
                say(f"starting the {side} server")
                up.enter_context(servers[side])
        for round_ in range(rounds):
            for side in SIDES:
                with contextlib.nullcontext() if together else servers[side]:
                    say(f"round {round_ + 1} of {rounds}: {side}")
                    run = _drive(servers[side].url, load, round_, rate, seen, side)
                    rate = asyncio.run(run)
    assert rate is not None
    return _report(seen, load, rate) | {
        "rounds": rounds,
        "together": together,
        "commands": {side: servers[side].command for side in SIDES},
        "machine": {"python": platform.python_version(), "platform": platform.platform()},
    }


def _servers(plan: Plan, options: Sequence[str], folder: Path) -> tuple[Server, Server]:
    """(stock, compressed). Stock runs without the plugin, on the same block size."""
    compressed = serve_command(plan, [*_COMMON, *options])
    stock = [program(), "serve", plan.model, *_COMMON, *options]
    given = {word[2:].partition("=")[0].replace("-", "_") for word in options if word.startswith("--")}
    for name, value in default_arguments(dict.fromkeys(given)).items():
        stock += [f"--{name.replace('_', '-')}", str(value)]
    return (
        Server(stock, folder / "stock.log", {**QUIET, "VLLM_PLUGINS": "none"}),
        Server(compressed, folder / "compressed.log", QUIET),
    )


async def _drive(
    url: str, load: Load, round_: int, rate: float | None, seen: dict[str, Seen], side: str
) -> float:
    """One round on one server; returns the rate of the open loop."""
    mine = seen[side]
    async with Client(url, load) as client:
        await run_alone(client, Load(alone=1, new_tokens=2, seed=load.seed), _WARM_UP)
        await run_text(client, Load(alone=1, new_tokens=2, seed=load.seed), _WARM_UP, 64)
        mine.alone += await run_alone(client, load, round_)

        async def closed() -> Any:
            return await run_closed(client, load, round_)

        (firsts, seconds, duration), blocks = await watch_blocks(client, closed)
        mine.first_turns += firsts
        mine.second_turns += seconds
        mine.closed_seconds += duration
        mine.blocks = max(mine.blocks, blocks)
        rate = rate or 0.7 * (len(firsts) + len(seconds)) / duration
        mine.arrivals += await run_open(client, load, round_, rate)
        if side == "compressed":  # text is untouched there, so it is the stock server's time as well
            for other in SIDES:
                length = round(median(s.prompt_tokens for s in seen[other].alone))
                mine.text[other] += await run_text(client, load, round_, length)
    return rate


def _report(seen: dict[str, Seen], load: Load, rate: float) -> dict[str, Any]:
    stock, compressed = (_figures(seen[side]) for side in SIDES)
    return {
        "load": asdict(load) | {"rate": round(rate, 4)},
        "stock": stock,
        "compressed": compressed,
        "ratios": {
            name: _ratio(name, stock[name], compressed[name])
            for name in stock
            if name != "turn_2_cached_share"
        },
        "ideal": _ideal(seen),
    }


def _figures(seen: Seen) -> dict[str, float]:
    """Medians in milliseconds, but for what is named otherwise."""
    answered = len(seen.first_turns) + len(seen.second_turns)
    closed = seen.first_turns + seen.second_turns
    figures = {
        "prompt_tokens": fmean(s.prompt_tokens for s in seen.alone),
        "ttft_alone_ms": 1000 * median(s.first for s in seen.alone),
        "ttft_turn_1_ms": 1000 * median(s.first for s in seen.first_turns),
        "ttft_turn_1_p90_ms": 1000 * _p90([s.first for s in seen.first_turns]),
        "ttft_turn_2_ms": 1000 * median(s.first for s in seen.second_turns),
        "time_per_output_token_ms": 1000 * median(s.per_token for s in closed),
        "requests_per_second": answered / seen.closed_seconds,
        "ttft_open_ms": 1000 * median(s.first for s in seen.arrivals),
        "ttft_open_p90_ms": 1000 * _p90([s.first for s in seen.arrivals]),
        "kv_blocks_in_use": seen.blocks,
        "turn_2_cached_share": sum(s.cached_tokens for s in seen.second_turns)
        / sum(s.prompt_tokens for s in seen.second_turns),
    }
    return {name: round(value, 4) for name, value in figures.items()}


def _p90(values: list[float]) -> float:
    return quantiles(values, n=10, method="inclusive")[-1] if len(values) > 1 else values[0]


def _ratio(name: str, stock: float, compressed: float) -> float | None:
    """How many times better the compressed server is; None where it needed nothing."""
    above, below = (compressed, stock) if name == "requests_per_second" else (stock, compressed)
    return round(above / below, 3) if below else None


def _ideal(seen: dict[str, Seen]) -> dict[str, float]:
    """What the first token could gain at most: all but the language model's share stays as it is.

    A prompt of as many text tokens takes the language model as long as one with an image, without
    the image's way through preprocessing and vision tower; the difference is the image's part, or
    none where it drowns in the noise.
    """
    alone = {side: median(s.first for s in seen[side].alone) for side in SIDES}
    text = {side: median(s.first for s in seen["compressed"].text[side]) for side in SIDES}
    image = max(0.0, alone["stock"] - text["stock"])
    ideal = alone["stock"] / (image + text["compressed"])
    measured = alone["stock"] / alone["compressed"]
    values = {
        "text_as_long_as_stock_ms": 1000 * text["stock"],
        "text_as_long_as_compressed_ms": 1000 * text["compressed"],
        "image_share_of_stock": image / alone["stock"],
        "ideal_ttft_ratio": ideal,
        "measured_ttft_ratio": measured,
        "share_of_ideal": measured / ideal,
    }
    return {name: round(value, 4) for name, value in values.items()}
