"""A soak of a compressed server over HTTP: good and malformed requests at once, answers compared.

    python tests/vllm/soak.py --requests 1000

Every good request must be answered as when sent alone, every malformed one refused with a 4xx and a
reason; the server must live, and its memory be flat, at the end.
"""

import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from requests_of_all_kinds import (
    MOST_IMAGES,
    MOST_PROMPT,
    MOST_VISUAL_TOKENS,
    Request,
    bad_requests,
    good_request,
    odd_requests,
)

from vlmzip.benchmark.serve_process import Server

NAME = "tiny-llava"  # what the server calls its model
MALFORMED = 0.2
DISTINCT = 0.25  # of the good requests; the others repeat them, for caches to be hit
# Growth of the server's memory in the second half; measured ten times, and once more at the end.
FLAT_MB = 64.0
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
OPTIONS = [
    *("--tokens", "16", "--request-budgets", "--max-visual-tokens", str(MOST_VISUAL_TOKENS)),
    *("--served-model-name", NAME, "--dtype", "float32", "--enforce-eager"),
    *("--max-model-len", str(MOST_PROMPT), "--max-num-seqs", "16"),
    *("--limit-mm-per-prompt", json.dumps({"image": MOST_IMAGES})),
    # Small, so that it is full, and thrown out of, long before the end.
    *("--mm-processor-cache-gb", "0.01", "--enable-prompt-tokens-details"),
]


@dataclass
class Report:
    """What became of the requests; ``faults`` is empty if all went as it must."""

    answered: int = 0
    refused: int = 0
    faults: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    memory_mb: list[float] = field(default_factory=list)


def command(model: str) -> list[str]:
    """The words that start the server."""
    return [str(Path(sys.executable).with_name("vlmzip")), "serve", model, *OPTIONS]


def mixture(count: int, seed: int) -> list[Request]:
    """``count`` requests in a mixed order, a fifth of them malformed."""
    draw = random.Random(seed)
    wrong = round(count * MALFORMED)
    bad = [request for turn in range(1 + wrong // 20) for request in bad_requests(seed + turn)]
    draw.shuffle(bad)
    right = count - wrong
    distinct = [good_request(seed + i) for i in range(max(1, round(right * DISTINCT)))]
    distinct += odd_requests(seed)
    chosen = distinct + draw.choices(distinct, k=max(0, right - len(distinct)))
    requests = chosen[:right] + bad[:wrong]
    draw.shuffle(requests)
    return requests


async def soak(server: Server, requests: list[Request], concurrency: int) -> Report:
    """Send them, ``concurrency`` at a time, then each distinct good one alone; compare."""
    import aiohttp

    report = Report(kinds=Counter(request.kind for request in requests))
    start = time.monotonic()
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        alone: dict[str, Any] = {}
        distinct = {_key(request): request for request in requests if request.good}
        # Half are asked alone before caches can hold them, half after.
        early = [key for i, key in enumerate(distinct) if i % 2 == 0]
        for key in early:
            alone[key] = await _send(session, server, distinct[key])
        answers: list[Any] = [None] * len(requests)
        pending = list(enumerate(requests))[::-1]
        moments = {tenth * len(requests) // 10 for tenth in range(10)}

        async def work() -> None:
            while pending:
                i, request = pending.pop()
                answers[i] = await _send(session, server, request)
                if len(pending) in moments:
                    moments.remove(len(pending))
                    report.memory_mb.append(memory(server))

        await asyncio.gather(*(work() for _ in range(concurrency)))
        for key in distinct.keys() - alone.keys():
            alone[key] = await _send(session, server, distinct[key])
        report.memory_mb.append(memory(server))
    report.seconds = time.monotonic() - start
    for request, answer in zip(requests, answers, strict=True):
        _judge(report, request, answer, alone.get(_key(request)))
    _judge_server(report, server)
    return report


def _key(request: Request) -> str:
    return json.dumps(request.body) if isinstance(request.body, dict) else repr(request.body)


async def _send(session: Any, server: Server, request: Request) -> tuple[int, Any]:
    """(status, the answer's JSON or its text)."""
    body = request.body
    data = body if isinstance(body, bytes) else json.dumps({"model": NAME, **body}).encode()
    async with session.post(
        f"{server.url}/v1/chat/completions",
        data=data,
        headers={"Content-Type": "application/json"},
    ) as response:
        text = await response.text()
        try:
            return response.status, json.loads(text)
        except ValueError:
            return response.status, text


def _judge(report: Report, request: Request, answer: Any, alone: Any) -> None:
    status, content = answer
    if not request.good:
        report.refused += 1
        reason = content.get("error", {}).get("message") if isinstance(content, dict) else None
        if not 400 <= status < 500 or not reason:
            report.faults.append(f"{request.kind}: answered {status}: {str(content)[:200]}")
        return
    report.answered += 1
    if status != 200 or alone[0] != 200:
        report.faults.append(f"{request.kind}: {status}: {str(content)[:200]}; alone {alone[0]}")
    elif essence(content) != essence(alone[1]):
        report.faults.append(f"{request.kind}: {essence(content)}; alone {essence(alone[1])}")


def essence(content: Any) -> tuple[list[int], int]:
    """The answer's tokens, and how many tokens its prompt had."""
    return content["choices"][0]["token_ids"], content["usage"]["prompt_tokens"]


def _judge_server(report: Report, server: Server) -> None:
    if server.process.poll() is not None:
        report.faults.append(f"the server ended with {server.process.returncode}")
    half, end = report.memory_mb[len(report.memory_mb) // 2], report.memory_mb[-1]
    if end - half > FLAT_MB:
        report.faults.append(f"memory grew from {half:.0f} to {end:.0f} MB in the second half")


def memory(server: Server) -> float:
    """Megabytes that the server's processes hold for themselves."""
    main = psutil.Process(server.process.pid)
    whole = [main, *main.children(recursive=True)]
    return sum(process.memory_full_info().uss for process in whole) / 2**20


def find_model(scratch: Path) -> str:
    """The embedded model; without it a random one, written to ``scratch``."""
    from vlmzip.tiny import tiny_path

    if (tiny_path("tiny-llava") / "config.json").is_file():
        return str(tiny_path("tiny-llava"))
    from side_by_side import write_checkpoint

    from vlmzip.tiny.random.llava import build

    write_checkpoint(*build(112), scratch / "random")
    return str(scratch / "random")


def main(
    requests: Annotated[int, typer.Option(help="Requests in all.")] = 1000,
    concurrency: Annotated[int, typer.Option(help="Requests under way at a time.")] = 16,
    seed: Annotated[int, typer.Option(help="The requests follow from it.")] = 0,
) -> None:
    """Start a server, soak it, print what became of it; exit with 1 if anything went wrong."""
    with tempfile.TemporaryDirectory() as scratch:
        model = find_model(Path(scratch))
        with Server(command(model), Path(scratch) / "server.log", ENVIRONMENT) as server:
            report = asyncio.run(soak(server, mixture(requests, seed), concurrency))
    typer.echo(
        f"{report.answered} good requests and {report.refused} malformed ones of "
        f"{len(report.kinds)} kinds in {report.seconds:.0f} s, {concurrency} at a time; memory "
        f"{' -> '.join(f'{size:.0f}' for size in report.memory_mb)} MB; {len(report.faults)} faults"
    )
    for fault in report.faults:
        typer.echo(fault)
    raise typer.Exit(1 if report.faults else 0)


if __name__ == "__main__":
    typer.run(main)
