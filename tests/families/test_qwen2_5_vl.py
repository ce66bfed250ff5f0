"""Qwen2.5-VL alone: windows, which block is read, and seconds between the frames of a video."""

import copy

import pytest
import torch

from contract import TOLERANCE, fresh, image
from slow import qwen2_vl as slow
from vlmzip import UnsupportedModelError, VisionZip, compress
from vlmzip.families import family_of
from vlmzip.tiny.random.qwen2_5_vl import build

pytestmark = pytest.mark.needs_torchvision
METHOD = VisionZip(tokens=7)


def test_the_last_block_over_whole_frames_is_read() -> None:
    config = build()[0].config
    assert family_of(config).tower.block == 3
    config.vision_config.fullatt_block_indexes = (0, 2)
    assert family_of(config).tower.block == 2
    config.vision_config.fullatt_block_indexes = (2, 7)  # beyond the tower: no such block
    assert family_of(config).tower.block == 2


@pytest.mark.parametrize("full", [(), (9,)])
def test_a_tower_of_window_blocks_only(full: tuple[int, ...]) -> None:
    config = build()[0].config
    config.vision_config.fullatt_block_indexes = full
    with pytest.raises(UnsupportedModelError, match="within windows"):
        family_of(config)


def test_windows_are_undone() -> None:
    """An image of several windows, some cut off; the tower's order is not the raster order."""
    case = fresh("qwen2_5_vl", "tiny")
    with compress(case.model, case.processor, METHOD) as zipped, torch.no_grad():
        inputs = dict(
            case.processor(
                images=[image(3, 200, 180)], text=[case.processor.image_token], return_tensors="pt"
            )
        )
        case.model(**inputs)
        (last,) = zipped.last
    (frame,) = slow.frames(case.model, inputs, METHOD)
    order = slow.tower_order(case.model.config.vision_config, frame.rows, frame.columns)
    assert order != sorted(order)
    torch.testing.assert_close(last.scores[0], frame.scores.float(), rtol=1e-4, atol=1e-7)
    assert not torch.allclose(last.scores[0], frame.scores[order].float(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("seconds", [0.5, 1.0, 2.3])
def test_seconds_between_frames(seconds: float) -> None:
    case = fresh("qwen2_5_vl", "tiny")
    frames = [image(i, 150, 130) for i in range(6)]
    text = f"a {case.processor.video_token} b"
    with compress(case.model, case.processor, METHOD), torch.no_grad():
        inputs = dict(case.processor(videos=[frames], text=[text], return_tensors="pt"))
        inputs["second_per_grid_ts"] = [seconds]
        logits = case.model(**inputs).logits
    expected = case.logits(inputs, case.features(inputs, METHOD), METHOD)
    torch.testing.assert_close(logits, expected, **TOLERANCE)
    other = {**inputs, "second_per_grid_ts": [seconds + 1]}
    assert not torch.equal(
        slow.positions(case.model, inputs, METHOD), slow.positions(case.model, other, METHOD)
    )


def test_a_copy_with_other_windows_is_another_family_instance() -> None:
    config = build()[0].config
    other = copy.deepcopy(config)
    other.vision_config.window_size = 56
    assert family_of(config) != family_of(other)
