"""Video-LLaVA: videos, images and videos in one prompt, budgets a frame, and what is refused."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from contract import image
from slow import video_llava as slow
from vlmzip import Random, VisionZip, compress
from vlmzip.tiny.random import build as build_random
from vlmzip.tiny.random.video_llava import build

pytestmark = pytest.mark.needs_torchvision


@pytest.fixture(scope="module")
def small() -> tuple[Any, Any]:
    return build(image_size=112)


def by_hand(model: Any, inputs: Any, features: list[Tensor]) -> Tensor:
    """Logits of the stock model with the features written over the placeholders' embeddings."""
    ids = inputs["input_ids"]
    embeds = model.get_input_embeddings()(ids).clone()
    places = (ids == model.config.image_token_index) | (ids == model.config.video_token_index)
    rows = torch.cat(features).to(embeds.dtype)
    assert int(places.sum()) == len(rows), "a placeholder for each kept token"
    embeds[places] = rows
    return model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits


def compare(model: Any, processor: Any, method: VisionZip, **given: Any) -> Any:
    """The compressed model's logits against the slow path's; returns inputs and the record."""
    with compress(model, processor, method) as zipped:
        inputs = processor(padding=True, return_tensors="pt", **given)
        with torch.no_grad():
            fast = model(**inputs).logits
        last = zipped.last
    with torch.no_grad():
        expected = by_hand(model, inputs, slow.features(model, inputs, method))
    valid = inputs["attention_mask"].bool()
    torch.testing.assert_close(fast[valid], expected[valid], rtol=1e-4, atol=1e-5)
    return inputs, last


def test_eight_frames_keep_17_each_in_the_paper_s_budget() -> None:
    model, processor = build_random("video_llava")
    full = processor(videos=[slow.video(1, 8)], text=["<video>"], return_tensors="pt")
    assert int((full["input_ids"] == model.config.video_token_id).sum()) == 8 * 257
    with compress(model, processor, VisionZip(tokens=17)) as zipped:
        inputs = processor(videos=[slow.video(1, 8)], text=["<video>"], return_tensors="pt")
        model.generate(**inputs, max_new_tokens=1)
        (last,) = zipped.last
    assert int((inputs["input_ids"] == model.config.video_token_id).sum()) == 136
    assert last.dominant.shape == (8, 14)
    assert last.contextual.shape == (8, 3)
    assert last.scores.shape == last.assignment.shape == (8, 257)
    assert last.grid == ((16, 16),) * 8
    assert (last.dominant[:, 0] == 0).all(), "the CLS token of every frame is sent on"


@pytest.mark.parametrize("frames", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "method",
    [
        VisionZip(tokens=17),
        VisionZip(keep=0.2, merge="average"),
        VisionZip(dominant=7, contextual=0),
        VisionZip(tokens=9, order="raster", send_cls=False),
        VisionZip(tokens=65),
    ],
    ids=str,
)
def test_a_video_of_any_number_of_frames_is_what_the_slow_path_says(
    small: tuple[Any, Any], frames: int, method: VisionZip
) -> None:
    inputs, (last,) = compare(*small, method, videos=[slow.video(2, frames)], text=["see <video> so"])
    assert inputs["pixel_values_videos"].shape[1] == frames
    assert len(last.dominant) == frames


@pytest.mark.parametrize(
    ("text", "order"),
    [
        (["<image> and <video> now"], "iv"),
        (["<video> and <image> now"], "vi"),
        (["<image><video><image> x", "y <video>"], "iviv"),
        (["<video>", "<image>", "none", "<video> <image>"], "vivi"),
    ],
    ids=str,
)
def test_mixed_prompts_get_their_features_and_their_record_in_order(
    small: tuple[Any, Any], text: list[str], order: str
) -> None:
    images = [image(i, 50 + 20 * i, 64) for i in range(order.count("i"))]
    videos = [slow.video(i, 3) for i in range(order.count("v"))]
    _, last = compare(*small, VisionZip(tokens=17), images=images, videos=videos, text=text)
    assert [len(entry.dominant) for entry in last] == [{"i": 1, "v": 3}[kind] for kind in order]
    # Each entry is of its own image or video, not only of its kind.
    model, processor = small
    with compress(model, processor, VisionZip(tokens=17)) as zipped:
        for entry, kind in zip(last, order, strict=True):
            own = {"images": [images.pop(0)]} if kind == "i" else {"videos": [videos.pop(0)]}
            token = "<image>" if kind == "i" else "<video>"
            with torch.no_grad():
                model(**processor(text=[token], return_tensors="pt", **own))
            torch.testing.assert_close(zipped.last[0].scores, entry.scores)
            assert torch.equal(zipped.last[0].dominant, entry.dominant)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}]
)
def test_generating_from_a_mixed_batch_records_each_image_once(
    small: tuple[Any, Any], options: dict[str, Any]
) -> None:
    model, processor = small
    with compress(model, processor, VisionZip(tokens=17)) as zipped:
        inputs = processor(
            images=[image(1), image(2)],
            videos=[slow.video(1, 2)],
            text=["<video> then <image>", "<image>"],
            padding=True,
            return_tensors="pt",
        )
        model.generate(**inputs, max_new_tokens=2, **options)
        assert [len(entry.dominant) for entry in zipped.last] == [2, 1, 1]


def test_a_later_forward_without_videos_reports_its_images_only(small: tuple[Any, Any]) -> None:
    model, processor = small
    with compress(model, processor, VisionZip(tokens=17)) as zipped, torch.no_grad():
        model(
            **processor(
                images=[image(1)], videos=[slow.video(1, 2)], text=["<video><image>"], return_tensors="pt"
            )
        )
        assert len(zipped.last) == 2
        model(**processor(images=[image(2)] * 3, text=["<image>" * 3], return_tensors="pt"))
        assert [len(entry.dominant) for entry in zipped.last] == [1, 1, 1]
        model(**processor(videos=[slow.video(3, 4)], text=["<video>"], return_tensors="pt"))
        assert [len(entry.dominant) for entry in zipped.last] == [4]


def test_generate_equals_greedy_decoding_by_hand(small: tuple[Any, Any]) -> None:
    model, processor = small
    method = VisionZip(tokens=17)
    given = {"images": [image(5)], "videos": [slow.video(5, 3)], "text": ["<video> or <image>?"]}
    with compress(model, processor, method):
        inputs = processor(return_tensors="pt", **given)
        out = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=-1)
    features = slow.features(model, inputs, method)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for _ in range(5):
        with torch.no_grad():
            logits = by_hand(model, {"input_ids": ids, "attention_mask": mask}, features)
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        mask = torch.ones_like(ids)
    assert torch.equal(out, ids)


def test_both_towers_are_tapped_and_given_back(small: tuple[Any, Any]) -> None:
    model, processor = small
    given = {"images": [image(1)], "videos": [slow.video(1, 3)], "text": ["<image> <video>"]}
    inputs = processor(return_tensors="pt", **given)
    with torch.no_grad():
        before = model(**inputs).logits
        zipped = compress(model, processor, VisionZip(tokens=17))
        for tower in (model.model.image_tower, model.model.video_tower):
            assert "_vlmzip_tap" in vars(tower.encoder.layers[-2].self_attn)
        model(**processor(return_tensors="pt", **given))
        zipped.remove()
        after = model(**inputs).logits
    assert torch.equal(before, after)
    for module in model.modules():
        assert not [name for name in vars(module) if name.startswith("_vlmzip")]


def test_features_of_images_and_videos_without_a_processor(small: tuple[Any, Any]) -> None:
    model, processor = small
    inputs = processor(
        images=[image(1)] * 2, videos=[slow.video(1, 3)] * 2, text=["<image><image><video><video>"]
    )
    with compress(model, None, VisionZip(tokens=17)) as zipped:
        images = model.get_image_features(inputs["pixel_values_images"]).pooler_output
        assert images.shape == (2, 17, 64)
        assert [len(entry.dominant) for entry in zipped.last] == [1, 1]
        videos = model.model.get_video_features(inputs["pixel_values_videos"]).pooler_output
        assert videos.shape == (6, 17, 64)
        assert [len(entry.dominant) for entry in zipped.last] == [3, 3]


@torch.no_grad()
def test_features_joined_from_several_calls_after_a_mixed_prompt(small: tuple[Any, Any]) -> None:
    """What an earlier forward recorded must not be taken for the record of these features."""
    model, processor = small
    with compress(model, processor, VisionZip(tokens=5)):
        mixed = processor(
            images=[image(9)], videos=[slow.video(1, 2)], text=["<image> <video>"], return_tensors="pt"
        )
        model(**mixed)
        inputs = processor(
            images=[image(1), image(2)],
            text=["hi", "<image> b <image>"],
            padding=True,
            return_tensors="pt",
        )
        pixels = inputs.pop("pixel_values_images")
        one, two = (model.model.get_image_features(pixels[i : i + 1]) for i in range(2))
        one.pooler_output = torch.cat([one.pooler_output, two.pooler_output])
        logits = model(**inputs, mm_encoder_outputs={"image": one}).logits
    assert logits.isfinite().all()


def test_gradients_reach_both_towers_through_the_kept_tokens(small: tuple[Any, Any]) -> None:
    model, processor = copy.deepcopy(small)
    with compress(model, processor, VisionZip(tokens=17)):
        inputs = processor(
            images=[image(1)],
            videos=[slow.video(1, 3)],
            text=["<image> <video> yes"],
            return_tensors="pt",
        )
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for tower in (model.model.image_tower, model.model.video_tower):
        assert tower.embeddings.patch_embedding.weight.grad.abs().sum() > 0


def test_a_compressed_processor_pickles_with_its_video_part(small: tuple[Any, Any]) -> None:
    model, processor = small
    with compress(model, processor, VisionZip(tokens=17)):
        other = pickle.loads(pickle.dumps(processor))
        given = {"videos": [slow.video(1, 3)], "text": ["<video>"], "return_tensors": "pt"}
        assert torch.equal(other(**given)["input_ids"], processor(**given)["input_ids"])


def test_other_methods_compress_frames_too(small: tuple[Any, Any]) -> None:
    model, processor = small
    with compress(model, processor, Random(tokens=5)) as zipped:
        inputs = processor(videos=[slow.video(1, 3)], text=["<video>"], return_tensors="pt")
        model.generate(**inputs, max_new_tokens=1)
        assert zipped.last[0].dominant.shape == (3, 5)
