"""LLaVA on a SigLIP tower: the short override, images split by chunked prefill, preempted requests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from side_by_side import Ask, Engine, Reference, engine, picture, write_checkpoint

from vlmzip import VisionZip
from vlmzip.tiny.random.llava import build

METHOD = VisionZip(keep=0.5, order="raster", max_visual_tokens=50)
LARGE, WIDE, TALL = picture(1, 400, 300), picture(2, 500, 120), picture(3, 90, 250)


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("siglip")
    write_checkpoint(*build(112, "siglip"), folder)
    return folder


@pytest.fixture(scope="module")
def reference(stock: Path) -> Reference:
    return Reference(stock, METHOD)


@pytest.fixture(scope="module")
def served(stock: Path) -> Iterator[Engine]:
    with engine(
        model=str(stock),
        hf_overrides={"vlmzip": METHOD.settings()},
        max_num_batched_tokens=24,
        max_num_seqs=6,
        max_model_len=320,
        num_gpu_blocks_override=14,
        disable_log_stats=False,
    ) as running:
        yield running


def test_images_split_between_chunks(served: Engine, reference: Reference) -> None:
    asks = [
        Ask("what is it?", [LARGE]),
        Ask("no image here, just text."),
        Ask("which one is wider?", [WIDE, TALL]),
        Ask("and this?", [TALL], visual_tokens=50),
        Ask("and this?", [TALL], visual_tokens=3),
    ]
    for ask, answer in zip(asks, served.answers(asks), strict=True):
        expected = reference.answer(ask)
        assert answer.agrees(expected), f"{ask.text}: {answer} instead of {expected}"
    assert len(reference.processor.tokenizer(asks[0].prompt).input_ids) + 31 > 2 * 24


def test_preempted_requests(served: Engine, reference: Reference) -> None:
    served.forget()
    asks = [Ask(f"what is it, {'really ' * i}?", [picture(20 + i)]) for i in range(6)]
    long = served.answers(asks, new_tokens=70)
    preempted = sum(m.value for m in served.llm.get_metrics() if m.name == "vllm:num_preemptions")
    assert preempted > 0
    served.forget()
    for ask, answer in zip(asks, long, strict=True):
        assert served.answers([ask], new_tokens=70)[0].agrees(answer)
        expected = reference.answer(ask)
        assert answer.tokens[: len(expected.tokens)] == expected.tokens


def test_a_budget_over_the_maximum_is_refused(served: Engine) -> None:
    with pytest.raises(ValueError, match="at most 50, got 51"):
        served.answers([Ask("what is it?", [LARGE], visual_tokens=51)])
