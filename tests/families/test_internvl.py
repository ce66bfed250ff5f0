"""InternVL: crops and thumbnails, the shuffle's blocks, videos, the record, and what is refused."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, InternVLConfig, InternVLVisionConfig

from contract import embedded_logits, image, placeholders
from slow import internvl as slow
from vlmzip import Random, Uniform, UnsupportedModelError, VisionZip, compress
from vlmzip.families import family_of
from vlmzip.families.internvl import InternVL
from vlmzip.tiny.random.internvl import build

pytestmark = pytest.mark.needs_torchvision
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
IMAGE = "<IMG_CONTEXT>"
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
        expected = embedded_logits(model, inputs, slow.features(model, inputs, method))
    torch.testing.assert_close(fast, expected, **TOLERANCE)
    return inputs, last


def count(model: Any, inputs: Any) -> int:
    return int(placeholders(model, inputs["input_ids"]).sum())


# --- crops --------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [None, "grouped"])
@pytest.mark.parametrize(
    ("size", "views"),
    [((112, 112), 1), ((1, 1), 1), ((300, 300), 5), ((140, 70), 3), ((1, 700), 5), ((240, 80), 4)],
    ids=str,
)
def test_every_grid(pair: tuple[Any, Any], size: tuple[int, int], views: int, order: Any) -> None:
    model, processor = pair
    method = VisionZip(tokens=7, order=order)
    inputs, (last,) = compare(model, processor, method, IMAGE, images=image(1, *size))
    assert count(model, inputs) == 7 * views == 7 * len(inputs["pixel_values"])
    assert last.scores.shape == last.assignment.shape == (views, 16)
    assert last.grid == ((4, 4),) * views
    with compress(model, processor, method):
        sized = processor._get_num_multimodal_tokens(image_sizes=[size[::-1]], max_patches=4)
    assert sized.num_image_tokens == [7 * views + 2]


@pytest.mark.parametrize(
    ("settings", "views"),
    [
        ({"crop_to_patches": False}, 1),
        ({"max_patches": 1}, 1),
        ({"min_patches": 6, "max_patches": 6}, 7),
        ({"max_patches": 12}, 10),
    ],
    ids=str,
)
def test_settings_of_the_call(pair: tuple[Any, Any], settings: Any, views: int) -> None:
    model, processor = pair
    given = {"images": image(1, 300, 300), **settings}
    inputs, (last,) = compare(model, processor, VisionZip(tokens=5), IMAGE, **given)
    assert count(model, inputs) == 5 * views
    assert len(last.dominant) == views


@pytest.mark.parametrize(
    "method",
    [
        VisionZip(dominant=7, contextual=0),
        VisionZip(tokens=9, merge="average", order="grouped"),
        VisionZip(tokens=9, send_cls=False),
        VisionZip(tokens=1),
        VisionZip(keep=0.5),
    ],
    ids=str,
)
def test_images_and_videos_in_one_prompt(pair: tuple[Any, Any], method: VisionZip) -> None:
    """In any order; a frame of a video is an entry of the record, since the prompt has it so."""
    model, processor = pair
    given = {"images": [image(1, 140, 70), image(2, 90, 90)], "videos": [video(1, 3)]}
    text = f"{IMAGE} then <video> then {IMAGE}"
    _, last = compare(model, processor, method, text, **given)
    assert [len(one.dominant) for one in last] == [3, 1, 1, 1, 1]


@pytest.mark.parametrize("method", [Random(tokens=5), Uniform(tokens=5)], ids=str)
def test_methods_without_contextual_tokens(pair: tuple[Any, Any], method: Any) -> None:
    model, processor = pair
    with compress(model, processor, method) as zipped:
        inputs = processor(
            text=f"{IMAGE}<video>", images=image(1, 140, 70), videos=[video(1, 2)], return_tensors="pt"
        )
        model.generate(**inputs, max_new_tokens=1)
        assert [one.contextual.numel() for one in zipped.last] == [0, 0, 0]
    assert count(model, inputs) == 5 * 5


# --- what a merged token is ---------------------------------------------------------------------


@pytest.mark.parametrize("order", [None, "grouped"])
def test_keeping_every_token_is_stock(pair: tuple[Any, Any], order: Any) -> None:
    model, processor = pair
    given = {"images": image(1, 140, 70), "videos": [video(1, 2)], "return_tensors": "pt"}
    with torch.no_grad():
        stock_inputs = processor(text=f"{IMAGE}<video>", **given)
        stock = model(**stock_inputs).logits
        with compress(model, processor, VisionZip(tokens=16, order=order)):
            inputs = processor(text=f"{IMAGE}<video>", **given)
            assert torch.equal(inputs["input_ids"], stock_inputs["input_ids"])
            assert torch.equal(model(**inputs).logits, stock)


def test_a_merged_token_is_its_blocks_patches(pair: tuple[Any, Any]) -> None:
    """Which pixels reach a token of the projector: the gradient says so, not anybody's arithmetic."""
    model, processor = pair
    model.model.vision_tower.encoder.layer = torch.nn.ModuleList()  # nothing mixes patches any more
    inputs = processor(text=IMAGE, images=image(1, 90, 90), return_tensors="pt")
    pixels = inputs["pixel_values"].requires_grad_()
    tokens = model.model.get_image_features(pixels).pooler_output[0]
    for index, block in enumerate(slow.raster_blocks(8, 8, 2)):
        (gradient,) = torch.autograd.grad(tokens[index].sum(), pixels, retain_graph=True)
        touched = gradient[0].abs().sum(0).unflatten(0, (8, 14)).unflatten(2, (8, 14)).sum((1, 3))
        assert touched.flatten().nonzero()[:, 0].tolist() == sorted(block)


def test_scores_are_what_cls_pays_to_the_block(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    inputs, (last,) = compare(model, processor, VisionZip(tokens=6), IMAGE, images=image(1, 140, 70))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model.model.vision_tower(inputs["pixel_values"], output_attentions=True)
    paid_VP = out.attentions[-1][:, :, 0, 1:].mean(1)
    expected_VN = torch.nn.functional.avg_pool2d(paid_VP.view(-1, 1, 8, 8), 2).flatten(1)
    torch.testing.assert_close(last.scores, expected_VN, **TOLERANCE)
    best = expected_VN.topk(5).indices.sort().values
    assert torch.equal(last.dominant, best)


@pytest.mark.parametrize(
    "settings",
    [
        {"merge": 4},
        {"image_size": 84, "merge": 1},
        {"layer": 2},
        {"use_mean_pooling": False},
        {"patch_size": [28, 28], "image_size": 224},
    ],
    ids=str,
)
def test_other_configs(settings: dict[str, Any]) -> None:
    if "patch_size" in settings:
        model, processor = build(**settings)
        processor.image_seq_length = 16
    else:
        model, processor = build(**settings)
    given = {"images": image(1, 190, 90), "videos": [video(1, 2)]}
    compare(model, processor, VisionZip(tokens=3), f"{IMAGE}<video>", **given)


# --- the record ---------------------------------------------------------------------------------


def test_the_record_of_a_batch_with_beams(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    pictures = [image(1, 140, 70), image(2, 90, 90), image(3, 240, 80)]
    with compress(model, processor, VisionZip(tokens=6)) as zipped:
        inputs = processor(
            text=[f"{IMAGE}{IMAGE} what", IMAGE, "nothing"],
            images=pictures,
            padding=True,
            return_tensors="pt",
        )
        model.generate(**inputs, max_new_tokens=2, num_beams=3)
        assert [len(one.dominant) for one in zipped.last] == [3, 1, 4]
        beams = zipped.last
        with torch.no_grad():
            model(**inputs)
        for one, other in zip(zipped.last, beams, strict=True):
            torch.testing.assert_close(one.scores, other.scores, **TOLERANCE)
        pixels = inputs["pixel_values"]
        model.model.get_image_features(pixels)  # no prompt, nobody knows whose crops these are
        assert [len(one.dominant) for one in zipped.last] == [1] * 8


def test_features_of_an_earlier_forward(pair: tuple[Any, Any]) -> None:
    """They are given along with a prompt; what the latest encoding recorded is kept."""
    model, processor = pair
    with compress(model, processor, VisionZip(tokens=6)) as zipped, torch.no_grad():
        first = processor(text=IMAGE, images=image(1, 140, 70), return_tensors="pt")
        second = processor(text=IMAGE, images=image(2, 90, 90), return_tensors="pt")
        expected = model(**first).logits
        features = {"image": model.model.get_image_features(first["pixel_values"])}
        model(**second)
        logits = model(input_ids=first["input_ids"], mm_encoder_outputs=features).logits
        assert [len(one.dominant) for one in zipped.last] == [1]
    torch.testing.assert_close(logits, expected, **TOLERANCE)


def test_tuple_output(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    with compress(model, processor, VisionZip(tokens=6)), torch.no_grad():
        pixels = processor(text=IMAGE, images=image(1, 140, 70), return_tensors="pt")["pixel_values"]
        named = model.model.get_image_features(pixels)
        plain = model.model.get_image_features(pixels, return_dict=False)
    assert isinstance(plain, tuple)
    assert named.pooler_output.shape == (3, 6, 64)
    assert torch.equal(plain[-1], named.pooler_output)


def test_compiled(pair: tuple[Any, Any]) -> None:
    """One graph, as stock; it keeps no record."""
    model, processor = pair
    with compress(model, processor, VisionZip(tokens=6)) as zipped, torch.no_grad():
        inputs = processor(text=IMAGE, images=image(1, 140, 70), return_tensors="pt")
        expected = model(**inputs, use_cache=False).logits
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(**inputs, use_cache=False).logits, expected, **TOLERANCE)
        with pytest.raises(RuntimeError, match="compiled"):
            _ = zipped.last


# --- budgets, and what is refused -----------------------------------------------------------------


def test_the_published_layout() -> None:
    family = family_of(InternVLConfig())
    assert isinstance(family, InternVL)
    shuffled = family.shuffled
    assert (shuffled.tower.patches, shuffled.grid, shuffled.tower.block) == (1024, (16, 16), 23)
    with pytest.raises(ValueError, match="a setting of this family's processor"):
        family.attachment(VisionZip(total_tokens=640))
    with pytest.raises(ValueError, match="only 256 tokens"):
        family.attachment(VisionZip(tokens=257))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vision_feature_select_strategy": "full"}, "no square to be shuffled"),
        ({"vision_feature_layer": [-1, -2]}, "must be one layer"),
        ({"vision_feature_layer": 25}, "does not exist"),
        ({"vision_feature_layer": 0}, "is the embedding"),
        ({"downsample_ratio": 0.4}, "does not merge whole patches"),
        ({"vision_config": InternVLVisionConfig(image_size=[448, 224])}, "is not square"),
        ({"vision_config": InternVLVisionConfig(image_size=98)}, "cannot be merged in blocks of 2 x 2"),
    ],
    ids=str,
)
def test_configs_that_cannot_be_compressed(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        family_of(InternVLConfig(**settings))


def test_another_tower() -> None:
    config = InternVLConfig()
    config.vision_config = CLIPVisionConfig()
    with pytest.raises(UnsupportedModelError, match="'clip_vision_model' tower"):
        family_of(config)


def test_a_processor_of_another_model(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    small = {"height": 56, "width": 56}
    for change, message in [
        (lambda p: setattr(p, "image_seq_length", 36), "its image size, crop size"),
        (lambda p: setattr(p, "image_seq_length", 32), "image_seq_length=32 is not this model's 16"),
        (lambda p: setattr(p.image_processor, "size", small), "its image size, crop size"),
        (lambda p: setattr(p.video_processor, "size", small), "its image size, crop size"),
    ]:
        other = copy.deepcopy(processor)
        change(other)
        with pytest.raises(ValueError, match=message):
            compress(model, other, VisionZip(tokens=12))
        assert "_vlmzip" not in vars(model.model)
    model.config.image_token_id = 7
    with pytest.raises(ValueError, match="image token has id 5"):
        compress(model, processor, VisionZip(tokens=12))


def test_inputs_that_do_not_fit(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    picture = image(1, 140, 70)
    with compress(model, processor, VisionZip(tokens=6)):
        inputs = processor(text=IMAGE, images=picture, return_tensors="pt")
        with pytest.raises(ValueError, match="views of another size"):
            model(**{**inputs, "pixel_values": torch.zeros(3, 3, 56, 56)})
        with pytest.raises(ValueError, match="prompt was not made by the processor"):
            model(**{**inputs, "pixel_values": inputs["pixel_values"][:2]})
        with pytest.raises(ValueError, match="differs from -1"):
            model(**inputs, vision_feature_layer=-2)
        with pytest.raises(ValueError, match="'full' was passed"):
            model(**inputs, vision_feature_select_strategy="full")
        with pytest.raises(ValueError, match="views of \\(56, 56\\) pixels"):
            processor(text=IMAGE, images=picture, size={"height": 56, "width": 56})
        with pytest.raises(ValueError, match="1 <IMG_CONTEXT> placeholders for 2 images"):
            processor(text=IMAGE, images=[picture, picture])
        with pytest.raises(ValueError, match="2 <IMG_CONTEXT> placeholders for 1 images"):
            processor(text=IMAGE * 2, images=picture)
        with pytest.raises(ValueError, match="2 <video> placeholders for 1 videos"):
            processor(text="<video><video>", videos=[video(1, 2)])
        with pytest.raises(ValueError, match="nothing to put there"):
            processor(text=IMAGE)
        model.config.vision_feature_layer = -2
        with pytest.raises(ValueError, match="differs from -1"):
            model(**inputs)


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_every_frame_keeps_k(pair: tuple[Any, Any], frames: int) -> None:
    model, processor = pair
    videos = [video(1, frames), video(2, frames)]
    inputs, last = compare(model, processor, VisionZip(tokens=5), "<video> or <video>", videos=videos)
    assert count(model, inputs) == 5 * 2 * frames
    assert len(last) == 2 * frames


def test_processor_pickles(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    picture = image(1, 140, 70)
    with compress(model, processor, VisionZip(tokens=6)):
        twin = pickle.loads(pickle.dumps(processor))
        expected = processor(text=IMAGE, images=picture)["input_ids"]
        assert twin(text=IMAGE, images=picture)["input_ids"] == expected
