"""`vlmzip serve` over HTTP: one server, asked much; and servers that must not start."""

import asyncio
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests_of_all_kinds as kinds
import soak
from requests_of_all_kinds import chat, encoded, part, picture, text_part

from markdown_pages import HUB_NAME, ROOT, blocks, commands
from vlmzip import VisionZip, compress
from vlmzip.benchmark.serve_load import used_blocks
from vlmzip.benchmark.serve_process import Server
from vlmzip.loading import load
from vlmzip.vllm import engine_args

pytestmark = pytest.mark.timeout(1200)

PROGRAMS = Path(sys.executable).parent
TOKENS = 16
PROMPT = "USER: <image>\nwhat is it? ASSISTANT:"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return soak.find_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    with Server(soak.command(model), log, soak.ENVIRONMENT) as running:
        yield running


def ask(server: Server, body: Any, path: str = "/v1/chat/completions") -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps({"model": soak.NAME} | body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(server.url + path, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


# --- one server -------------------------------------------------------------------------------------


def test_it_says_what_it_does_before_it_starts(server: Server, model: str) -> None:
    log = server.log.read_text()
    assert f"{model} (llava, served as VlmzipLlavaForConditionalGeneration)" in log
    assert f"takes {TOKENS} prompt tokens instead of" in log
    assert "requests may choose 1 to 40 tokens a view" in log
    assert "--trust-request-mm-kwargs" in log


def by_transformers(model: str, image: Any, budget: int, tokens: int) -> tuple[list[int], int]:
    """The greedy answer's tokens, and the prompt's length, without vLLM."""
    loaded, processor = load(model, "float32", "cpu")
    message = {"role": "user", "content": [{"type": "image"}, text_part("what is it?")]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    with compress(loaded, processor, VisionZip(tokens=budget)):
        inputs = processor(images=image, text=text, return_tensors="pt", add_special_tokens=False)
        out = loaded.generate(**inputs, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens)
    length = inputs["input_ids"].shape[1]
    return out[0, length:].tolist(), length


@pytest.mark.parametrize(("seed", "budget"), [(1, None), (2, None), (3, 5), (4, 40)])
def test_answers_are_those_of_transformers(
    server: Server, model: str, seed: int, budget: int | None
) -> None:
    image = picture(seed, (336, 200))
    fields = {} if budget is None else {"mm_processor_kwargs": {"visual_tokens": budget}}
    fields |= {"ignore_eos": False, "min_tokens": 6}
    status, answer = ask(server, chat(part(encoded(image)), text_part("what is it?"), tokens=6, **fields))
    assert status == 200, answer
    assert soak.essence(answer) == by_transformers(model, image, budget or TOKENS, 6)


def test_a_second_turn_on_the_same_image_pays_text_only(server: Server) -> None:
    # Longer than a block of the KV cache, or nothing of it could be found again.
    body = chat(part(encoded(picture(77, (200, 200)))), text_part("what is it, " * 12))
    _, first = ask(server, body)
    body["messages"] += [
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": [text_part("and where?")]},
    ]
    _, second = ask(server, body)
    before = first["usage"]["prompt_tokens"]
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= before - 2 * 32
    assert cached % 32 == 0


@pytest.mark.parametrize("request_", kinds.bad_requests(5), ids=lambda request: request.kind)
def test_malformed_requests_are_refused_with_a_reason(server: Server, request_: kinds.Request) -> None:
    status, answer = ask(server, request_.body)
    assert 400 <= status < 500, answer
    assert answer["error"]["message"]
    if request_.kind.startswith("budget"):
        assert "visual_tokens" in answer["error"]["message"]


@pytest.mark.parametrize("request_", kinds.odd_requests(5), ids=lambda request: request.kind)
def test_odd_requests_are_answered(server: Server, request_: kinds.Request) -> None:
    status, answer = ask(server, request_.body)
    assert status == 200, answer
    assert len(answer["choices"][0]["token_ids"]) == 4


@pytest.fixture
def photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photo.jpg").write_bytes(encoded(picture(1, (640, 480)), "JPEG"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("photo")
def test_the_readmes_client_gets_an_answer(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks(ROOT / "README.md", "python", "vllm")
    assert f'model="{soak.NAME}"' in block
    names: dict[str, Any] = {}
    exec(block.replace("http://localhost:8000", server.url), names)
    answer = names["answer"]
    text = f"{answer.choices[0].message.content} {answer.usage.prompt_tokens}"
    assert capsys.readouterr().out.strip() == text.strip()


@pytest.mark.usefixtures("photo")
def test_the_documented_curl_gets_an_answer(server: Server) -> None:
    (command,) = [line for line in commands(ROOT / "docs" / "serving.md") if "curl" in line]
    command = command.replace("http://localhost:8000", server.url)
    done = subprocess.run(["bash", "-c", command], capture_output=True, check=True)
    answer = json.loads(done.stdout)
    assert answer["usage"]["prompt_tokens"] > TOKENS
    assert answer["choices"]


def test_the_documented_engine_arguments_are_vllms(model: str) -> None:
    from vllm import EngineArgs

    (block,) = blocks(ROOT / "docs" / "serving.md", "python", "vllm")
    names: dict[str, Any] = {}
    exec(block.replace(HUB_NAME, model).replace("tokens=64", "tokens=16"), names)
    assert names["arguments"]["block_size"] == 32
    EngineArgs(**names["arguments"]).create_model_config()


def test_the_metrics_tell_how_much_of_the_cache_is_in_use(server: Server) -> None:
    with urllib.request.urlopen(f"{server.url}/metrics") as answer:
        assert used_blocks(answer.read().decode()) == 0


def test_a_hundred_requests_of_all_kinds(server: Server) -> None:
    report = asyncio.run(soak.soak(server, soak.mixture(100, seed=3), concurrency=16))
    assert report.faults == []
    assert (report.answered, report.refused) == (80, 20)
    status, _ = ask(server, kinds.good_request(8).body)
    assert status == 200


# --- servers that must not start ----------------------------------------------------------------------


def run(words: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | soak.ENVIRONMENT | variables
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)


def test_without_the_plugin_neither_program_starts(model: str) -> None:
    words = [str(PROGRAMS / "vlmzip"), "serve", model, "--tokens", "16", "--dtype", "float32"]
    refused = run(words, VLLM_PLUGINS="none")
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert refused.stderr.startswith("error: VLLM_PLUGINS='none' keeps vLLM from loading the plugin")

    planned = json.loads(run([*words, "--dry-run", "--json"]).stdout)
    assert planned["problem"] is None
    assert planned["command"][0] == str(PROGRAMS / "vllm")
    plain = run(planned["command"], VLLM_PLUGINS="none")
    assert plain.returncode not in (0, None)
    assert "VlmzipLlavaForConditionalGeneration" in plain.stderr + plain.stdout
    assert "are not supported" in plain.stderr + plain.stdout


def test_engine_args_are_strict_and_have_small_blocks_on_a_cpu(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = engine_args(model, VisionZip(tokens=16), max_visual_tokens=30, dtype="float32")
    assert found == {
        "model": model,
        "hf_overrides": {
            "architectures": ["VlmzipLlavaForConditionalGeneration"],
            "vlmzip": {
                "method": "visionzip",
                "tokens": 16,
                "order": "grouped",
                "max_visual_tokens": 30,
            },
        },
        "block_size": 32,
        "dtype": "float32",
    }
    assert engine_args(model, VisionZip(tokens=16), block_size=64)["block_size"] == 64
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    assert engine_args(model, VisionZip(tokens=16))["kv_cache_memory_bytes"] == 4 * 2**30
    shared = engine_args(model, VisionZip(tokens=16), gpu_memory_utilization=0.2)
    assert "kv_cache_memory_bytes" not in shared
    monkeypatch.setenv("VLLM_PLUGINS", "lora,other")
    with pytest.raises(RuntimeError, match="add 'vlmzip' to its list"):
        engine_args(model, VisionZip(tokens=16))
    monkeypatch.setenv("VLLM_PLUGINS", "other,vlmzip")
    assert engine_args(model, VisionZip(tokens=16))["model"] == model
