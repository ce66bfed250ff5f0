"""SmolVLM: what it has beside Idefics3, videos, and batches given row by row."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from transformers import SmolVLMConfig

from contract import embedded_logits, image, placeholders
from slow import smolvlm as slow
from vlmzip import VisionZip, compress
from vlmzip.families import family_of
from vlmzip.families.smolvlm import SmolVLM
from vlmzip.tiny.random.smolvlm import build

pytestmark = pytest.mark.needs_torchvision
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
TEXT = "USER: {}what is it? ASSISTANT:"


@pytest.fixture(scope="module")
def built() -> tuple[Any, Any]:
    return build()


@pytest.fixture
def pair(built: tuple[Any, Any]) -> tuple[Any, Any]:
    return copy.deepcopy(built)


def video(seed: int, frames: int) -> np.ndarray[Any, Any]:
    return np.stack([np.asarray(image(100 * seed + i, 110, 90)) for i in range(frames)])


def compare(model: Any, processor: Any, method: Any, texts: list[str], **given: Any) -> Any:
    """The compressed model's logits against the slow path's; returns inputs and the record."""
    texts = [TEXT.format(text) for text in texts]
    with compress(model, processor, method) as zipped, torch.no_grad():
        inputs = processor(text=texts, return_tensors="pt", padding=True, **given)
        fast = model(**inputs).logits
        last = zipped.last
    with torch.no_grad():
        expected = embedded_logits(model, inputs, slow.features(model, inputs, method))
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(fast[real], expected[real], **TOLERANCE)
    return inputs, last


@pytest.mark.parametrize("method", [VisionZip(tokens=5), VisionZip(keep=0.5, merge="average")], ids=str)
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_every_frame_keeps_k(pair: tuple[Any, Any], frames: int, method: VisionZip) -> None:
    model, processor = pair
    inputs, last = compare(model, processor, method, ["<video>"], videos=[[video(1, frames)]])
    k = method.budget.count(16)
    assert int(placeholders(model, inputs["input_ids"]).sum()) == k * frames
    assert [len(one.dominant) for one in last] == [1] * frames


def test_videos_of_different_length(pair: tuple[Any, Any]) -> None:
    """The shorter one is filled up with frames that the model drops."""
    model, processor = pair
    videos = [[video(1, 2)], [video(2, 4)]]
    inputs, last = compare(
        model, processor, VisionZip(tokens=6), ["<video>", "<video> or"], videos=videos
    )
    assert inputs["pixel_values"].shape[:2] == (2, 4)
    assert placeholders(model, inputs["input_ids"]).sum(1).tolist() == [12, 24]
    assert len(last) == 6


def test_the_text_between_frames_stays(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    given = {"text": ["<video>"], "videos": [[video(1, 3)]], "return_tensors": "pt"}
    stock = processor(**given)["input_ids"][0].tolist()
    with compress(model, processor, VisionZip(tokens=5)):
        ids = processor(**given)["input_ids"][0].tolist()
    token = processor.image_token_id
    assert [other for other in ids if other != token] == [other for other in stock if other != token]


@pytest.mark.parametrize("order", [None, "grouped"])
def test_keeping_every_token_is_stock(pair: tuple[Any, Any], order: Any) -> None:
    model, processor = pair
    images = {"images": [[image(1, 190, 90), image(2, 90, 90)]], "text": ["<image><image>"]}
    for given in ({"videos": [[video(1, 2)]], "text": ["<video>"]}, images):
        with torch.no_grad():
            stock_inputs = processor(**given, return_tensors="pt")
            stock = model(**stock_inputs).logits
            with compress(model, processor, VisionZip(tokens=16, order=order)):
                inputs = processor(**given, return_tensors="pt")
                assert torch.equal(inputs["input_ids"], stock_inputs["input_ids"])
                assert torch.equal(model(**inputs).logits, stock)


def test_a_batch_of_rows(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    rows = [[image(1, 190, 90), image(2, 90, 90)], [image(3, 90, 190)], []]
    _, last = compare(
        model, processor, VisionZip(tokens=6), ["<image><image>", "<image>", ""], images=rows
    )
    assert [len(one.dominant) for one in last] == [3, 5, 3]


@pytest.mark.parametrize("settings", [{"image_size": 126, "merge": 3}, {"image_size": 120}], ids=str)
def test_other_configs(settings: dict[str, Any]) -> None:
    model, processor = build(**settings)
    compare(model, processor, VisionZip(tokens=3), ["<image>"], images=[[image(1, 190, 90)]])
    compare(model, processor, VisionZip(tokens=3), ["<video>"], videos=[[video(1, 2)]])


@pytest.mark.parametrize(
    ("vision", "scale", "tokens"),
    [
        ({"image_size": 384, "patch_size": 14}, 3, 81),
        ({"image_size": 512, "patch_size": 16}, 4, 64),
    ],
    ids=str,
)
def test_published_layouts(vision: dict[str, int], scale: int, tokens: int) -> None:
    family = family_of(SmolVLMConfig(vision_config=vision, scale_factor=scale))
    assert isinstance(family, SmolVLM)
    assert family.shuffled.tokens == tokens
    with pytest.raises(ValueError, match="a setting of this family's processor"):
        family.attachment(VisionZip(total_tokens=64))


def test_a_processor_of_another_model(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    small = {"longest_edge": 56}
    for change, message in [
        (lambda p: setattr(p, "image_seq_len", 32), "image_seq_len=32 is not this model's 16"),
        (lambda p: setattr(p.image_processor, "max_image_size", small), "its image size"),
        (lambda p: setattr(p.video_processor, "max_image_size", small), "its image size"),
    ]:
        other = copy.deepcopy(processor)
        change(other)
        with pytest.raises(ValueError, match=message):
            compress(model, other, VisionZip(tokens=12))


def test_inputs_that_do_not_fit(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    picture = image(1, 190, 90)
    with compress(model, processor, VisionZip(tokens=6)):
        inputs = processor(text=["<image>"], images=[[picture]], return_tensors="pt")
        pixels = inputs["pixel_values"]
        for given in (pixels[:, :2], torch.cat([pixels, pixels])):
            with pytest.raises(ValueError, match="prompt was not made by the processor"):
                model(input_ids=inputs["input_ids"], pixel_values=given)
        with pytest.raises(ValueError, match="2 <video> placeholders for 1 videos"):
            processor(text=["<video><video>"], videos=[[video(1, 2)]], return_tensors="pt")
        with pytest.raises(ValueError, match="nothing to put there"):
            processor(text=["<video>"])
        with pytest.raises(ValueError, match="nothing to put there"):
            processor(text=["<image>"])
        both = processor(
            text=["<image><video>"], images=[[picture]], videos=[[video(1, 2)]], return_tensors="pt"
        )
        with pytest.raises(ValueError, match="it hands on the videos' pixels only"):
            model(**both)


def test_processor_pickles(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    given = {"text": ["<video>"], "videos": [[video(1, 2)]], "return_tensors": "pt"}
    with compress(model, processor, VisionZip(tokens=6)):
        twin = pickle.loads(pickle.dumps(processor))
        assert torch.equal(twin(**given)["input_ids"], processor(**given)["input_ids"])
