"""Gemma 3: pooled tokens, pan-and-scan crops, blocks of tokens that see each other."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor
from transformers.models.gemma3 import modeling_gemma3

from contract import TOLERANCE, embedded_logits
from slow import gemma3 as slow
from vlmzip import UnsupportedModelError, VisionZip, compress
from vlmzip.families import family_of
from vlmzip.tiny.random import build as build_random
from vlmzip.tiny.random.gemma3 import BEGIN, build

TOKENS = VisionZip(tokens=12)
CUT = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 40}


def picture(seed: int, width: int = 80, height: int = 60) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def runs(model: Any, ids: Tensor) -> list[int]:
    """Lengths of the runs of placeholders of one prompt [T]."""
    found, before = [], False
    for here in (ids == model.config.image_token_id).tolist():
        if here and not before:
            found.append(0)
        if here:
            found[-1] += 1
        before = here
    return found


@pytest.mark.parametrize("size", [(168, 36), (168, 16), (182, 36), (168, 144)], ids=str)
@pytest.mark.parametrize(
    "method",
    [
        TOKENS,
        VisionZip(tokens=12, merge="average", order="grouped", send_cls=False),
        VisionZip(total_tokens=10),
        VisionZip(dominant=1, contextual=0),
    ],
    ids=str,
)
def test_kept_tokens_are_the_slow_paths(size: tuple[int, int], method: VisionZip) -> None:
    model, processor = build(*size)
    inputs = processor(images=[[picture(1), picture(2)]], text=[BEGIN + BEGIN], return_tensors="pt")
    side = int(size[1] ** 0.5)
    with compress(model, processor, method) as zipped, torch.no_grad():
        fast = model.get_image_features(inputs["pixel_values"]).pooler_output
        last = zipped.last
    for row, expected in zip(fast, slow.features(model, inputs, method), strict=True):
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)
    for entry, pixels in zip(last, inputs["pixel_values"], strict=True):
        by_hand = slow.zip_image(model, pixels, method)
        assert torch.equal(entry.dominant, by_hand.dominant)
        assert torch.equal(entry.contextual, by_hand.contextual)
        assert entry.scores.shape == (1, side * side)
        assert entry.grid == ((side, side),)


def test_every_token_is_stock_to_the_bit() -> None:
    model, processor = build(168, 36)
    asked = {"images": [[picture(1)]], "text": [f"{BEGIN} what"], "return_tensors": "pt"}
    with torch.no_grad():
        inputs = processor(**asked)
        stock = model(**inputs).logits
        with compress(model, processor, VisionZip(keep=1.0)):
            again = processor(**asked)
            assert torch.equal(again["input_ids"], inputs["input_ids"])
            assert torch.equal(model(**again).logits, stock)


def test_tuples_come_back_where_tuples_are_asked_for() -> None:
    model, processor = build(168, 36)
    pixels = processor(images=[[picture(1)]], text=[BEGIN], return_tensors="pt")["pixel_values"]
    with compress(model, None, TOKENS), torch.no_grad():
        whole = model.model.get_image_features(pixels)
        parts_of_it = model.model.get_image_features(pixels, return_dict=False)
    assert whole.pooler_output.shape == (1, 12, 64)
    assert isinstance(parts_of_it, tuple)
    assert torch.equal(parts_of_it[1], whole.pooler_output)


# --- the blocks of the mask -----------------------------------------------------------------------


@pytest.mark.parametrize("between", ["", " and "], ids=["adjacent", "text between"])
def test_each_images_tokens_are_one_block_of_k(between: str) -> None:
    model, processor = build(168, 36)
    text = f"look {BEGIN}{between}{BEGIN} same?"
    with compress(model, processor, TOKENS):
        inputs = processor(images=[[picture(1), picture(2)]], text=[text], return_tensors="pt")
    assert runs(model, inputs["input_ids"][0]) == [12, 12]
    types = inputs["token_type_ids"]
    assert torch.equal(types == 1, inputs["input_ids"] == model.config.image_token_id)
    blocks = modeling_gemma3.get_block_sequence_ids_for_mask(types)[0].tolist()
    assert [blocks.count(block) for block in (0, 1)] == [12, 12]
    assert max(blocks) == 1


def test_the_first_tokens_of_an_image_see_its_last_and_those_of_others_do_not() -> None:
    model, processor = build(168, 36)
    with compress(model, processor, TOKENS), torch.no_grad():
        inputs = dict(
            processor(images=[[picture(1), picture(2)]], text=[BEGIN + BEGIN], return_tensors="pt")
        )
        features = model.get_image_features(inputs.pop("pixel_values"))
        stock = model(**inputs, mm_encoder_outputs={"image": features}).logits[0]
        features.pooler_output[1, -1] += 5.0
        moved = model(**inputs, mm_encoder_outputs={"image": features}).logits[0]
    places = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    changed = (stock - moved).abs().amax(-1) > 1e-4
    assert not changed[: places[12]].any()
    assert changed[places[12] :].all()


def test_the_slow_path_tells_the_blocks_from_a_causal_mask() -> None:
    model, processor = build(168, 36)
    with compress(model, processor, TOKENS):
        inputs = dict(processor(images=[[picture(1)]], text=[BEGIN], return_tensors="pt"))
    with torch.no_grad():
        features = slow.features(model, inputs, TOKENS)
        blocks = slow.logits(model, inputs, features, TOKENS)
        causal = embedded_logits(model, inputs, features)
    assert (blocks - causal).abs().max() > 0.01


# --- pan-and-scan ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "crops"), [((200, 60), 3), ((60, 130), 2), ((80, 70), 0), ((500, 50), 4), ((60, 20), 0)]
)
def test_each_crop_keeps_its_own(size: tuple[int, int], crops: int) -> None:
    model, processor = build(168, 36)
    asked: dict[str, Any] = {"images": [[picture(1, *size)]], "text": [f"{BEGIN} what"], **CUT}
    stock = processor(**asked, return_tensors="pt")
    with compress(model, processor, TOKENS) as zipped, torch.no_grad():
        inputs = dict(processor(**asked, return_tensors="pt"))
        logits = model(**inputs).logits
        assert len(zipped.last) == crops + 1
    assert runs(model, stock["input_ids"][0]) == [36] * (crops + 1)
    assert runs(model, inputs["input_ids"][0]) == [12] * (crops + 1)
    written = [
        [token for token in ids[0].tolist() if token != model.config.image_token_id]
        for ids in (stock["input_ids"], inputs["input_ids"])
    ]
    assert written[0] == written[1]
    features = slow.features(model, inputs, TOKENS)
    torch.testing.assert_close(logits, slow.logits(model, inputs, features, TOKENS), **TOLERANCE)


def test_cut_and_whole_images_in_one_batch() -> None:
    model, processor = build(168, 36)
    images = [[picture(1, 200, 60), picture(2)], [picture(3, 70, 60)]]
    texts = [f"{BEGIN}{BEGIN} what", f"{BEGIN} and this"]
    with compress(model, processor, TOKENS), torch.no_grad():
        inputs = dict(processor(images=images, text=texts, padding=True, return_tensors="pt", **CUT))
        logits = model(**inputs).logits
    counts = [len(runs(model, ids)) for ids in inputs["input_ids"]]
    assert counts == [4 + 3, 1]
    features = slow.features(model, inputs, TOKENS)
    expected = slow.logits(model, inputs, features, TOKENS)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits[real], expected[real], **TOLERANCE)


def test_a_total_is_refused_where_an_image_is_cut() -> None:
    model, processor = build(168, 36)
    with compress(model, processor, VisionZip(total_tokens=12)):
        inputs = processor(images=[[picture(1, 200, 60)]], text=[BEGIN], return_tensors="pt")
        assert runs(model, inputs["input_ids"][0]) == [12]
        with pytest.raises(ValueError, match=r"total_tokens=12 is for whole.*3 crops.*give tokens="):
            processor(images=[[picture(1, 200, 60)]], text=[BEGIN], **CUT)


# --- processors and checkpoints -------------------------------------------------------------------


def test_chats_and_bare_images() -> None:
    model, processor = build_random("gemma3")
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what"}]}]
    with compress(model, processor, VisionZip(tokens=20)):
        prompt = processor.apply_chat_template(talk, add_generation_prompt=True)
        inputs = processor(images=[picture(1)], text=[prompt], return_tensors="pt")
        assert runs(model, inputs["input_ids"][0]) == [20]
        model.generate(**inputs, max_new_tokens=2)
        bare = processor(images=[picture(1), picture(2)], return_tensors="pt")
        assert runs(model, bare["input_ids"][0]) == [20, 20]


def test_save_and_load_and_pickle(tmp_path: Path) -> None:
    model, processor = build(168, 36)
    asked = {"images": [[picture(1)]], "text": [BEGIN], "return_tensors": "pt"}
    with compress(model, processor, TOKENS) as zipped:
        zipped.save_pretrained(tmp_path)
        twin = pickle.loads(pickle.dumps(processor))
        assert runs(model, twin(**asked)["input_ids"][0]) == [12]
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is type(processor)
    assert runs(model, loaded(**asked)["input_ids"][0]) == [36]
    with compress(model, loaded, TOKENS):
        assert runs(model, loaded(**asked)["input_ids"][0]) == [12]


# --- bad input ------------------------------------------------------------------------------------


def test_a_budget_over_the_pooled_tokens_is_refused() -> None:
    model, processor = build(168, 36)
    with pytest.raises(ValueError, match="a view has only 36 tokens"):
        compress(model, processor, VisionZip(tokens=37))


@pytest.mark.parametrize(
    ("images", "text"),
    [
        ([[1, 2]], [f"{BEGIN} a"]),
        ([[1]], [f"{BEGIN}{BEGIN} a"]),
        ([[1]], ["a"]),
        ([[1], [2]], [f"{BEGIN} a"]),
        ([[1], [2, 3]], [f"{BEGIN}{BEGIN} a", f"{BEGIN} b"]),
    ],
    ids=str,
)
def test_prompts_with_other_images_than_placeholders_are_refused(images: Any, text: list[str]) -> None:
    model, processor = build(168, 36)
    given = [[picture(seed) for seed in row] for row in images]
    with (
        compress(model, processor, TOKENS),
        pytest.raises(ValueError, match=r"placeholders for|but received|inconsistently|Found"),
    ):
        processor(images=given, text=text)


def test_placeholders_without_images() -> None:
    model, processor = build(168, 36)
    soft = processor.tokenizer.image_token
    with compress(model, processor, TOKENS):
        assert runs(model, processor(text=["hi"], return_tensors="pt")["input_ids"][0]) == []
        with pytest.raises(ValueError, match=r"1 <start_of_image> and no images were given"):
            processor(text=[f"{BEGIN} hi"])
        with pytest.raises(ValueError, match=r"11 <image_soft_token> placeholders .* write 12"):
            processor(text=[f"{BEGIN}{soft * 11} hi"])
        written = processor(text=[f"{BEGIN}{soft * 12} hi"], return_tensors="pt")
        assert runs(model, written["input_ids"][0]) == [12]


def test_other_models_processors_are_refused() -> None:
    model, _ = build(168, 36)
    with pytest.raises(ValueError, match="makes images of 182 x 182 pixels where this model takes 168"):
        compress(model, build(182, 36)[1], TOKENS)
    with pytest.raises(ValueError, match="makes 16 image tokens where this model has 36 for each"):
        compress(model, build(168, 16)[1], TOKENS)
    with pytest.raises(ValueError, match="needs a Gemma3Processor, got LlavaProcessor"):
        compress(model, build_random("llava")[1], TOKENS)
    other = build(168, 36)
    other[0].config.image_token_index = 7
    with pytest.raises(ValueError, match="image token has id 5, the model's 7"):
        compress(*other, TOKENS)
    assert "_vlmzip" not in vars(model.base_model)


def test_poolings_that_do_not_fit_are_refused() -> None:
    model, _ = build(168, 36)
    model.config.mm_tokens_per_image = 400
    with pytest.raises(UnsupportedModelError, match="mm_tokens_per_image=400 cannot be pooled"):
        compress(model, None, TOKENS)


def test_a_changed_config_is_noticed() -> None:
    model, processor = build(168, 36)
    assert family_of(model.config).grid == (6, 6)
    with compress(model, processor, TOKENS):
        inputs = processor(images=[[picture(1)]], text=[BEGIN], return_tensors="pt")
        model.config.mm_tokens_per_image = 16
        with pytest.raises(ValueError, match="was changed after compress"):
            model(**inputs)
