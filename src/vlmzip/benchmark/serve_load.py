"""The load on a server: seeded requests, a client that times them, closed and open loops.

vLLM's own ``vllm bench serve`` has no conversations, and a second turn on the same image is what a
prefix cache is for; so this client is ours. Nothing here knows whether the server compresses.
"""

import asyncio
import base64
import io
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

# Widths and heights of the images, taken in turn.
SIZES = ((640, 480), (480, 640), (336, 336), (1024, 768))
MODEL = "bench"  # the name both servers go by
PATIENCE = 1800.0  # seconds that one request may take


@dataclass(frozen=True)
class Load:
    """What both servers are asked to do.

    Attributes:
        alone: Requests with an image, one after the other.
        conversations: Conversations of the closed loop: an image and a question, then a question more.
        concurrency: Conversations that are open at a time.
        arrivals: Requests of the open loop, each with an image of its own.
        rate: Arrivals a second, Poisson; None: 0.7 of what the stock server did in the closed loop.
        new_tokens: Tokens of an answer.
        seed: Images, questions and arrivals follow from it.
    """

    alone: int = 3
    conversations: int = 8
    concurrency: int = 4
    arrivals: int = 8
    rate: float | None = None
    new_tokens: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("alone", "conversations", "concurrency", "arrivals", "new_tokens"):
            least = 2 if name == "new_tokens" else 1
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.rate is not None and not self.rate > 0:
            raise ValueError(f"rate must be above 0 requests a second, got {self.rate}")


@dataclass(frozen=True)
class Sample:
    """One answer, as the client saw it; times in seconds."""

    first: float
    total: float
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    text: str

    @property
    def per_token(self) -> float:
        """Seconds from one output token to the next."""
        return (self.total - self.first) / max(1, self.new_tokens - 1)


class Client:
    """Streams answers from one server; an async context manager."""

    def __init__(self, url: str, load: Load) -> None:
        self.url = url
        self.load = load

    async def __aenter__(self) -> "Client":
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=PATIENCE)
        self._session = aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0))
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._session.close()

    async def chat(self, messages: Sequence[Any]) -> Sample:
        """One turn of a conversation.

        Raises:
            RuntimeError: The server refused or failed.
        """
        return await self._stream("/v1/chat/completions", {"messages": list(messages)})

    async def complete(self, tokens: Sequence[int]) -> Sample:
        """Go on after a prompt of just these token ids."""
        return await self._stream("/v1/completions", {"prompt": list(tokens)})

    async def metrics(self) -> str:
        """The server's counters, in Prometheus' text form."""
        async with self._session.get(f"{self.url}/metrics") as response:
            text: str = await response.text()
            return text

    async def _stream(self, path: str, what: dict[str, Any]) -> Sample:
        body = what | {
            "model": MODEL,
            "max_tokens": self.load.new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        first, usage, text = None, None, ""
        start = time.perf_counter()
        async with self._session.post(self.url + path, json=body) as response:
            if response.status != 200:
                raise RuntimeError(f"{path} answered {response.status}: {await response.text()}")
            async for line in response.content:
                data = line.removeprefix(b"data:").strip()
                if data == line.strip() or data == b"[DONE]":
                    continue
                chunk = json.loads(data)
                if "error" in chunk:
                    raise RuntimeError(f"{path} failed on its way: {chunk['error']}")
                first = first or time.perf_counter()
                usage = chunk.get("usage") or usage
                for choice in chunk.get("choices", ()):
                    text += choice.get("text") or choice.get("delta", {}).get("content") or ""
        end = time.perf_counter()
        if first is None or usage is None:
            raise RuntimeError(f"{path} ended without an answer or without usage")
        details = usage.get("prompt_tokens_details") or {}
        return Sample(
            first - start,
            end - start,
            usage["prompt_tokens"],
            details.get("cached_tokens") or 0,
            usage["completion_tokens"],
            text,
        )


def question(rng: np.random.Generator) -> str:
    """Forty letters and spaces."""
    return "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz    "), 40))


def picture(rng: np.random.Generator, size: tuple[int, int]) -> str:
    """An image that nobody has cached: smooth noise, as the data URL of a JPEG."""
    width, height = size
    noise = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def opening(load: Load, *place: int) -> list[Any]:
    """The first message of a conversation; ``place`` numbers it, so that no two are alike."""
    rng = np.random.default_rng([load.seed, *place])
    image = {"type": "image_url", "image_url": {"url": picture(rng, SIZES[place[-1] % len(SIZES)])}}
    return [{"role": "user", "content": [image, {"type": "text", "text": question(rng)}]}]


async def run_alone(client: Client, load: Load, round_: int) -> list[Sample]:
    """Requests with an image, one after the other."""
    return [await client.chat(opening(load, 1, round_, i)) for i in range(load.alone)]


async def run_text(client: Client, load: Load, round_: int, length: int) -> list[Sample]:
    """Prompts of ``length`` text tokens, one after the other."""
    rng = np.random.default_rng([load.seed, 2, round_, length])
    prompts = rng.integers(10, 200, (load.alone, length)).tolist()
    return [await client.complete(prompt) for prompt in prompts]


async def run_closed(client: Client, load: Load, round_: int) -> tuple[list[Sample], list[Sample], float]:
    """Conversations, ``concurrency`` of them at a time: first turns, second turns, and the seconds."""
    pending = list(range(load.conversations))[::-1]
    firsts, seconds = [], []

    async def converse() -> None:
        while pending:
            i = pending.pop()
            messages = opening(load, 3, round_, i)
            firsts.append(await client.chat(messages))
            more = question(np.random.default_rng([load.seed, 4, round_, i]))
            messages.append({"role": "assistant", "content": firsts[-1].text})
            messages.append({"role": "user", "content": [{"type": "text", "text": more}]})
            seconds.append(await client.chat(messages))

    start = time.perf_counter()
    await asyncio.gather(*(converse() for _ in range(load.concurrency)))
    return firsts, seconds, time.perf_counter() - start


async def run_open(client: Client, load: Load, round_: int, rate: float) -> list[Sample]:
    """Requests that arrive by a Poisson process, whether or not earlier ones are answered."""
    rng = np.random.default_rng([load.seed, 5, round_])
    times = np.cumsum(rng.exponential(1 / rate, load.arrivals))
    bodies = [opening(load, 6, round_, i) for i in range(load.arrivals)]

    async def arrive(at: float, messages: list[Any]) -> Sample:
        await asyncio.sleep(at)
        return await client.chat(messages)

    return await asyncio.gather(*(arrive(float(t), b) for t, b in zip(times, bodies, strict=True)))


async def watch_blocks(client: Client, run: Callable[[], Awaitable[Any]]) -> tuple[Any, int]:
    """What ``run`` returns, and the most KV-cache blocks that were seen in use meanwhile."""
    most = 0

    async def look() -> None:
        nonlocal most
        while True:
            most = max(most, used_blocks(await client.metrics()))
            await asyncio.sleep(0.1)

    watcher = asyncio.create_task(look())
    try:
        result = await run()
    finally:
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)
    return result, most


def used_blocks(metrics: str) -> int:
    """KV-cache blocks in use, from vLLM's metrics: a share, and the number of all blocks.

    Raises:
        RuntimeError: The metrics do not say.
    """
    from prometheus_client.parser import text_string_to_metric_families

    share, blocks = None, None
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if sample.name == "vllm:kv_cache_usage_perc":
                share = float(sample.value)
            elif sample.name == "vllm:cache_config_info":
                blocks = int(sample.labels["num_gpu_blocks"])
    if share is None or blocks is None:
        raise RuntimeError("this vLLM's /metrics do not tell how much of the KV cache is in use")
    return round(share * blocks)
