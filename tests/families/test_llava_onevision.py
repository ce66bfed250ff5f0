"""LLaVA-OneVision: grids up to the shrunken ones, several images, videos, and what is refused."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionConfig, LlavaOnevisionConfig

from contract import embedded_logits, image, placeholders
from slow import llava_onevision as slow
from vlmzip import Random, Uniform, UnsupportedModelError, VisionZip, compress
from vlmzip.families import family_of
from vlmzip.families.llava_onevision import LlavaOnevision
from vlmzip.tiny.random.llava_onevision import build

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


def compare(model: Any, processor: Any, method: Any, text: str, **given: Any) -> Any:
    """The compressed model's logits against the slow path's; returns inputs and the record."""
    with compress(model, processor, method) as zipped, torch.no_grad():
        inputs = processor(text=TEXT.format(text), return_tensors="pt", **given)
        fast = model(**inputs).logits
        last = zipped.last
    with torch.no_grad():
        expected = spread(model, inputs, slow.features(model, inputs, method))
    torch.testing.assert_close(fast, expected, **TOLERANCE)
    return inputs, last


def spread(model: Any, inputs: Any, features: list[Tensor]) -> Tensor:
    """Logits, with features (images, then videos) written to the placeholders of their kind."""
    ids, images = inputs["input_ids"], len(inputs.get("image_sizes", ()))
    order = torch.cat(
        [kind.nonzero() for kind in (ids == model.config.image_token_id, videos(model, ids))]
    )
    rows = torch.cat(features)
    assert len(order) == len(rows), f"{len(order)} placeholders, {len(rows)} features"
    assert int((ids == model.config.image_token_id).sum()) == sum(len(f) for f in features[:images])
    place = (order[:, 0] * ids.shape[1] + order[:, 1]).argsort()
    return embedded_logits(model, inputs, [rows[place]])


def videos(model: Any, ids: Tensor) -> Tensor:
    return ids == model.config.video_token_id


# --- images -------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [None, "grouped"])
@pytest.mark.parametrize(
    ("size", "crops"),
    [
        ((90, 90), 1),
        ((190, 90), 2),
        ((98, 290), 3),
        ((1, 1), 1),
        ((700, 1), 1),
        ((590, 20), 6),
        ((390, 290), 12),
    ],
    ids=str,
)
def test_every_grid(pair: tuple[Any, Any], size: tuple[int, int], crops: int, order: Any) -> None:
    model, processor = pair
    method = VisionZip(tokens=11, order=order)
    inputs, (last,) = compare(model, processor, method, "<image>", images=image(1, *size))
    assert int(placeholders(model, inputs["input_ids"]).sum()) == 11 * (1 + crops)
    assert last.scores.shape == last.assignment.shape == (1 + crops, 49)
    assert last.grid == ((7, 7),) * (1 + crops)
    with compress(model, processor, method):
        sized = processor._get_num_multimodal_tokens(image_sizes=[size[::-1]])
    assert sized.num_image_tokens == [11 * (1 + crops)]


def test_an_image_that_stock_shrinks(pair: tuple[Any, Any]) -> None:
    """16 crops are more than the 9 that anyres_max_9 lets through; every one of them keeps K."""
    model, processor = pair
    picture = image(1, 390, 390)
    stock = processor(text="<image>", images=picture, return_tensors="pt")
    assert int(placeholders(model, stock["input_ids"]).sum()) < 17 * 49
    inputs, (last,) = compare(model, processor, VisionZip(tokens=10), "<image>", images=picture)
    assert len(last.dominant) == 17
    assert int(placeholders(model, inputs["input_ids"]).sum()) == 170


def test_raster_order_is_the_whole_images(pair: tuple[Any, Any]) -> None:
    """At K = N the tokens come as the base view and then row by row of the crops laid side by side."""
    model, processor = pair
    with compress(model, processor, VisionZip(tokens=49)), torch.no_grad():
        inputs = processor(text="<image>", images=image(1, 190, 90), return_tensors="pt")
        (found,) = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output
    with torch.no_grad():
        states = model.model.vision_tower(inputs["pixel_values"][0], output_hidden_states=True)
        tokens = model.model.multi_modal_projector(states.hidden_states[-1]).view(3, 7, 7, -1)
    rows = torch.cat([tokens[1], tokens[2]], 1).flatten(0, 1)
    torch.testing.assert_close(found, torch.cat([tokens[0].flatten(0, 1), rows]), **TOLERANCE)


@pytest.mark.parametrize(
    "method",
    [
        VisionZip(tokens=10),
        VisionZip(dominant=7, contextual=0),
        VisionZip(tokens=9, merge="average", order="grouped"),
        VisionZip(tokens=1),
        VisionZip(total_tokens=37 * 5),
        VisionZip(tokens=30),
        VisionZip(keep=0.5),
    ],
    ids=str,
)
def test_images_and_a_video_in_one_prompt(pair: tuple[Any, Any], method: VisionZip) -> None:
    """In any order; the record follows the prompt."""
    model, processor = pair
    pictures = [image(1, 190, 90), image(2, 90, 90)]
    given = {"images": pictures, "videos": [video(1, 3)]}
    inputs, last = compare(model, processor, method, "<image> then <video> then <image>", **given)
    assert [len(one.dominant) for one in last] == [3, 3, 2]
    assert [one.grid[0] for one in last] == [(7, 7), (4, 4), (7, 7)]
    counts = [one.dominant.numel() + one.contextual.numel() for one in last]
    assert int(videos(model, inputs["input_ids"]).sum()) == counts[1]


def test_images_that_share_a_prompt_are_one_view_each(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    pictures = [image(1, 190, 90), image(2, 90, 90), image(3, 150, 150)]
    with compress(model, processor, VisionZip(tokens=12)) as zipped, torch.no_grad():
        inputs = processor(
            text=["<image> a <image>", "<image>"],
            images=[pictures[:2], pictures[2:]],
            padding=True,
            return_tensors="pt",
        )
        fast = model(**inputs).logits
        last = zipped.last
    assert [len(one.dominant) for one in last] == [1, 1, 5]
    assert (placeholders(model, inputs["input_ids"]).sum(1)).tolist() == [24, 60]
    with torch.no_grad():
        expected = embedded_logits(model, inputs, slow.features(model, inputs, VisionZip(tokens=12)))
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(fast[real], expected[real], **TOLERANCE)
    with compress(model, processor, VisionZip(tokens=12)):
        out = model.generate(
            **inputs,
            max_new_tokens=2,
            min_new_tokens=2,
            output_logits=True,
            return_dict_in_generate=True,
            do_sample=False,
        )
    torch.testing.assert_close(out.logits[0], expected[:, -1], **TOLERANCE)


@pytest.mark.parametrize("method", [Random(tokens=11), Uniform(tokens=11)], ids=str)
def test_methods_without_contextual_tokens(pair: tuple[Any, Any], method: Any) -> None:
    model, processor = pair
    with compress(model, processor, method) as zipped:
        inputs = processor(
            text="<image><video>", images=image(1), videos=[video(1, 2)], return_tensors="pt"
        )
        model.generate(**inputs, max_new_tokens=1)
        assert [one.contextual.numel() for one in zipped.last] == [0, 0]
    wanted = 11 * (len(zipped_views(model, inputs)) + 2)
    assert int(placeholders(model, inputs["input_ids"]).sum()) == wanted


def zipped_views(model: Any, inputs: Any) -> range:
    (height, width) = inputs["image_sizes"][0].tolist()
    rows, columns = slow.crop_grid(model.config, height, width)
    return range(1 + rows * columns)


# --- videos -------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("tokens", [1, 6, 15, 16, 40])
def test_every_frame_keeps_k(pair: tuple[Any, Any], frames: int, tokens: int) -> None:
    """A frame has 16 tokens after the pooling, and keeps all of them if the budget is larger."""
    model, processor = pair
    method = VisionZip(tokens=tokens)
    inputs, (last,) = compare(model, processor, method, "<video>", videos=[video(1, frames)])
    assert int(videos(model, inputs["input_ids"]).sum()) == min(tokens, 16) * frames
    assert last.scores.shape == last.assignment.shape == (frames, 16)
    assert last.grid == ((4, 4),) * frames


def test_two_videos(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    method = VisionZip(tokens=6)
    _, last = compare(model, processor, method, "<video><video>", videos=[video(1, 3), video(2, 3)])
    assert [len(one.dominant) for one in last] == [3, 3]
    assert not torch.equal(last[0].scores, last[1].scores)


def test_pooled_scores_are_what_frames_are_chosen_by(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    with compress(model, processor, VisionZip(tokens=6)) as zipped, torch.no_grad():
        inputs = processor(text="<video>", videos=[video(1, 2)], return_tensors="pt")
        model(**inputs)
        (last,) = zipped.last
    for pixels, found in zip(inputs["pixel_values_videos"][0], last.scores, strict=True):
        _, attention, _ = slow.read(model, pixels)
        expected = slow.pool(attention.mean((0, 1))[:, None])[:, 0]
        torch.testing.assert_close(found, expected, **TOLERANCE)


def test_tuple_output(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    with compress(model, processor, VisionZip(tokens=6)), torch.no_grad():
        pixels = processor(text="<video>", videos=[video(1, 2)], return_tensors="pt")
        given = pixels["pixel_values_videos"]
        named = model.model.get_video_features(given)
        plain = model.model.get_video_features(given, return_dict=False)
    assert isinstance(plain, tuple)
    assert named.pooler_output.shape == (1, 12, 64)
    assert torch.equal(plain[-1], named.pooler_output)


def test_a_copy_pools_by_itself(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    zipped = compress(model, processor, VisionZip(tokens=6))
    inputs = processor(text="<video>", videos=[video(1, 2)], return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits
        twin = copy.deepcopy(model)
        zipped.remove()
        assert torch.equal(twin(**inputs).logits, expected)


def test_pooling_outside_a_forward_is_stock(pair: tuple[Any, Any]) -> None:
    model, _ = pair
    tokens = torch.randn(2, 49, 64)
    expected = model.model.apply_pooling(tokens)
    with compress(model, None, VisionZip(tokens=6)):
        assert torch.equal(model.model.apply_pooling(tokens), expected)


# --- budgets, and what is refused -----------------------------------------------------------------


def test_the_published_layout() -> None:
    family = family_of(LlavaOnevisionConfig())
    assert isinstance(family, LlavaOnevision)
    assert (family.tower.patches, family.anyres.most_views, family.frame_grid) == (729, 37, (14, 14))
    assert family.sized_image_tokens(VisionZip(total_tokens=640), 0, (384, 384)) == 2 * 17
    with pytest.raises(ValueError, match=r"up to 37 views.*total_tokens=2368 or tokens=64"):
        family.attachment(VisionZip(tokens=2368))
    with pytest.raises(ValueError, match="only 729 tokens"):
        family.attachment(VisionZip(tokens=730))


def test_configs_that_cannot_be_compressed() -> None:
    clip = CLIPVisionConfig(image_size=384, patch_size=16)
    with pytest.raises(UnsupportedModelError, match="no place for a CLS token"):
        family_of(LlavaOnevisionConfig(vision_config=clip))
    with pytest.raises(UnsupportedModelError, match="an image patch would be lost"):
        family_of(LlavaOnevisionConfig(vision_feature_select_strategy="default"))


@pytest.mark.parametrize("layer", [-2, 3])
def test_other_layers(layer: int) -> None:
    model, processor = build()
    config = copy.deepcopy(model.config)
    config.vision_feature_layer = layer
    torch.manual_seed(0)
    model = type(model)(config).eval()
    given = {"images": image(1, 190, 90), "videos": [video(1, 2)]}
    compare(model, processor, VisionZip(tokens=12), "<image><video>", **given)


def test_a_processor_of_another_model(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    for change, message in [
        (lambda p: setattr(p, "num_image_tokens", 36), "its patch size, image size"),
        (lambda p: setattr(p, "video_token_id", 5), "video token has id 5"),
        (lambda p: setattr(p.video_processor, "size", {"height": 56, "width": 56}), "its video size"),
        (lambda p: setattr(p.image_processor, "image_grid_pinpoints", [[98, 98]]), "are not the model"),
    ]:
        other = copy.deepcopy(processor)
        change(other)
        with pytest.raises(ValueError, match=message):
            compress(model, other, VisionZip(tokens=12))


def test_inputs_that_do_not_fit(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    with compress(model, processor, VisionZip(tokens=12)):
        inputs = processor(text="<image>", images=image(1, 190, 90), return_tensors="pt")
        with pytest.raises(ValueError, match=r"batch_num_images \[2\] counts 2 images"):
            model(**{**inputs, "batch_num_images": torch.tensor([2])})
        with pytest.raises(ValueError, match="image_sizes is missing"):
            model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])
        with pytest.raises(ValueError, match="differs from -1"):
            model(**inputs, vision_feature_layer=-2)
        with pytest.raises(ValueError, match="nothing to put there"):
            processor(text="<video>")
        with pytest.raises(ValueError, match="2 <video> placeholders for 1 videos"):
            processor(text="<video><video>", videos=[video(1, 2)])


def test_processor_pickles(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    picture: Image.Image = image(1, 190, 90)
    with compress(model, processor, VisionZip(tokens=12)):
        twin = pickle.loads(pickle.dumps(processor))
        expected = processor(text="<image>", images=picture)["input_ids"]
        assert twin(text="<image>", images=picture)["input_ids"] == expected
