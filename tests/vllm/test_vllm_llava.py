"""LLaVA-1.5 on a CLIP tower: a stored compressed checkpoint, served without flags."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from side_by_side import TOLERANCE, Ask, Engine, Reference, engine, picture, random_checkpoint
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlmzip import VisionZip, compress

METHOD = VisionZip(tokens=64, max_visual_tokens=192)
LARGE, WIDE, TALL = picture(1, 400, 300), picture(2, 500, 120), picture(3, 90, 250)


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint("llava", tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def stored(stock: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compressed")
    model = AutoModelForImageTextToText.from_pretrained(stock)
    with compress(model, AutoProcessor.from_pretrained(stock), METHOD) as zipped:
        zipped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reference(stock: Path) -> Reference:
    return Reference(stock, METHOD)


@pytest.fixture(scope="module")
def served(stored: Path) -> Iterator[Engine]:
    with engine(model=str(stored), max_num_batched_tokens=2048) as running:
        yield running


def assert_all_agree(served: Engine, reference: Reference, asks: list[Ask]) -> None:
    for ask, answer in zip(asks, served.answers(asks), strict=True):
        expected = reference.answer(ask)
        assert answer.agrees(expected), f"{ask.text}: {answer} instead of {expected}"


def test_a_compressed_checkpoint_names_our_architecture(stored: Path) -> None:
    config = json.loads((stored / "config.json").read_text())
    assert config["architectures"] == ["VlmzipLlavaForConditionalGeneration"]
    assert config["vlmzip"] == METHOD.settings() | {"order": "grouped"}


def test_the_reference_tells_orders_budgets_and_images_apart(reference: Reference) -> None:
    ask = Ask("what is it?", [LARGE])
    answer = reference.answer(ask)
    others = [
        reference.answer(ask, VisionZip(tokens=64, order="raster")),
        reference.answer(ask, VisionZip(dominant=60, contextual=4)),
        reference.answer(ask, VisionZip(tokens=64, merge="average")),
        reference.answer(ask, VisionZip(tokens=64, send_cls=False)),
        reference.answer(Ask("what is it?", [TALL])),
    ]
    for other in others:
        assert other.tokens != answer.tokens or abs(other.logprob - answer.logprob) > 5 * TOLERANCE


def test_one_request(served: Engine, reference: Reference) -> None:
    ask = Ask("what is it?", [LARGE])
    assert (
        len(served.answers([ask])[0].prompt)
        == len(reference.processor.tokenizer(ask.prompt).input_ids) + 63
    )
    assert_all_agree(served, reference, [ask])


def test_a_batch_of_several_images_sizes_budgets_and_text(served: Engine, reference: Reference) -> None:
    served.forget()
    asks = [
        Ask("what is it?", [LARGE]),
        Ask("no image here, just text."),
        Ask("which one is wider?", [WIDE, TALL]),
        Ask("and these?", [TALL, LARGE, WIDE], visual_tokens=32),
        Ask("what is it?", [LARGE], visual_tokens=192),
        Ask("what is it?", [LARGE], visual_tokens=17),
        Ask("what is it?", [LARGE], visual_tokens=1),
        Ask("the same one twice?", [WIDE, WIDE]),
    ]
    assert_all_agree(served, reference, asks)


def test_a_second_turn_pays_for_its_text_only(served: Engine, reference: Reference) -> None:
    served.forget()
    first = Ask("what is it? " * 3, [WIDE])
    answer = served.answers([first])[0]
    said = reference.processor.tokenizer.decode(answer.tokens)
    turn = Ask(f"{first.text} ASSISTANT: {said} USER: and why?", [WIDE])
    again = served.answers([turn])[0]
    assert again.cached >= 64 + 32
    assert again.agrees(reference.answer(turn))


def test_another_image_or_budget_shares_no_prefix(served: Engine, reference: Reference) -> None:
    served.forget()
    asks = [
        Ask("what is it?", [LARGE]),
        Ask("what is it?", [TALL]),
        Ask("what is it?", [LARGE], visual_tokens=128),
        Ask("what is it?", [LARGE], visual_tokens=96),
    ]
    for ask in asks:
        answer = served.answers([ask])[0]
        assert answer.cached == 0
        assert answer.agrees(reference.answer(ask))


def test_an_image_named_by_its_client_is_kept_apart_by_budget(
    served: Engine, reference: Reference
) -> None:
    served.forget()
    asks = [Ask("what is it?", [LARGE], visual_tokens=k) for k in (64, 32)]
    for ask in asks:
        answer = served.generate([{**ask.for_vllm(), "multi_modal_uuids": {"image": ["mine"]}}])[0]
        assert answer.agrees(reference.answer(ask))


def test_settings_belong_to_the_hash(stock: Path) -> None:
    from vllm import EngineArgs
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.processing import ProcessorInputs
    from vllm.multimodal.processing.context import TimingContext

    found = []
    for settings in (
        {"tokens": 64},
        {"dominant": 60, "contextual": 4},
        {"tokens": 64, "merge": "average"},
    ):
        args = EngineArgs(
            model=str(stock), hf_overrides={"vlmzip": {"method": "visionzip"} | settings}, dtype="float32"
        )
        processor = MULTIMODAL_REGISTRY.create_processor(args.create_model_config())
        token = processor.info.get_hf_config().image_token_id
        items = processor.info.parse_mm_data({"image": [LARGE]})
        out = processor.apply(ProcessorInputs([token], items), TimingContext(enabled=False))
        assert out["prompt_token_ids"] == [token] * 64
        found.append(out["mm_hashes"]["image"][0])
    assert len(set(found)) == 3


@pytest.mark.parametrize("budget", [0, -1, 10**9, 193, "x", "64", 64.0, True, None])
def test_a_budget_out_of_range_is_refused(served: Engine, budget: Any) -> None:
    request = {**Ask("what is it?", [LARGE]).for_vllm(), "mm_processor_kwargs": {"visual_tokens": budget}}
    with pytest.raises(ValueError, match=r"visual_tokens must be .*takes 1 to 192 tokens a view"):
        served.generate([request])


def test_too_few_or_too_many_placeholders_are_refused(served: Engine) -> None:
    for prompt in ("USER: what is it? ASSISTANT:", "USER: <image><image> what is it? ASSISTANT:"):
        with pytest.raises(ValueError, match="placeholders for 1 images"):
            served.generate([{"prompt": prompt, "multi_modal_data": {"image": [LARGE]}}])


def test_fields_that_would_make_another_image_are_refused(served: Engine) -> None:
    fields = {"crop_size": {"height": 112, "width": 112}, "visual_tokens": 32}
    request = {**Ask("what is it?", [LARGE]).for_vllm(), "mm_processor_kwargs": fields}
    with pytest.raises(ValueError, match="112 x 112 pixels, this model takes 336 x 336"):
        served.generate([request])


def test_the_engine_lives_on_after_refusals(served: Engine, reference: Reference) -> None:
    assert_all_agree(served, reference, [Ask("still there?", [TALL])])


def test_many_small_images_are_encoded_a_few_at_a_time(served: Engine, reference: Reference) -> None:
    served.forget()
    views: list[int] = []
    hook = served.model.vision_tower.register_forward_pre_hook(lambda _, args: views.append(len(args[0])))
    asks = [Ask("what are they?", [picture(10 + i) for i in range(12)], visual_tokens=16)]
    try:
        answers = served.answers(asks)
    finally:
        hook.remove()
    assert sum(views) == 12
    assert max(views) == 2048 // 577
    assert answers[0].agrees(reference.answer(asks[0]))


def test_the_size_of_a_micro_batch_changes_nothing(served: Engine) -> None:
    encoder = served.model.encoder
    pixels_BCHW = torch.rand(5, 3, 336, 336)
    views, asked = [2, 1, 2], [0, 16, 100]
    at_a_time, outs = encoder.at_a_time, []
    for encoder.at_a_time in (1, 2, 5, None):
        with torch.inference_mode():
            outs.append(encoder.encode(pixels_BCHW, views, asked))
    encoder.at_a_time = at_a_time
    assert [tuple(out.tokens.shape[:2]) for out in outs[0]] == [(2, 64), (1, 16), (2, 100)]
    for out in outs[1:]:
        for one, other in zip(outs[0], out, strict=True):
            torch.testing.assert_close(one.tokens, other.tokens, atol=1e-4, rtol=1e-4)
            assert torch.equal(one.dominant, other.dominant)


def test_memory_is_measured_with_the_largest_budget(served: Engine) -> None:
    budget = served.runner.mm_budget
    assert budget.mm_max_toks_per_item == {"image": 192}
    ((_, item), *_) = budget.get_dummy_encoder_profile_inputs("image", 1)
    assert int(item["visual_tokens"].data) == 192
    served.runner.profile_run()
    served.forget()


def test_adapters_are_told_how_many_tokens_tower_and_projector_see(served: Engine) -> None:
    counts = served.model.get_mm_lora_token_counts
    assert counts(modality="image", mm_kwargs={}, num_mm_embeds=64) == (577, 64)
    assert counts(modality="image", mm_kwargs=None, num_mm_embeds=2) == (2 * 577, 2)
