"""LLaVA-OneVision: a SigLIP tower and up to 36 crops an image."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from side_by_side import TOLERANCE, Ask, Engine, Reference, engine, picture, random_checkpoint

from vlmzip import VisionZip

METHOD = VisionZip(tokens=6, max_visual_tokens=20)
# Views of 98 pixels: a base view and 2 x 3, 1 x 4, 3 x 1 crops.
LARGE, WIDE, TALL = picture(1, 290, 190), picture(2, 390, 90), picture(3, 90, 250)


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint("llava_onevision", tmp_path_factory.mktemp("onevision"))


@pytest.fixture(scope="module")
def reference(stock: Path) -> Reference:
    return Reference(stock, METHOD)


@pytest.fixture(scope="module")
def served(stock: Path) -> Iterator[Engine]:
    overrides = {
        "architectures": ["VlmzipLlavaOnevisionForConditionalGeneration"],
        "vlmzip": METHOD.settings(),
    }
    with engine(model=str(stock), hf_overrides=overrides, max_num_batched_tokens=96) as running:
        yield running


def test_the_reference_tells_orders_budgets_and_images_apart(reference: Reference) -> None:
    ask = Ask("what is it?", [LARGE])
    answer = reference.answer(ask)
    others = [
        reference.answer(ask, VisionZip(tokens=6, order="grouped")),
        reference.answer(ask, VisionZip(tokens=6, merge="average")),
        reference.answer(Ask("what is it?", [LARGE.transpose(0)])),
    ]
    for other in others:
        assert other.tokens != answer.tokens or abs(other.logprob - answer.logprob) > 5 * TOLERANCE


def test_views_follow_from_the_size(served: Engine, reference: Reference) -> None:
    words = len(reference.processor.tokenizer(Ask("?", [LARGE]).prompt).input_ids) - 1
    answers = served.answers([Ask("?", [image]) for image in (LARGE, WIDE, TALL)])
    assert [(len(answer.prompt) - words) / 6 for answer in answers] == [7, 5, 4]


def test_a_batch_of_several_images_sizes_budgets_and_text(served: Engine, reference: Reference) -> None:
    """Chunks are of 96 tokens: some end within an image."""
    served.forget()
    asks = [
        Ask("what is it?", [LARGE]),
        Ask("no image here, just text."),
        Ask("which one is wider?", [WIDE, LARGE]),
        Ask("and these?", [TALL, LARGE, WIDE], visual_tokens=3),
        Ask("what is it?", [LARGE], visual_tokens=20),
        Ask("what is it?", [TALL], visual_tokens=1),
    ]
    for ask, answer in zip(asks, served.answers(asks), strict=True):
        expected = reference.answer(ask)
        assert answer.agrees(expected), f"{ask.text}: {answer} instead of {expected}"


def test_a_second_turn_pays_for_its_text_only(served: Engine, reference: Reference) -> None:
    served.forget()
    first = Ask("what is it? " * 3, [LARGE])
    served.answers([first])
    turn = Ask(f"{first.text} and why?", [LARGE])
    again = served.answers([turn])[0]
    assert again.cached >= 7 * 6
    assert again.agrees(reference.answer(turn))


def test_another_image_or_budget_shares_no_prefix(served: Engine, reference: Reference) -> None:
    served.forget()
    for ask in [Ask("?", [LARGE]), Ask("?", [LARGE.transpose(0)]), Ask("?", [LARGE], visual_tokens=7)]:
        answer = served.answers([ask])[0]
        assert answer.cached == 0
        assert answer.agrees(reference.answer(ask))


def test_crops_are_encoded_a_few_at_a_time(served: Engine, reference: Reference) -> None:
    served.forget()
    views: list[int] = []
    hook = served.model.vision_tower.register_forward_pre_hook(lambda _, args: views.append(len(args[0])))
    ask = Ask("what are they?", [LARGE, WIDE, TALL], visual_tokens=2)
    try:
        answer = served.answers([ask])[0]
    finally:
        hook.remove()
    assert sum(views) == 7 + 5 + 4
    assert max(views) == max(1, 96 // 49)
    assert answer.agrees(reference.answer(ask))


def test_memory_is_measured_with_the_largest_budget_and_image(served: Engine) -> None:
    assert served.runner.mm_budget.mm_max_toks_per_item == {"image": 37 * 20}
    served.runner.profile_run()
    served.forget()


def test_a_budget_over_the_maximum_is_refused(served: Engine) -> None:
    with pytest.raises(ValueError, match="at most 20, got 21"):
        served.answers([Ask("what is it?", [LARGE], visual_tokens=21)])


def test_fields_that_would_make_other_views_are_refused(served: Engine) -> None:
    fields = {"size": {"height": 196, "width": 196}}
    request = {**Ask("what is it?", [LARGE]).for_vllm(), "mm_processor_kwargs": fields}
    with pytest.raises(ValueError, match="this model expects 7 of 98 x 98 pixels"):
        served.generate([request])


def test_videos_are_refused(served: Engine, reference: Reference) -> None:
    request = {
        "prompt": "USER: <video> ? ASSISTANT:",
        "multi_modal_data": {"video": [torch.zeros(4, 3, 98, 98).numpy()]},
    }
    with pytest.raises(ValueError, match="videos of a compressed llava_onevision are not supported"):
        served.generate([request])
    ask = Ask("still there?", [TALL])
    assert served.answers([ask])[0].agrees(reference.answer(ask))
