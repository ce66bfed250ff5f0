"""Qwen2.5-VL and Qwen2-VL: images of any size, and positions (M-RoPE) as in the uncompressed prompt."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import side_by_side
import torch
from side_by_side import TOLERANCE, Engine, Reference, engine, picture, write_checkpoint

from vlmzip import UnsupportedModelError, VisionZip
from vlmzip.tiny.random import build

# Uncompressed, the model takes 4 to 64 tokens an image; at K >= n all are kept.
METHOD = VisionZip(tokens=12, max_visual_tokens=40)
# In merged tokens 6 x 8, 3 x 20, 20 x 3, 2 x 2.
LANDSCAPE, WIDE, TALL, SMALL = (
    picture(1, 224, 168),
    picture(2, 560, 84),
    picture(3, 84, 560),
    picture(4, 40, 40),
)
FAMILIES = {
    "qwen2_5_vl": "VlmzipQwen2_5_VLForConditionalGeneration",
    "qwen2_vl": "VlmzipQwen2VLForConditionalGeneration",
}
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


@dataclass(frozen=True)
class Ask(side_by_side.Ask):
    """One request, its images between words."""

    @property
    def prompt(self) -> str:
        return "USER: " + "".join(f"look {IMAGE} " for _ in self.images) + self.text + " ASSISTANT:"


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def stock(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(family)
    write_checkpoint(*build(family), folder)
    return folder


@pytest.fixture(scope="module")
def reference(stock: Path) -> Reference:
    return Reference(stock, METHOD)


@pytest.fixture(scope="module")
def served(family: str, stock: Path) -> Iterator[Engine]:
    overrides = {"architectures": [FAMILIES[family]], "vlmzip": METHOD.settings()}
    with engine(model=str(stock), hf_overrides=overrides, max_num_batched_tokens=72) as running:
        yield running


def assert_all_agree(served: Engine, reference: Reference, asks: list[Ask]) -> None:
    for ask, answer in zip(asks, served.answers(asks), strict=True):
        expected = reference.answer(ask)
        assert answer.agrees(expected), f"{ask.text}: {answer} instead of {expected}"


def test_the_reference_tells_orders_budgets_and_shapes_apart(reference: Reference) -> None:
    ask = Ask("what is it?", [LANDSCAPE])
    answer = reference.answer(ask)
    others = [
        reference.answer(ask, VisionZip(tokens=12, order="grouped")),
        reference.answer(ask, VisionZip(dominant=11, contextual=1)),
        reference.answer(ask, VisionZip(tokens=12, merge="average")),
        reference.answer(Ask("what is it?", [LANDSCAPE.transpose(0)])),
    ]
    for other in others:
        assert other.tokens != answer.tokens or abs(other.logprob - answer.logprob) > 5 * TOLERANCE


def test_one_image_of_each_shape(served: Engine, reference: Reference) -> None:
    served.forget()
    for ask in [Ask("what is it?", [image]) for image in (LANDSCAPE, WIDE, TALL, SMALL)]:
        assert_all_agree(served, reference, [ask])


def test_a_batch_of_several_images_sizes_budgets_and_text(served: Engine, reference: Reference) -> None:
    served.forget()
    asks = [
        Ask("what is it?", [TALL]),
        Ask("no image here, just text."),
        Ask("which one is wider?", [WIDE, TALL]),
        Ask("and these?", [TALL, LANDSCAPE, SMALL, WIDE], visual_tokens=5),
        Ask("what is it?", [LANDSCAPE], visual_tokens=40),
        Ask("what is it?", [TALL], visual_tokens=1),
        Ask("the same one twice?", [TALL, TALL]),
    ]
    assert_all_agree(served, reference, asks)


def test_a_long_prompt_is_read_in_chunks(served: Engine, reference: Reference) -> None:
    """Chunks are of 72 tokens: some end within an image."""
    served.forget()
    asks = [
        Ask("what are they?" + " and so on" * 5, [TALL, LANDSCAPE, WIDE], visual_tokens=40),
        Ask("what are they?", [LANDSCAPE, TALL, TALL, WIDE, LANDSCAPE, TALL], visual_tokens=33),
    ]
    for ask in asks:
        assert_all_agree(served, reference, [ask])
    served.forget()
    assert_all_agree(served, reference, asks)


def test_a_second_turn_pays_for_its_text_only(served: Engine, reference: Reference) -> None:
    served.forget()
    first = Ask("what is it? " * 3, [TALL])
    answer = served.answers([first])[0]
    said = reference.processor.tokenizer.decode(answer.tokens)
    turn = Ask(f"{first.text} ASSISTANT: {said} USER: and why?", [TALL])
    again = served.answers([turn])[0]
    assert again.cached >= 32
    assert again.agrees(reference.answer(turn))


def test_the_prefix_cache_may_end_within_an_image(served: Engine, reference: Reference) -> None:
    served.forget()
    asks = [
        Ask("what are they?", [TALL, LANDSCAPE], visual_tokens=40),
        Ask("and these?", [TALL, WIDE], visual_tokens=40),
        Ask("what are they?", [TALL, LANDSCAPE], visual_tokens=40),
    ]
    cached = []
    for ask in asks:
        answer = served.answers([ask])[0]
        cached.append(answer.cached)
        assert answer.agrees(reference.answer(ask))
    before = len(reference.processor.tokenizer(f"USER: look {IMAGE} look <|vision_start|>").input_ids)
    assert cached[0] == 0
    assert cached[1] == (before + 39) // 32 * 32
    assert before + 39 < cached[2] < before + 2 * 39 + 1


def test_another_image_or_budget_shares_no_prefix(served: Engine, reference: Reference) -> None:
    served.forget()
    asks = [
        Ask("what is it?", [WIDE], visual_tokens=40),
        Ask("what is it?", [TALL], visual_tokens=40),
        Ask("what is it?", [WIDE], visual_tokens=39),
    ]
    for ask in asks:
        answer = served.answers([ask])[0]
        assert answer.cached == 0
        assert answer.agrees(reference.answer(ask))


def test_images_are_encoded_a_few_at_a_time(served: Engine, reference: Reference) -> None:
    served.forget()
    patches: list[int] = []
    hook = served.model.visual.register_forward_pre_hook(lambda _, args: patches.append(len(args[0])))
    others = [picture(seed, 40, 40) for seed in (5, 6)]
    ask = Ask("what are they?", [SMALL, others[0], TALL, LANDSCAPE, others[1], WIDE], visual_tokens=1)
    try:
        answer = served.answers([ask])[0]
    finally:
        hook.remove()
    assert sum(patches) == 4 * (4 + 4 + 60 + 48 + 4 + 60)
    assert max(patches) <= 4 * 72
    assert len(patches) < 6
    assert answer.agrees(reference.answer(ask))


def test_memory_is_measured_with_the_largest_budget(served: Engine) -> None:
    budget = served.runner.mm_budget
    assert budget.mm_max_toks_per_item == {"image": 40}
    ((_, item), *_) = budget.get_dummy_encoder_profile_inputs("image", 1)
    assert int(item["visual_tokens"].data) == 40
    served.runner.profile_run()
    served.forget()


def test_sharded_over_ranks_by_image_the_tower_gives_the_same(served: Engine) -> None:
    encoder = served.model.encoder
    grids = [[1, 12, 16], [1, 4, 4], [1, 40, 6]]
    pixels_PC = torch.rand(sum(h * w for _, h, w in grids), encoder.tower.patch_values)
    outs = []
    for encoder._data_parallel in (True, False):
        with torch.inference_mode():
            outs.append(encoder.encode(pixels_PC, grids, [0, 0, 40]))
    assert [len(rows) for rows in outs[0]] == [12, 4, 40]
    for one, other in zip(*outs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_positions_never_pass_the_end_of_the_table(served: Engine) -> None:
    """20 images of one token each, 1800 rows high: without compression they would not fit the prompt."""
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

    model = served.model
    image, text = model.config.image_token_id, 5
    grid = SimpleNamespace(data=torch.tensor([1, 3600, 2]))
    for images, end in ((2, 2 + 2 * 1800), (20, None)):
        tokens = [text, image] * images + [text]
        features: list[Any] = [
            MultiModalFeatureSpec(
                data={"image_grid_thw": grid},  # type: ignore[arg-type]
                modality="image",
                identifier=str(i),
                mm_position=PlaceholderRange(offset=1 + 2 * i, length=1),
            )
            for i in range(images)
        ]
        positions_3T, delta = model.get_mrope_input_positions(tokens, features)
        rotary = model.language_model.model.layers[0].self_attn.rotary_emb
        last = rotary.cos_sin_cache.shape[0] - 1
        assert int(positions_3T.max()) + 1024 - len(tokens) <= last
        assert delta + len(tokens) - 1 == int(positions_3T[0, -1]) == (end or last - 1024 + len(tokens))


@pytest.mark.parametrize(
    ("pipeline", "lora", "compiled", "rate", "reason"),
    [
        (2, False, False, None, "pipeline-parallel-size"),
        (1, True, False, None, "enable-tower-connector-lora"),
        (1, False, True, None, "compile_mm_encoder"),
        (1, False, False, 0.5, "video-pruning-rate"),
    ],
)
def test_engines_that_would_go_wrong_are_refused(
    pipeline: int, lora: bool, compiled: bool, rate: float | None, reason: str
) -> None:
    from vlmzip.vllm.packed import _check_engine

    multimodal = SimpleNamespace(video_pruning_rate=rate)
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(get_multimodal_config=lambda: multimodal),
        lora_config=SimpleNamespace(enable_tower_connector_lora=lora),
        parallel_config=SimpleNamespace(pipeline_parallel_size=pipeline),
        compilation_config=SimpleNamespace(compile_mm_encoder=compiled),
    )
    with pytest.raises(UnsupportedModelError, match=f"does not run with .*{reason}.*; leave it off"):
        _check_engine(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_places_survive_every_dtype(dtype: torch.dtype) -> None:
    from vlmzip.vllm.mrope import split_places, with_places

    columns = 1811  # of the most elongated image of 16384 tokens
    index_K = torch.tensor([0, 1, 255, 257, columns - 1, columns, 8 * columns + 999])
    tokens_KD = torch.rand(len(index_K), 5, dtype=dtype)
    rows = [with_places(tokens_KD, index_K, columns), with_places(tokens_KD[:2], index_K[:2] + 32000, 1)]
    (first, second), places_2S = split_places(rows)
    assert torch.equal(first, tokens_KD)
    assert torch.equal(second, tokens_KD[:2])
    assert places_2S[0].tolist() == [0, 0, 0, 0, 0, 1, 8, 32000, 32001]
    assert places_2S[1].tolist() == [0, 1, 255, 257, 1810, 0, 999, 0, 0]


@pytest.mark.parametrize("budget", [0, -1, 41, "x", True])
def test_a_budget_out_of_range_is_refused(served: Engine, budget: Any) -> None:
    request = {**Ask("?", [WIDE]).for_vllm(), "mm_processor_kwargs": {"visual_tokens": budget}}
    with pytest.raises(ValueError, match="visual_tokens must be"):
        served.generate([request])


def test_fields_that_would_make_other_patches_are_refused(served: Engine) -> None:
    request = {**Ask("?", [WIDE]).for_vllm(), "mm_processor_kwargs": {"patch_size": 28}}
    with pytest.raises(ValueError, match="patch_size, temporal_patch_size or merge_size is another"):
        served.generate([request])


def test_a_smaller_image_by_the_requests_own_fields(served: Engine) -> None:
    """Fewer tokens than the budget: all are kept."""
    fields = {"max_pixels": 9 * 28 * 28, "min_pixels": 4 * 28 * 28}
    request = {**Ask("?", [LANDSCAPE]).for_vllm(), "mm_processor_kwargs": fields}
    image = served.model.config.image_token_id
    answer = served.generate([request])[0]
    assert 4 <= answer.prompt.count(image) <= 9


def test_videos_are_refused(served: Engine, family: str) -> None:
    frames: Any = torch.zeros(4, 3, 56, 56).numpy()
    if family == "qwen2_5_vl":
        frames = (frames, {"fps": 2.0, "total_num_frames": 4, "frames_indices": list(range(4))})
    prompt = f"USER: {IMAGE.replace('image', 'video')} ? ASSISTANT:"
    with pytest.raises(ValueError, match=r"videos of a compressed qwen2\w+ are not supported with vLLM"):
        served.generate([{"prompt": prompt, "multi_modal_data": {"video": [frames]}}])


def test_a_prompt_that_ends_with_an_image_is_refused(served: Engine) -> None:
    prompt = "look <|vision_start|><|image_pad|>"
    with pytest.raises(ValueError, match="ends with an image; write text after it"):
        served.generate([{"prompt": prompt, "multi_modal_data": {"image": [WIDE]}}])


def test_the_engine_lives_on_after_refusals(served: Engine, reference: Reference) -> None:
    assert_all_agree(served, reference, [Ask("still there?", [TALL])])
