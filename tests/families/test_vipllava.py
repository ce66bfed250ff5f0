"""ViP-LLaVA: several layers at once, read at the deepest."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from slow import vipllava as slow
from vlmzip import UnsupportedModelError, VisionZip, compress
from vlmzip.families import family_of
from vlmzip.tiny.random import build as build_random
from vlmzip.tiny.random.vipllava import build


def picture(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))


@pytest.mark.parametrize(("layers", "block"), [((-2, -3, 1), 2), ((1, -1, 2), 3), ((2, 3), 2), (-2, 2)])
def test_the_deepest_listed_layer_is_read_and_nothing_after_it_runs(layers: Any, block: int) -> None:
    model, processor = build(image_size=112, layers=layers)
    assert family_of(model.config).tower.block == block
    ran = []
    for index, layer in enumerate(model.model.vision_tower.encoder.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
    with compress(model, processor, VisionZip(tokens=12)), torch.no_grad():
        model(**processor(images=[picture(1)], text=["<image>"], return_tensors="pt"))
    assert ran == list(range(block + 1))


@pytest.mark.parametrize(
    "method",
    [
        VisionZip(tokens=12),
        VisionZip(tokens=12, send_cls=False),
        VisionZip(tokens=12, merge="average", order="raster"),
        VisionZip(keep=1.0),
    ],
    ids=str,
)
def test_kept_tokens_are_the_slow_paths(method: VisionZip) -> None:
    model, processor = build(image_size=112)
    inputs = processor(images=[picture(1), picture(2)], text=["<image><image>"], return_tensors="pt")
    with compress(model, None, method) as zipped, torch.no_grad():
        fast = model.get_image_features(inputs["pixel_values"]).pooler_output
        last = zipped.last
    for row, expected in zip(fast, slow.features(model, inputs, method), strict=True):
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)
    for entry, pixels in zip(last, inputs["pixel_values"], strict=True):
        zipped_by_hand = slow.zip_image(model, pixels, method)
        assert torch.equal(entry.dominant, zipped_by_hand.dominant)
        assert torch.equal(entry.contextual, zipped_by_hand.contextual)
        assert entry.grid == ((8, 8),)


def test_the_paper_s_budget_at_the_real_resolution() -> None:
    model, processor = build_random("vipllava")
    with compress(model, processor, VisionZip(tokens=64)) as zipped:
        inputs = processor(images=[picture(1)], text=["<image>"], return_tensors="pt")
        model.generate(**inputs, max_new_tokens=1)
        (last,) = zipped.last
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 64
    assert (last.dominant.shape, last.contextual.shape) == ((1, 54), (1, 10))
    assert last.scores.shape == (1, 577)


def test_tuples_come_back_where_tuples_are_asked_for() -> None:
    model, processor = build(image_size=112)
    pixels = processor(images=[picture(1)], text=["<image>"], return_tensors="pt")["pixel_values"]
    with compress(model, None, VisionZip(tokens=12)), torch.no_grad():
        whole = model.model.get_image_features(pixels)
        parts = model.model.get_image_features(pixels, return_dict=False)
    assert isinstance(parts, tuple)
    assert torch.equal(parts[1], whole.pooler_output)


def test_layers_that_were_not_attached_to_are_refused() -> None:
    model, processor = build(image_size=112)
    with compress(model, processor, VisionZip(tokens=12)):
        inputs = processor(images=[picture(1)], text=["<image>"], return_tensors="pt")
        with pytest.raises(
            ValueError, match=r"vision_feature_layers=\(-2, 1\) differs from \(-2, -3, 1\)"
        ):
            model(**inputs, vision_feature_layers=[-2, 1])
        model(**inputs, vision_feature_layers=[-2, -3, 1])


@pytest.mark.parametrize("part", ["layers", "tower"])
def test_a_config_that_was_changed_meanwhile(part: str) -> None:
    model, processor = build(image_size=112)
    with compress(model, processor, VisionZip(tokens=12)):
        inputs = processor(images=[picture(1)], text=["<image>"], return_tensors="pt")
        if part == "layers":
            model.config.vision_feature_layers = (-2, -4)
        else:
            model.config.vision_config.image_size = 224
        with pytest.raises(ValueError, match="compress again"):
            model(**inputs)


def test_a_processor_that_keeps_cls_is_refused() -> None:
    model, processor = build(image_size=112)
    processor.vision_feature_select_strategy = "full"
    with pytest.raises(ValueError, match="65 image tokens where this model has 64"):
        compress(model, processor, VisionZip(tokens=12))


def test_a_tower_without_a_cls_token_is_refused() -> None:
    config = copy.deepcopy(build(image_size=112)[0].config)
    config.vision_config.model_type = "siglip_vision_model"
    with pytest.raises(UnsupportedModelError, match="drops a patch"):
        family_of(config)
