"""What Qwen2-VL, Qwen2.5-VL and Qwen3-VL share: videos, positions, budgets, and what is refused."""

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from transformers.modeling_utils import AttentionInterface

from contract import TOLERANCE, Case, embedded_logits, fresh, image
from slow import qwen2_vl as slow
from slow import qwen3_vl
from vlmzip import Random, UnsupportedModelError, VisionZip, compress
from vlmzip.families import family_of
from vlmzip.tiny.random import build as build_random

pytestmark = pytest.mark.needs_torchvision
METHOD = VisionZip(tokens=7)


@pytest.fixture(params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def case(request: pytest.FixtureRequest) -> Case:
    return fresh(request.param, "tiny")


def video(seed: int, frames: int, height: int = 150, width: int = 170) -> np.ndarray[Any, Any]:
    return np.stack([np.asarray(image(100 * seed + i, width, height)) for i in range(frames)])


def process(case: Case, texts: list[str], images: Any = None, videos: Any = None) -> dict[str, Any]:
    """`I` and `V` in the texts stand for an image and a video."""
    marks = {"I": case.processor.image_token, "V": case.processor.video_token}
    texts = ["".join(marks.get(letter, letter) for letter in text) for text in texts]
    case.processor.tokenizer.padding_side = "left"
    found = case.processor(text=texts, images=images, videos=videos, padding=True, return_tensors="pt")
    return dict(found)


def mixed(case: Case) -> dict[str, Any]:
    """Images and videos of different size, in turns, in prompts of different length."""
    return process(
        case,
        ["a V b I c V d", "I what?"],
        [image(1, 150, 130), image(2, 70, 230)],
        [video(1, 5), video(2, 4, 100, 230)],
    )


def zipped_inputs(case: Case, method: Any, make: Any = mixed) -> dict[str, Any]:
    with compress(case.model, case.processor, method):
        return make(case)


def by_hand(case: Case, inputs: dict[str, Any], method: Any) -> torch.Tensor:
    return case.logits(inputs, case.features(inputs, method), method)


@pytest.mark.parametrize(
    "method",
    [
        METHOD,
        VisionZip(keep=0.5),
        VisionZip(dominant=5, contextual=0),
        VisionZip(tokens=9, order="grouped"),
    ],
    ids=["tokens", "keep", "dominant", "grouped"],
)
def test_images_and_videos_in_one_batch(case: Case, method: VisionZip) -> None:
    inputs = zipped_inputs(case, method)
    with torch.no_grad(), compress(case.model, None, method):
        logits = case.model(**inputs).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits[real], by_hand(case, inputs, method)[real], **TOLERANCE)


def test_generate_on_images_and_videos(case: Case) -> None:
    inputs = zipped_inputs(case, METHOD)
    expected = case.greedy(inputs, METHOD)
    with compress(case.model, None, METHOD):
        case.assert_generates(case.generate(inputs), expected)


def test_every_frame_keeps_k_and_text_between_frames_stays(case: Case) -> None:
    def make(case: Case) -> dict[str, Any]:
        return process(case, ["see V now"], None, [video(1, 5)])

    stock, token = make(case), case.model.config.video_token_id
    inputs = zipped_inputs(case, METHOD, make)
    frames = int(stock["video_grid_thw"][0, 0])
    # Pairs of frames, the odd one doubled; Qwen3-VL's processor picks four of the five first.
    assert frames == (2 if case.model.config.model_type == "qwen3_vl" else 3)
    assert (inputs["input_ids"] == token).sum() == frames * METHOD.tokens
    before, after = ([t for t in i["input_ids"][0].tolist() if t != token] for i in (stock, inputs))
    assert before == after


def test_one_record_an_image_or_video_in_prompt_order(case: Case) -> None:
    inputs = zipped_inputs(case, METHOD)
    with torch.no_grad(), compress(case.model, None, METHOD) as zipped:
        case.model(**inputs)
        last = zipped.last
        case.generate(inputs)
        again = zipped.last
    expected: dict[Any, list[slow.Frame]] = {}
    for _, _, frame in slow.placed(case.model, inputs, slow.frames(case.model, inputs, METHOD)):
        expected.setdefault(frame.owner, []).append(frame)
    assert [kind for kind, _ in expected] == ["video", "image", "video", "image"]
    for record in (last, again):
        for one, frames in zip(record, expected.values(), strict=True):
            assert one.grid == tuple((frame.rows, frame.columns) for frame in frames)
            for view, frame in enumerate(frames):
                assert torch.equal(one.dominant[view], frame.zipped.dominant[0])
                assert torch.equal(one.contextual[view], frame.zipped.contextual[0])
                torch.testing.assert_close(one.scores[view], frame.scores.float(), rtol=1e-4, atol=1e-6)


def test_an_image_is_scored_on_its_own(case: Case) -> None:
    """Neither another image nor another frame in the same packed sequence changes what is kept."""
    inputs = zipped_inputs(case, METHOD)
    with torch.no_grad(), compress(case.model, None, METHOD):
        packed = case.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        first = int(inputs["image_grid_thw"][0].prod())
        for index, part in enumerate((slice(0, first), slice(first, None))):
            alone = case.model.get_image_features(
                inputs["pixel_values"][part], inputs["image_grid_thw"][index : index + 1]
            )
            torch.testing.assert_close(
                alone.pooler_output[0], packed.pooler_output[index], rtol=1e-5, atol=1e-6
            )


def flash_by_hand(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """What FlashAttention's variable-length kernel computes, given all sequences in one call."""
    assert attention_mask is None
    assert query.shape[0] == 1
    bounds = kwargs["cu_seq_lens_q"].tolist()
    parts = []
    for start, end in itertools.pairwise(bounds):
        q, k, v = (x[:, :, start:end] for x in (query, key, value))
        parts.append((q @ k.transpose(2, 3) * scaling).softmax(-1) @ v)
    return torch.cat(parts, 2).transpose(1, 2), None


AttentionInterface.register("flash_by_hand", flash_by_hand)


def test_a_packed_attention_call_is_split_into_frames(case: Case) -> None:
    inputs = zipped_inputs(case, METHOD)
    expected = by_hand(case, inputs, METHOD)
    case.model.model.visual.config._attn_implementation = "flash_by_hand"
    with torch.no_grad(), compress(case.model, None, METHOD):
        logits = case.model(**inputs).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits[real], expected[real], **TOLERANCE)


# --- budgets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [VisionZip(keep=1.0), VisionZip(tokens=1000), Random(tokens=64)])
def test_a_budget_of_every_token_is_the_stock_model(case: Case, method: Any) -> None:
    stock = mixed(case)
    with torch.no_grad():
        expected = case.model(**stock).logits
        deltas = case.model.model.rope_deltas
        with compress(case.model, case.processor, method):
            inputs = mixed(case)
            logits = case.model(**inputs).logits
            assert torch.equal(case.model.model.rope_deltas, deltas)
    assert torch.equal(inputs["input_ids"], stock["input_ids"])
    assert torch.equal(logits, expected)


def test_a_small_image_keeps_what_it_has(case: Case) -> None:
    def make(case: Case) -> dict[str, Any]:
        return process(case, ["I and I"], [image(1, 20, 20), image(2, 200, 160)])

    inputs = zipped_inputs(case, VisionZip(tokens=12), make)
    sizes = inputs["image_grid_thw"].prod(-1) // 4
    assert sizes[0] < 12 < sizes[1]
    assert (inputs["input_ids"] == case.model.config.image_token_id).sum() == sizes[0] + 12
    with torch.no_grad(), compress(case.model, None, VisionZip(tokens=12)):
        logits = case.model(**inputs).logits
    torch.testing.assert_close(logits, by_hand(case, inputs, VisionZip(tokens=12)), **TOLERANCE)


def test_total_tokens_is_tokens_where_an_image_is_one_view(case: Case) -> None:
    total = zipped_inputs(case, VisionZip(total_tokens=7))
    assert torch.equal(total["input_ids"], zipped_inputs(case, METHOD)["input_ids"])


def test_placeholders_known_from_the_size_alone(case: Case) -> None:
    with compress(case.model, case.processor, VisionZip(keep=0.3)):
        counts = case.processor._get_num_multimodal_tokens(image_sizes=[(130, 150), (230, 70)])
        inputs = process(case, ["I", "I"], [image(1, 150, 130), image(2, 70, 230)])
    written = (inputs["input_ids"] == case.model.config.image_token_id).sum(1)
    assert counts.num_image_tokens == written.tolist()


# --- positions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_are_those_of_the_whole_prompt(case: Case, side: str) -> None:
    def make(case: Case) -> dict[str, Any]:
        found = mixed(case)
        if side == "left":
            return found
        order = found["attention_mask"].argsort(dim=1, descending=True, stable=True)
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            found[name] = found[name].gather(1, order)
        return found

    inputs, stock = zipped_inputs(case, METHOD, make), make(case)
    seen: dict[str, Any] = {}
    language = case.model.model.language_model
    with torch.no_grad():
        case.model(**stock)
        uncompressed = case.model.model.rope_deltas + stock["attention_mask"].sum(1, keepdim=True)
        with compress(case.model, None, METHOD):
            hook = language.register_forward_pre_hook(
                lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
            )
            case.model(**inputs)
            hook.remove()
            after = case.model.model.rope_deltas + inputs["attention_mask"].sum(1, keepdim=True)
    assert torch.equal(seen["position_ids"], slow.positions(case.model, inputs, METHOD))
    assert torch.equal(after, uncompressed)  # what comes next stands where it would have stood


def test_features_encoded_earlier_bring_their_selection_along(case: Case) -> None:
    inputs = zipped_inputs(case, METHOD)
    other = process(case, ["I"], [image(9, 230, 90)])
    pixels = {"pixel_values", "pixel_values_videos"}
    rest = {name: value for name, value in inputs.items() if name not in pixels}
    with torch.no_grad(), compress(case.model, None, METHOD):
        expected = case.model(**inputs).logits
        generated = case.generate(inputs).sequences
        for call in (case.model, case.generate):
            features = {
                "image": case.model.get_image_features(
                    inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True
                ),
                "video": case.model.get_video_features(
                    inputs["pixel_values_videos"], inputs["video_grid_thw"], return_dict=True
                ),
            }
            case.model.get_image_features(other["pixel_values"], other["image_grid_thw"])
            if call is case.model:
                assert torch.equal(call(**rest, mm_encoder_outputs=features).logits, expected)
            else:
                out = case.model.generate(
                    **rest,
                    mm_encoder_outputs=features,
                    do_sample=False,
                    max_new_tokens=4,
                    min_new_tokens=4,
                )
                assert torch.equal(out, generated)


def test_later_turns_by_hand(case: Case) -> None:
    """A custom loop over forward(): each prompt goes on where the last one's images ended."""
    with torch.no_grad(), compress(case.model, case.processor, METHOD):
        turns = [
            process(case, ["a I b", "b"], [image(1, 150, 130)]),
            process(case, [" so V and I?", " I"], [image(2, 70, 230), image(3)], [video(1, 4)]),
            process(case, [" and then?", " yes"]),
        ]
        cache, found, whole = None, [], {}
        for turn in turns:
            for name, value in turn.items():
                side_by_side = name in ("input_ids", "attention_mask", "mm_token_type_ids")
                parts = [whole[name], value] if name in whole else [value]
                joined = torch.cat(parts, int(side_by_side)) if len(parts) > 1 else value
                whole[name] = joined
            given = {**turn, "attention_mask": whole["attention_mask"]}
            if "pixel_values" not in turn:  # as generate() counts on
                after = whole["attention_mask"].cumsum(1) - 1 + case.model.model.rope_deltas
                given["position_ids"] = after[:, -turn["input_ids"].shape[1] :].expand(3, -1, -1)
            out = case.model(**given, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits)
    in_order = {**whole, **by_row(turns, case)}
    expected = by_hand(case, in_order, METHOD)
    real = whole["attention_mask"].bool()
    torch.testing.assert_close(torch.cat(found, 1)[real], expected[real], **TOLERANCE)


def by_row(turns: list[dict[str, Any]], case: Case) -> dict[str, Any]:
    """Pixels and sizes of the whole talk's images, first row first."""
    token = case.model.config.image_token_id
    pixels: list[list[Any]] = [[], []]
    for turn in turns[:2]:
        sizes = turn["image_grid_thw"].prod(-1).tolist()
        parts = list(zip(turn["pixel_values"].split(sizes), turn["image_grid_thw"], strict=True))
        rows = [row for row, ids in enumerate(turn["input_ids"]) if token in ids.tolist()]
        for row, part in zip(rows, parts, strict=True):
            pixels[row].append(part)
    ordered = pixels[0] + pixels[1]
    return {
        "pixel_values": torch.cat([part for part, _ in ordered]),
        "image_grid_thw": torch.stack([grid for _, grid in ordered]),
    }


@torch.no_grad()
def test_an_image_after_a_cached_text_goes_on_where_the_text_ended(case: Case) -> None:
    model = case.model
    with compress(model, case.processor, METHOD):
        model.model.rope_deltas = None
        text = process(case, ["hello there my friend"])
        later = process(case, ["so I what?"], [image(1, 150, 130)])
        cache = model(**text, use_cache=True).past_key_values
        seen: dict[str, Any] = {}
        hook = model.model.language_model.register_forward_pre_hook(
            lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True
        )
        mask = torch.cat([text["attention_mask"], later["attention_mask"]], 1)
        model(**{**later, "attention_mask": mask}, past_key_values=cache, use_cache=True)
        hook.remove()
    past = text["input_ids"].shape[1]
    assert seen["position_ids"][-3:, 0, :2].tolist() == [[past, past + 1]] * 3


def test_video_counts_are_not_told_from_sizes(case: Case) -> None:
    with (
        compress(case.model, case.processor, METHOD),
        pytest.raises(UnsupportedModelError, match="not known from video_sizes"),
    ):
        case.processor._get_num_multimodal_tokens(video_sizes=[(4, 150, 170)])


def test_beams_keep_each_prompts_images(case: Case) -> None:
    def make(case: Case) -> dict[str, Any]:
        return process(case, ["a I b I", "c I"], [image(i, 150, 130 + 40 * i) for i in range(3)])

    inputs = zipped_inputs(case, METHOD, make)
    settings = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 3, "do_sample": False}
    features, positions = case.features(inputs, METHOD), slow.positions(case.model, inputs, METHOD)
    with compress(case.model, None, METHOD):
        sequences = case.model.generate(**inputs, **settings, output_scores=True)[:, -3:]
    assert sequences.shape == (4, 3)
    if case.model.config.model_type == "qwen3_vl":
        return  # its slow path has no generate()
    embeds = case.model.get_input_embeddings()(inputs["input_ids"])
    places = inputs["input_ids"] == case.model.config.image_token_id
    embeds[places] = torch.cat(features).to(embeds.dtype)
    expected = case.model.generate(
        inputs_embeds=embeds,
        attention_mask=inputs["attention_mask"],
        position_ids=positions,
        **settings,
    )
    assert torch.equal(sequences, expected[:, -3:])


# --- what is refused ----------------------------------------------------------------------------


def test_placeholders_of_the_wrong_image(case: Case) -> None:
    """As many placeholders in all, but one image's are too many and the other's too few."""
    inputs = zipped_inputs(case, METHOD, lambda c: process(c, ["I-I"], [image(1), image(2, 200, 160)]))
    ids = inputs["input_ids"][0].tolist()
    gap = ids.index(case.model.config.image_token_id) + METHOD.tokens
    for name in ("input_ids", "mm_token_type_ids"):
        row = inputs[name][0]
        row[gap], row[gap + 1] = row[gap + 1].clone(), row[gap].clone()
    with compress(case.model, None, METHOD):
        for call in (case.model, case.generate):
            with pytest.raises(ValueError, match="prompt was not made by the processor"):
                call(**inputs) if call is case.model else call(inputs)


def test_a_stock_prompt_is_refused_by_generate(case: Case) -> None:
    with (
        compress(case.model, None, METHOD),
        pytest.raises(ValueError, match="prompt was not made by the processor"),
    ):
        case.generate(mixed(case))


def test_what_positions_need(case: Case) -> None:
    inputs = zipped_inputs(case, METHOD)
    without = {name: value for name, value in inputs.items() if name != "mm_token_type_ids"}
    pixels = {"pixel_values", "pixel_values_videos"}
    unseen = {name: value for name, value in inputs.items() if name not in pixels}
    stock = case.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    with compress(case.model, None, METHOD):
        with pytest.raises(ValueError, match="mm_token_type_ids is missing"):
            case.model(**without)
        with pytest.raises(ValueError, match="mm_token_type_ids is missing"):
            case.generate(without)
        with pytest.raises(ValueError, match="follow from its features"):
            case.model(**unseen)
        with pytest.raises(ValueError, match="image_grid_thw is missing"):
            case.model.get_image_features(inputs["pixel_values"])
        with pytest.raises(ValueError, match="prompt was not made by the processor"):
            case.model(**unseen, mm_encoder_outputs={"image": stock})
        swapped = {**inputs, "image_grid_thw": inputs["image_grid_thw"].flip(0)}
        del swapped["pixel_values"]
        features = case.model.get_image_features(
            inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True
        )
        videos = case.model.get_video_features(
            swapped.pop("pixel_values_videos"), inputs["video_grid_thw"], return_dict=True
        )
        with pytest.raises(ValueError, match="the features are of images of"):
            case.model(**swapped, mm_encoder_outputs={"image": features, "video": videos})


@pytest.mark.parametrize("setting", ["patch_size", "merge_size", "temporal_patch_size"])
@pytest.mark.parametrize("part", ["image_processor", "video_processor"])
def test_another_models_processor(case: Case, part: str, setting: str) -> None:
    value = {"patch_size": 12, "merge_size": 1, "temporal_patch_size": 1}[setting]
    setattr(getattr(case.processor, part), setting, value)
    with pytest.raises(ValueError, match=r"another model's|cannot process"):
        compress(case.model, case.processor, METHOD)
    assert "_vlmzip" not in vars(case.model.model)


def test_another_models_video_token(case: Case) -> None:
    case.processor.video_token_id += 1
    with pytest.raises(ValueError, match="video token"):
        compress(case.model, case.processor, METHOD)


def test_media_without_a_placeholder(case: Case) -> None:
    with compress(case.model, case.processor, METHOD):
        with pytest.raises(ValueError, match=r"placeholders for 1 videos|number of videos"):
            process(case, ["I"], [image(1)], [video(1, 4)])
        with pytest.raises(ValueError, match=r"placeholders for 1 images|number of images"):
            process(case, ["I I"], [image(1)])


def test_a_placeholder_without_its_image(case: Case) -> None:
    with compress(case.model, case.processor, METHOD):
        for prompts in (["I what?"], ["I what?", "I and I", "hello"]):
            with pytest.raises(ValueError, match="no images were given; pass images="):
                process(case, prompts)
        text = process(case, ["I what?"], [image(1)])["input_ids"]
        again = case.processor(text=case.processor.batch_decode(text), return_tensors="pt")
        assert torch.equal(again["input_ids"], text)  # a prompt that is expanded already


def test_a_tower_that_is_not_square(case: Case) -> None:
    config = copy.deepcopy(case.model.config)
    config.vision_config.patch_size = (14, 16)
    with pytest.raises(UnsupportedModelError, match="single numbers"):
        family_of(config)


def test_a_tower_replaced_afterwards(case: Case) -> None:
    inputs = zipped_inputs(case, METHOD)
    with compress(case.model, None, METHOD):
        case.model.model.visual.blocks[-1].attn = copy.deepcopy(case.model.model.visual.blocks[0].attn)
        with pytest.raises(UnsupportedModelError, match="attention was not seen"):
            case.model(**inputs)


def test_the_base_model_alone(case: Case) -> None:
    inputs = zipped_inputs(case, METHOD)
    with torch.no_grad():
        with compress(case.model, None, METHOD):
            expected = case.model.model(**inputs).last_hidden_state
        with compress(case.model.model, None, METHOD):
            found = case.model.model(**inputs).last_hidden_state
    assert torch.equal(found, expected)


def test_the_chat_template_places_images_and_videos(case: Case) -> None:
    content = [
        {"type": "image", "image": image(1)},
        {"type": "video", "video": video(1, 4)},
        {"type": "text", "text": "what?"},
    ]
    with compress(case.model, case.processor, METHOD):
        inputs = case.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
        )
        assert (inputs["input_ids"] == case.model.config.image_token_id).sum() == METHOD.tokens
        case.generate(dict(inputs))


def test_the_builder_is_deterministic() -> None:
    one, two = build_random("qwen2_vl")[0], build_random("qwen2_vl")[0]
    assert all(map(torch.equal, one.state_dict().values(), two.state_dict().values()))


def test_embedded_logits_see_positions(case: Case) -> None:
    """The slow path is no tautology: wrong positions change the logits."""
    inputs = zipped_inputs(case, METHOD)
    features = case.features(inputs, METHOD)

    def by_hand(positions: torch.Tensor) -> torch.Tensor:
        if case.model.config.model_type == "qwen3_vl":  # which needs DeepStack's features as well
            return qwen3_vl.logits(case.model, inputs, features, METHOD, positions)
        return embedded_logits(case.model, inputs, features, positions)

    right = by_hand(slow.positions(case.model, inputs, METHOD))
    plain = by_hand((inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0).expand(3, -1, -1))
    assert (right - plain).abs().max() > 1e-3
