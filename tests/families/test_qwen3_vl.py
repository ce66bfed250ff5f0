"""Qwen3-VL alone: DeepStack features go the way of their tokens."""

import pytest
import torch

from contract import fresh, image
from slow import qwen2_vl as slow
from vlmzip import VisionZip, compress

pytestmark = pytest.mark.needs_torchvision


@pytest.mark.parametrize(
    "method", [VisionZip(tokens=7), VisionZip(tokens=7, merge="average"), VisionZip(keep=1.0)]
)
def test_deepstack_features_are_merged_as_their_tokens(method: VisionZip) -> None:
    case = fresh("qwen3_vl", "tiny")
    with compress(case.model, case.processor, method), torch.no_grad():
        inputs = dict(
            case.processor(
                images=[image(1, 150, 130), image(2, 230, 90)],
                text=[2 * case.processor.image_token],
                return_tensors="pt",
            )
        )
        out = case.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    frames = slow.frames(case.model, inputs, method)
    assert len(out.deepstack_features) == 2
    for index, frame in enumerate(frames):
        rows = [out.pooler_output[index], *(layer[index] for layer in out.deepstack_features)]
        expected = [frame.zipped.tokens[0], *frame.deep]
        for found, wanted in zip(rows, expected, strict=True):
            torch.testing.assert_close(found, wanted.float(), rtol=1e-4, atol=1e-5)
