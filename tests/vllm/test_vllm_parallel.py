"""Tensor parallelism on two processes, and bfloat16; only on request, as each starts an engine."""

from pathlib import Path

import pytest
from side_by_side import Ask, Reference, engine, picture, write_checkpoint

from vlmzip import VisionZip
from vlmzip.tiny.random.llava import build

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]
METHOD = VisionZip(tokens=16, max_visual_tokens=40)
ASKS = [
    Ask("what is it?", [picture(1, 400, 300)]),
    Ask("which one?", [picture(2, 500, 120), picture(3, 90, 250)], visual_tokens=40),
    Ask("no image here, just text."),
]


@pytest.fixture(scope="module", params=["clip", "siglip"])
def stock(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    write_checkpoint(*build(112, request.param), folder)
    return folder


def test_two_ranks_answer_as_one(stock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    reference = Reference(stock, METHOD)
    with engine(
        model=str(stock),
        hf_overrides={"vlmzip": METHOD.settings()},
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
    ) as running:
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
