"""LLaVA-NeXT-Video: pooled frames, images and videos in one prompt, and what is refused."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlavaNextVideoConfig

from contract import embedded_logits, image, placeholders
from slow import llava_next_video as slow
from slow.llava_next import read
from vlmzip import Random, VisionZip, compress
from vlmzip.families import family_of
from vlmzip.families.llava_next_video import LlavaNextVideo
from vlmzip.tiny.random.llava_next_video import build

pytestmark = pytest.mark.needs_torchvision
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def built() -> tuple[Any, Any]:
    return build()


@pytest.fixture
def pair(built: tuple[Any, Any]) -> tuple[Any, Any]:
    return copy.deepcopy(built)


def video(seed: int, frames: int) -> np.ndarray[Any, Any]:
    return np.stack([np.asarray(image(100 * seed + i, 110, 90)) for i in range(frames)])


def compare(model: Any, processor: Any, method: Any, text: str, **given: Any) -> Any:
    """The compressed model's logits against the slow path's; returns inputs and the record."""
    with compress(model, processor, method) as zipped, torch.no_grad():
        inputs = processor(text=f"USER: {text} ASSISTANT:", **given)
        fast = model(**inputs).logits
        last = zipped.last
    with torch.no_grad():
        features = slow.features(model, inputs, method)
        # Images first, then videos; the prompts here say "<image>" before "<video>".
        expected = embedded_logits(model, inputs, features)
    torch.testing.assert_close(fast, expected, **TOLERANCE)
    return inputs, last


def videos(model: Any, inputs: Any) -> int:
    return int((inputs["input_ids"] == model.config.video_token_id).sum())


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("tokens", [1, 6, 15, 16, 40])
def test_every_frame_keeps_k(pair: tuple[Any, Any], frames: int, tokens: int) -> None:
    """A frame has 16 tokens after the pooling, and keeps all of them if the budget is larger."""
    model, processor = pair
    method = VisionZip(tokens=tokens)
    inputs, (last,) = compare(model, processor, method, "<video>", videos=[video(1, frames)])
    assert videos(model, inputs) == min(tokens, 16) * frames
    assert last.scores.shape == last.assignment.shape == (frames, 16)
    assert last.grid == ((4, 4),) * frames


@pytest.mark.parametrize(
    "method",
    [
        VisionZip(tokens=10),
        VisionZip(tokens=10, send_cls=False),
        VisionZip(dominant=7, contextual=0),
        VisionZip(tokens=9, merge="average", order="raster"),
        VisionZip(total_tokens=25),
        VisionZip(keep=0.5),
    ],
    ids=str,
)
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_an_image_and_videos_in_one_prompt(tower: Any, method: VisionZip) -> None:
    model, processor = build(tower=tower)
    given = {"images": [image(1, 200, 100)], "videos": [video(1, 2), video(2, 2)]}
    _, last = compare(model, processor, method, "<image> then <video> <video>", **given)
    assert [len(one.dominant) for one in last] == [3, 2, 2]
    assert [one.grid[0] for one in last] == [(8, 8), (4, 4), (4, 4)]


def test_the_record_follows_the_prompt(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    with compress(model, processor, VisionZip(tokens=6)) as zipped:
        given = {"images": [image(1, 200, 100)], "videos": [video(1, 2)]}
        model.generate(**processor(text="<video> <image>", **given), max_new_tokens=1)
        assert [one.grid[0] for one in zipped.last] == [(4, 4), (8, 8)]


@pytest.mark.parametrize("pooling", ["max", "conv"])
def test_other_poolings(pooling: str) -> None:
    compare(*build(pooling=pooling), VisionZip(tokens=6), "<video>", videos=[video(1, 2)])


def test_pooled_scores_are_what_frames_are_chosen_by(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    with compress(model, processor, VisionZip(tokens=6)) as zipped, torch.no_grad():
        inputs = processor(text="<video>", videos=[video(1, 2)])
        model(**inputs)
        (last,) = zipped.last
    for pixels, found in zip(inputs["pixel_values_videos"][0], last.scores, strict=True):
        _, attention, _ = read(model, pixels)
        expected = slow.pool(attention[:, 0, 1:].mean(0)[:, None], model.config)[:, 0]
        torch.testing.assert_close(found, expected, **TOLERANCE)


def test_random_tokens(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    with compress(model, processor, Random(tokens=5)):
        inputs = processor(text="<image><video>", images=image(1, 200, 100), videos=[video(1, 2)])
        assert int(placeholders(model, inputs["input_ids"]).sum()) == 5 * (3 + 2)
        model.generate(**inputs, max_new_tokens=1)


def test_a_copy_pools_by_itself(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    zipped = compress(model, processor, VisionZip(tokens=6))
    inputs = processor(text="<video>", videos=[video(1, 2)])
    with torch.no_grad():
        expected = model(**inputs).logits
        twin = copy.deepcopy(model)
        zipped.remove()
        assert torch.equal(twin(**inputs).logits, expected)


def test_pooling_outside_a_forward_is_stock(pair: tuple[Any, Any]) -> None:
    model, _ = pair
    tokens = torch.randn(2, 64, 64)
    expected = model.model.vision_resampler(tokens)
    with compress(model, None, VisionZip(tokens=6)):
        assert torch.equal(model.model.vision_resampler(tokens), expected)


def test_the_published_layout() -> None:
    family = family_of(LlavaNextVideoConfig())
    assert isinstance(family, LlavaNextVideo)
    assert (family.tower.patches, family.anyres.most_views, family.frame_grid) == (576, 5, (12, 12))
    with pytest.raises(ValueError, match=r"up to 5 views.*total_tokens=640 or tokens=128"):
        family.attachment(VisionZip(dominant=540, contextual=100))


def test_what_does_not_fit(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    other = copy.deepcopy(processor)
    other.video_token_id = 5
    with pytest.raises(ValueError, match="video token has id 5"):
        compress(model, other, VisionZip(tokens=12))
    other = copy.deepcopy(processor)
    other.video_processor.crop_size = {"height": 56, "width": 56}
    with pytest.raises(ValueError, match="its video size or patch size is another model's"):
        compress(model, other, VisionZip(tokens=12))
    with compress(model, processor, VisionZip(tokens=12)):
        with pytest.raises(ValueError, match="nothing to put there"):
            processor(text="<video>")
        with pytest.raises(ValueError, match="2 <video> placeholders for 1 videos"):
            processor(text="<video><video>", videos=[video(1, 2)])
        inputs = processor(text="<video>", videos=[video(1, 2)])
        with pytest.raises(ValueError, match="leave the argument out"):
            model(**inputs, vision_feature_select_strategy="full")
        with pytest.raises(ValueError, match="differs from -2"):
            model(**inputs, vision_feature_layer=-1)
