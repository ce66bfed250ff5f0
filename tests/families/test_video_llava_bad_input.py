"""Video-LLaVA: prompts, processors, budgets and configurations that are refused, and why."""

import copy
from typing import Any

import pytest

from contract import image
from slow import video_llava as slow
from vlmzip import UnsupportedModelError, VisionZip, compress
from vlmzip.families import family_of
from vlmzip.tiny.random.video_llava import build

pytestmark = pytest.mark.needs_torchvision


@pytest.fixture(scope="module")
def small() -> tuple[Any, Any]:
    return build(image_size=112)


@pytest.mark.parametrize(
    ("given", "text", "message"),
    [
        ({"videos": 1}, "no placeholder", "0 <video> placeholders for 1 videos"),
        ({"videos": 1}, "<video><video>", "2 <video> placeholders for 1 videos"),
        ({"videos": 2}, "<video>", "1 <video> placeholders for 2 videos"),
        ({"images": 1}, "<image> <video>", "1 <video> placeholders and nothing to put there"),
        ({"videos": 1}, "<image> <video>", "1 <image> placeholders and nothing to put there"),
        ({"images": 1, "videos": 1}, "<video>", "0 <image> placeholders for 1 images"),
    ],
    ids=str,
)
def test_placeholders_and_inputs_that_are_not_as_many(
    small: tuple[Any, Any], given: dict[str, int], text: str, message: str
) -> None:
    model, processor = small
    inputs: dict[str, Any] = {}
    if "images" in given:
        inputs["images"] = [image(i) for i in range(given["images"])]
    if "videos" in given:
        inputs["videos"] = [slow.video(i, 2) for i in range(given["videos"])]
    with compress(model, processor, VisionZip(tokens=17)), pytest.raises(ValueError, match=message):
        processor(text=[text], **inputs)


def test_text_and_expanded_prompts_pass_without_pixels(small: tuple[Any, Any]) -> None:
    model, processor = small
    with compress(model, processor, VisionZip(tokens=17)):
        model.generate(**processor(text=["hello"], return_tensors="pt"), max_new_tokens=1)
        again = processor(text=["<video>" * 34], return_tensors="pt")["input_ids"]
        assert int((again == model.config.video_token_id).sum()) == 34


def test_a_prompt_of_another_processor_is_explained(small: tuple[Any, Any]) -> None:
    model, processor = small
    stock = copy.deepcopy(processor)
    with (
        compress(model, processor, VisionZip(tokens=17)),
        pytest.raises(ValueError, match="compressed with"),
    ):
        model(**stock(videos=[slow.video(1, 2)], text=["<video>"], return_tensors="pt"))


def test_frames_of_another_size_are_refused(small: tuple[Any, Any]) -> None:
    model, processor = small
    with (
        compress(model, processor, VisionZip(tokens=17)),
        pytest.raises(ValueError, match=r"of a video of 2 frames where this model has 65 a frame"),
    ):
        processor(
            videos=[slow.video(1, 2)],
            text=["<video>"],
            size={"shortest_edge": 224},
            crop_size={"height": 224, "width": 224},
        )


@pytest.mark.parametrize("change", ["image size", "video size", "strategy", "video token"])
def test_a_processor_of_another_model_is_refused(small: tuple[Any, Any], change: str) -> None:
    model, processor = small[0], copy.deepcopy(small[1])
    if change == "image size":
        processor.image_processor = build(image_size=224)[1].image_processor
    elif change == "video size":
        processor.video_processor = build(image_size=224)[1].video_processor
    elif change == "strategy":
        processor.vision_feature_select_strategy = "full"
    else:
        processor.video_token_id += 1
    with pytest.raises(ValueError, match="another model's"):
        compress(model, processor, VisionZip(tokens=17))
    assert "_vlmzip" not in vars(model.model)


def test_budgets_that_do_not_fit(small: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="a view has only 65 tokens"):
        compress(*small, VisionZip(tokens=66))
    with pytest.raises(ValueError, match="total_tokens=136 is a budget for images that are cut"):
        compress(*small, VisionZip(total_tokens=136))


def test_arguments_that_contradict_the_compression(small: tuple[Any, Any]) -> None:
    model, processor = small
    with compress(model, processor, VisionZip(tokens=17)):
        inputs = processor(videos=[slow.video(1, 2)], text=["<video>"], return_tensors="pt")
        with pytest.raises(ValueError, match="vision_feature_layer=-1 differs from -2"):
            model(**inputs, vision_feature_layer=-1)
        inputs = processor(images=[image(1)], text=["<image>"], return_tensors="pt")
        with pytest.raises(ValueError, match="vision_feature_select_strategy='full' was passed"):
            model(**inputs, vision_feature_select_strategy="full")


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize(
    "change", [{"vision_feature_layer": -3}, {"vision_feature_select_strategy": "full"}], ids=str
)
def test_a_config_that_was_changed_meanwhile(
    small: tuple[Any, Any], kind: str, change: dict[str, Any]
) -> None:
    model, processor = copy.deepcopy(small)
    given: dict[str, Any] = {"images": [image(1)]} if kind == "image" else {"videos": [slow.video(1, 2)]}
    with compress(model, processor, VisionZip(tokens=17)):
        inputs = processor(text=[f"<{kind}>"], return_tensors="pt", **given)
        for name, value in change.items():
            setattr(model.config, name, value)
        with pytest.raises(ValueError, match="compress again"):
            model(**inputs)


def test_a_tower_without_a_cls_token_is_refused(small: tuple[Any, Any]) -> None:
    config = copy.deepcopy(small[0].config)
    config.vision_config.model_type = "siglip_vision_model"
    with pytest.raises(UnsupportedModelError, match="expected to have a CLS token"):
        family_of(config)
