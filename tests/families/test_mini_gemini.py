"""Mini-Gemini: which token mines which window, two resolutions, and what is refused."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate
from transformers import AutoConfig, CLIPVisionConfig, ConvNextConfig, SiglipVisionConfig

from contract import image
from slow import mini_gemini as slow
from vlmzip import Random, Uniform, VisionZip, compress, families
from vlmzip.mini_gemini import MiniGeminiConfig
from vlmzip.tiny.random import build as build_random
from vlmzip.tiny.random import llava, parts
from vlmzip.tiny.random.mini_gemini import build

METHODS = [
    VisionZip(tokens=12),
    VisionZip(tokens=12, send_cls=False),
    VisionZip(tokens=12, merge="average", order="raster"),
    VisionZip(dominant=5, contextual=0),
    VisionZip(dominant=1, contextual=7, order="raster"),
    VisionZip(keep=1.0),
]


@pytest.fixture(scope="module")
def small() -> tuple[Any, Any]:
    return build(image_size=112, high_image_size=128)


def made(processor: Any, images: int = 1) -> Any:
    pictures = [image(seed) for seed in range(1, images + 1)]
    return processor(images=pictures, text=["<image>" * images], return_tensors="pt")


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_features_and_record_are_the_slow_paths(small: tuple[Any, Any], method: VisionZip) -> None:
    model, processor = small
    inputs = made(processor, images=2)
    with compress(model, None, method) as zipped, torch.no_grad():
        fast = model.get_image_features(inputs["pixel_values"], inputs["pixel_values_high"]).pooler_output
        last = zipped.last
    for row, expected in zip(fast, slow.features(model, inputs, method), strict=True):
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)
    for entry, pixels in zip(last, inputs["pixel_values"], strict=True):
        by_hand = slow.zip_image(model, pixels, method)
        assert torch.equal(entry.dominant, by_hand.dominant)
        assert torch.equal(entry.contextual, by_hand.contextual)
        assert entry.grid == ((8, 8),)


@pytest.mark.parametrize("send_cls", [True, False])
def test_every_patch_mines_as_it_does_without_compression(small: tuple[Any, Any], send_cls: bool) -> None:
    model, processor = small
    inputs = made(processor)
    pixels = (inputs["pixel_values"], inputs["pixel_values_high"])
    with torch.no_grad():
        (stock,) = model.get_image_features(*pixels).pooler_output
        with compress(model, None, VisionZip(tokens=64 + send_cls, send_cls=send_cls)):
            (kept,) = model.get_image_features(*pixels).pooler_output
    torch.testing.assert_close(kept[int(send_cls) :], stock)


def test_only_kept_tokens_mine_and_cls_does_not(small: tuple[Any, Any]) -> None:
    model, processor = copy.deepcopy(small)
    inputs = made(processor)
    pixels = (inputs["pixel_values"], inputs["pixel_values_high"])
    seen = []
    model.model.mining.key.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    with compress(model, None, VisionZip(tokens=12)), torch.no_grad():
        before = model.get_image_features(*pixels).pooler_output[0]
        model.model.mining.value[1].bias += 1.0
        after = model.get_image_features(*pixels).pooler_output[0]
    assert seen == [(1, 12, 16, 80)] * 2
    changed = (before - after).abs().amax(-1) > 1e-6
    assert changed.tolist() == [False] + [True] * 11


@pytest.mark.parametrize("method", [Random(tokens=9), Uniform(tokens=9)], ids=str)
def test_other_methods_mine_the_windows_of_their_own_tokens(small: tuple[Any, Any], method: Any) -> None:
    model, processor = small
    inputs = made(processor)
    pixels = (inputs["pixel_values"], inputs["pixel_values_high"])
    with torch.no_grad():
        (stock,) = model.get_image_features(*pixels).pooler_output
        with compress(model, None, method) as zipped:
            (kept,) = model.get_image_features(*pixels).pooler_output
            (places,) = zipped.last[0].dominant.tolist()
    for row, place in zip(kept, places, strict=True):
        if place > 0:
            torch.testing.assert_close(row, stock[place - 1])


def test_the_paper_s_budget_at_the_real_resolutions() -> None:
    model, processor = build_random("mini_gemini")
    with compress(model, processor, VisionZip(tokens=64)) as zipped:
        inputs = made(processor)
        assert inputs["pixel_values"].shape == (1, 3, 336, 336)
        assert inputs["pixel_values_high"].shape == (1, 3, 768, 768)
        model.generate(**inputs, max_new_tokens=1)
        (last,) = zipped.last
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 64
    assert (last.dominant.shape, last.contextual.shape) == ((1, 54), (1, 10))
    assert last.scores.shape == (1, 577)


def test_gradients_reach_both_towers_and_the_mining(small: tuple[Any, Any]) -> None:
    model, processor = copy.deepcopy(small)
    with compress(model, processor, VisionZip(tokens=12)):
        inputs = made(processor)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    inner = model.model
    stem = inner.high_vision_tower.embeddings.patch_embeddings
    for layer in (inner.vision_tower.embeddings.patch_embedding, stem, inner.mining.query[1]):
        assert layer.weight.grad.abs().sum() > 0


# --- the processor ----------------------------------------------------------------------------


def test_the_low_resolution_is_scaled_from_the_high_one(small: tuple[Any, Any]) -> None:
    inputs = made(small[1], images=2)
    low = interpolate(inputs["pixel_values_high"], size=(112, 112), mode="bilinear", align_corners=False)
    assert torch.equal(inputs["pixel_values"], low)


@pytest.mark.parametrize("kind", [None, "np", "pt"])
def test_the_processor_returns_what_it_is_asked_for(small: tuple[Any, Any], kind: str | None) -> None:
    model, processor = small
    assert {"pixel_values", "pixel_values_high", "input_ids"} <= set(processor.model_input_names)
    found = processor(images=[image(1)], text=["<image>"], return_tensors=kind)
    for name, side in (("pixel_values", 112), ("pixel_values_high", 128)):
        assert np.asarray(found[name]).shape == (1, 3, side, side)
    assert list(found["input_ids"][0]).count(model.config.image_token_id) == 64


def test_a_compressed_processor_pickles_and_counts_by_size(small: tuple[Any, Any]) -> None:
    model, processor = small
    sizes = {"image_sizes": [(10, 20), (300, 40)]}
    assert processor._get_num_multimodal_tokens(**sizes).num_image_tokens == [64, 64]
    with compress(model, processor, VisionZip(tokens=12)):
        other = pickle.loads(pickle.dumps(processor))
        assert torch.equal(made(other)["input_ids"], made(processor)["input_ids"])
        assert other._get_num_multimodal_tokens(**sizes).num_image_tokens == [12, 12]


# --- what is refused --------------------------------------------------------------------------


def test_pixels_of_one_resolution_only_are_refused(small: tuple[Any, Any]) -> None:
    model, processor = small
    inputs = made(processor, images=2)
    high = inputs.pop("pixel_values_high")
    for method in (None, VisionZip(tokens=64, send_cls=False)):
        zipped = None if method is None else compress(model, None, method)
        for given in ({}, {"pixel_values_high": high[:1]}, {"pixel_values_high": high[..., :96]}):
            with pytest.raises(ValueError, match="let a MiniGeminiProcessor make both"):
                model(**inputs, **given)
        if zipped:
            zipped.remove()
    features = model.get_image_features(inputs["pixel_values"], high)
    with pytest.raises(ValueError, match="not both"):
        model(**inputs, pixel_values_high=high, mm_encoder_outputs={"image": features})


def test_not_a_number_from_the_high_resolution_is_an_error(small: tuple[Any, Any]) -> None:
    model, processor = copy.deepcopy(small)
    with torch.no_grad():
        model.model.high_vision_tower.embeddings.patch_embeddings.bias[0] = torch.nan
    with (
        compress(model, processor, VisionZip(tokens=12)),
        pytest.raises(RuntimeError, match="the high-resolution tower gave NaN"),
    ):
        model(**made(processor))


def test_a_layer_that_was_changed_meanwhile_is_an_error(small: tuple[Any, Any]) -> None:
    model, processor = copy.deepcopy(small)
    with compress(model, processor, VisionZip(tokens=12)):
        model.config.vision_feature_layer = -3
        with pytest.raises(ValueError, match="compress again"):
            model(**made(processor))


def test_another_model_s_processor_is_refused(small: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="needs a MiniGeminiProcessor, got LlavaProcessor"):
        compress(small[0], llava.build(image_size=112)[1], VisionZip(tokens=12))
    with pytest.raises(ValueError, match="256 image tokens where this model has 64"):
        compress(small[0], build(image_size=224, high_image_size=256)[1], VisionZip(tokens=12))
    with pytest.raises(ValueError, match="256 x 256 pixels where this model takes 128 x 128"):
        compress(small[0], build(image_size=112, high_image_size=256)[1], VisionZip(tokens=12))
    with pytest.raises(ValueError, match="a view has only 65 tokens"):
        compress(*small, VisionZip(tokens=66))


@pytest.mark.parametrize("tokens", [None, 12])
@pytest.mark.parametrize(
    "asked", [{"vision_feature_layer": 1}, {"vision_feature_select_strategy": "full"}], ids=str
)
def test_another_layer_or_strategy_is_refused(
    small: tuple[Any, Any], tokens: int | None, asked: dict[str, Any]
) -> None:
    model, processor = copy.deepcopy(small)
    if tokens is not None:
        compress(model, processor, VisionZip(tokens=tokens))
    inputs = processor(images=[image(1)], text=["<image> what"], return_tensors="pt")
    model(**inputs)
    with pytest.raises(ValueError, match="differs from the config's"):
        model(**inputs, **asked)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"high_image_size": 130}, "do not divide into 8 windows; give a multiple of 32"),
        ({"vision_feature_layer": [-2, -1]}, r"of one layer, got 'default' of \[-2, -1\]"),
        ({"vision_feature_select_strategy": "full"}, "of one layer, got 'full'"),
        ({"vision_config": SiglipVisionConfig(image_size=112, patch_size=14)}, "clip_vision_model"),
    ],
    ids=str,
)
def test_configurations_that_are_no_mini_gemini(fields: dict[str, Any], message: str) -> None:
    given = {"vision_config": parts.clip_config(112), "high_image_size": 128} | fields
    with pytest.raises(ValueError, match=message):
        MiniGeminiConfig(**given)


def test_the_default_configuration_is_the_published_shape(tmp_path: Any) -> None:
    config = MiniGeminiConfig()
    assert config.grid == 24
    assert config.high_image_size == 768
    assert sum(config.high_vision_config.hidden_sizes) == 2880
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, MiniGeminiConfig)
    assert isinstance(again.vision_config, CLIPVisionConfig)
    assert isinstance(again.high_vision_config, ConvNextConfig)
    assert again.high_vision_config.depths == [3, 3, 27, 3]
    assert "mini_gemini" in families()
