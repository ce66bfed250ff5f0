"""LLaVA-NeXT: a base view and crops, as many as the image's size makes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from side_by_side import Ask, Engine, Reference, engine, picture, random_checkpoint

from vlmzip import VisionZip

METHOD = VisionZip(tokens=16, max_visual_tokens=40)
SQUARE, WIDE, TALL = picture(1, 300, 290), picture(2, 500, 120), picture(3, 90, 250)


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint("llava_next", tmp_path_factory.mktemp("next"))


@pytest.fixture(scope="module")
def reference(stock: Path) -> Reference:
    return Reference(stock, METHOD)


@pytest.fixture(scope="module")
def served(stock: Path) -> Iterator[Engine]:
    overrides = {
        "architectures": ["VlmzipLlavaNextForConditionalGeneration"],
        "vlmzip": METHOD.settings(),
    }
    with engine(model=str(stock), hf_overrides=overrides, max_num_batched_tokens=256) as running:
        yield running


def test_views_follow_from_the_size(served: Engine, reference: Reference) -> None:
    words = len(reference.processor.tokenizer(Ask("?", [SQUARE]).prompt).input_ids) - 1
    answers = served.answers([Ask("?", [image]) for image in (SQUARE, WIDE, TALL)])
    assert [(len(answer.prompt) - words) // 16 for answer in answers] == [5, 4, 4]


def test_a_batch_of_several_images_sizes_budgets_and_text(served: Engine, reference: Reference) -> None:
    served.forget()
    asks = [
        Ask("what is it?", [SQUARE]),
        Ask("no image here, just text."),
        Ask("which one is wider?", [WIDE, SQUARE]),
        Ask("and these?", [TALL, SQUARE, WIDE], visual_tokens=8),
        Ask("what is it?", [WIDE], visual_tokens=40),
        Ask("what is it?", [TALL], visual_tokens=1),
    ]
    for ask, answer in zip(asks, served.answers(asks), strict=True):
        expected = reference.answer(ask)
        assert answer.agrees(expected), f"{ask.text}: {answer} instead of {expected}"


def test_a_second_turn_pays_for_its_text_only(served: Engine, reference: Reference) -> None:
    served.forget()
    first = Ask("what is it? " * 3, [SQUARE])
    served.answers([first])
    turn = Ask(f"{first.text} and why?", [SQUARE])
    again = served.answers([turn])[0]
    assert again.cached >= 5 * 16 + 16
    assert again.agrees(reference.answer(turn))


def test_crops_are_encoded_a_few_at_a_time(served: Engine, reference: Reference) -> None:
    served.forget()
    views: list[int] = []
    hook = served.model.vision_tower.register_forward_pre_hook(lambda _, args: views.append(len(args[0])))
    ask = Ask("what are they?", [SQUARE, WIDE, TALL], visual_tokens=4)
    try:
        answer = served.answers([ask])[0]
    finally:
        hook.remove()
    assert sum(views) == 5 + 4 + 4
    assert max(views) == 256 // 65
    assert answer.agrees(reference.answer(ask))


def test_memory_is_measured_with_the_largest_budget_and_image(served: Engine) -> None:
    assert served.runner.mm_budget.mm_max_toks_per_item == {"image": 5 * 40}
    served.runner.profile_run()
    served.forget()


def test_adapters_are_told_how_many_tokens_tower_and_projector_see(served: Engine) -> None:
    ((_, item), *_) = served.runner.mm_budget.get_dummy_encoder_profile_inputs("image", 1)
    counts = served.model.get_mm_lora_token_counts
    assert counts(modality="image", mm_kwargs=item, num_mm_embeds=200) == (5 * 65, 200)


def test_a_budget_over_the_maximum_is_refused(served: Engine) -> None:
    with pytest.raises(ValueError, match="at most 40, got 41"):
        served.answers([Ask("what is it?", [SQUARE], visual_tokens=41)])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"crop_size": {"height": 56, "width": 56}}, "this model expects 5 of 112 x 112 pixels"),
        ({"image_grid_pinpoints": [[112, 224]]}, "mm_processor_kwargs cannot be used"),
    ],
)
def test_fields_that_would_make_other_views_are_refused(
    served: Engine, reference: Reference, fields: Any, message: str
) -> None:
    ask = Ask("what is it?", [SQUARE])
    with pytest.raises(ValueError, match=message):
        served.generate([{**ask.for_vllm(), "mm_processor_kwargs": fields}])
    assert served.answers([ask])[0].agrees(reference.answer(ask))
