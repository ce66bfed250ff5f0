"""Qwen2.5-VL on two ranks that share each image's heads, or the images; only on request."""

from pathlib import Path
from typing import Any

import pytest
from side_by_side import Reference, engine, picture, write_checkpoint
from test_vllm_qwen2_5_vl import Ask

from vlmzip import VisionZip
from vlmzip.tiny.random import build

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]
METHOD = VisionZip(tokens=12, max_visual_tokens=40)
ASKS = [
    Ask("what is it?", [picture(1, 224, 168)]),
    Ask("which one?", [picture(2, 560, 84), picture(3, 84, 560), picture(4, 40, 40)], visual_tokens=33),
    Ask("no image here, just text."),
]


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen")
    write_checkpoint(*build("qwen2_5_vl"), folder)
    return folder


@pytest.mark.parametrize("mode", ["weights", "data"])
def test_two_ranks_answer_as_one(stock: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    reference = Reference(stock, METHOD)
    options: dict[str, Any] = {
        "hf_overrides": {"vlmzip": METHOD.settings()},
        "tensor_parallel_size": 2,
        "distributed_executor_backend": "mp",
        "mm_encoder_tp_mode": mode,
    }
    with engine(model=str(stock), **options) as running:
        answers = running.answers(ASKS)
    for ask, answer in zip(ASKS, answers, strict=True):
        expected = reference.answer(ask)
        assert answer.agrees(expected), f"{ask.text}: {answer} instead of {expected}"


def test_bfloat16(stock: Path) -> None:
    settings = {"vlmzip": METHOD.settings()}
    reference = Reference(stock, METHOD)
    with engine(model=str(stock), hf_overrides=settings, dtype="bfloat16") as running:
        answers = running.answers(ASKS)
    for ask, answer in zip(ASKS, answers, strict=True):
        assert answer.prompt == reference.answer(ask).prompt
        assert answer.logprob < 0
