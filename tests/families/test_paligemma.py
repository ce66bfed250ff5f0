"""PaliGemma: the tower's last block, a prefix that sees itself, suffixes to train on."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from contract import TOLERANCE, embedded_logits
from slow import paligemma as slow
from vlmzip import UnsupportedModelError, VisionZip, compress
from vlmzip.families import family_of
from vlmzip.tiny.random import build as build_random
from vlmzip.tiny.random import parts
from vlmzip.tiny.random.paligemma import build

TOKENS = VisionZip(tokens=12)


def picture(seed: int, width: int = 80, height: int = 60) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def images_in(model: Any, inputs: Any) -> list[int]:
    return (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist()


@pytest.mark.parametrize(
    "method",
    [
        TOKENS,
        VisionZip(tokens=12, send_cls=False),
        VisionZip(tokens=12, merge="average", order="grouped"),
        VisionZip(total_tokens=20),
        VisionZip(dominant=1, contextual=0),
    ],
    ids=str,
)
def test_kept_tokens_are_the_slow_paths(method: VisionZip) -> None:
    model, processor = build(112)
    inputs = processor(images=[picture(1), picture(2)], text=["<image><image>"], return_tensors="pt")
    with compress(model, None, method) as zipped, torch.no_grad():
        fast = model.get_image_features(inputs["pixel_values"]).pooler_output
        last = zipped.last
    for row, expected in zip(fast, slow.features(model, inputs, method), strict=True):
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)
    for entry, pixels in zip(last, inputs["pixel_values"], strict=True):
        by_hand = slow.zip_image(model, pixels, method)
        assert torch.equal(entry.dominant, by_hand.dominant)
        assert torch.equal(entry.contextual, by_hand.contextual)
        assert entry.scores.shape == (1, 64)
        assert entry.grid == ((8, 8),)


def test_every_token_is_stock_to_the_bit() -> None:
    model, processor = build(112, "gemma2")
    inputs = processor(images=[picture(1)], text=["<image>what"], return_tensors="pt")
    with torch.no_grad():
        stock = model(**inputs).logits
        with compress(model, processor, VisionZip(keep=1.0)):
            again = processor(images=[picture(1)], text=["<image>what"], return_tensors="pt")
            assert torch.equal(again["input_ids"], inputs["input_ids"])
            assert torch.equal(model(**again).logits, stock)


def test_the_whole_tower_runs_and_is_read_at_its_last_block() -> None:
    model, processor = build(112)
    assert family_of(model.config).tower.block == 3
    ran = []
    for index, layer in enumerate(model.model.vision_tower.encoder.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
    with compress(model, processor, TOKENS), torch.no_grad():
        model(**processor(images=[picture(1)], text=["<image>"], return_tensors="pt"))
    assert ran == [0, 1, 2, 3]


def test_the_real_resolution() -> None:
    model, processor = build_random("paligemma")
    with compress(model, processor, VisionZip(tokens=64)) as zipped:
        inputs = processor(images=[picture(1)], text=["<image>"], return_tensors="pt")
        model.generate(**inputs, max_new_tokens=1)  # with the labels that the processor makes unasked
        (last,) = zipped.last
    assert images_in(model, inputs) == [64]
    assert (last.dominant.shape, last.contextual.shape) == ((1, 54), (1, 10))
    assert last.scores.shape == (1, 256)


@pytest.mark.parametrize(
    ("images", "text", "counts"),
    [
        (picture(1), "what is it", [12]),
        ([picture(1), picture(2)], ["what is it", "and this"], [12, 12]),
        ([[picture(1), picture(2)], [picture(3)]], ["compare", "and this"], [24, 12]),
    ],
    ids=["one", "one each", "lists"],
)
def test_prompts_that_leave_the_placeholders_to_the_processor(
    images: Any, text: Any, counts: list[int]
) -> None:
    model, processor = build(112)
    with compress(model, processor, TOKENS) as zipped, torch.no_grad():
        inputs = processor(images=images, text=text, padding=True, return_tensors="pt")
        assert images_in(model, inputs) == counts
        model(**inputs)
        assert len(zipped.last) == sum(counts) // 12


@pytest.mark.parametrize("language", ["gemma", "gemma2"])
def test_a_suffix_is_trained_on_and_seen_by_nothing_before_it(language: Any) -> None:
    model, processor = build(112, language)
    asked = {"images": [picture(1), picture(2)], "text": ["<image>what is it", "<image>it"]}
    with compress(model, processor, TOKENS):
        inputs = dict(
            processor(**asked, suffix=["a cat", "no idea"], padding="longest", return_tensors="pt")
        )
        assert images_in(model, inputs) == [12, 12]
        out = model(**inputs)
        out.loss.backward()
    labels = inputs.pop("labels")
    taught = [processor.decode(row[row != -100], skip_special_tokens=True) for row in labels]
    assert taught == ["a cat", "no idea"]
    assert model.model.vision_tower.encoder.layers[0].mlp.fc1.weight.grad.abs().sum() > 0
    features = slow.features(model, inputs, TOKENS)
    logits = slow.logits(model, inputs, features, TOKENS)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(out.logits[real], logits[real], **TOLERANCE)
    # The reference must tell the prefix's attention from a causal one.
    causal = embedded_logits(model, inputs, features)
    assert (causal[real] - logits[real]).abs().max() > 0.01


def test_save_and_load_and_pickle(tmp_path: Path) -> None:
    model, processor = build(112)
    with compress(model, processor, TOKENS) as zipped:
        zipped.save_pretrained(tmp_path)
        twin = pickle.loads(pickle.dumps(processor))
        assert images_in(model, twin(images=[picture(1)], text=["<image>"], return_tensors="pt")) == [12]
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is type(processor)
    inputs = loaded(images=[picture(1)], text=["<image>"], return_tensors="pt")
    assert images_in(model, inputs) == [64]
    with compress(model, loaded, TOKENS):
        inputs = loaded(images=[picture(1)], text=["<image>"], return_tensors="pt")
        assert images_in(model, inputs) == [12]


# --- bad input ------------------------------------------------------------------------------------


def test_a_budget_over_the_patches_is_refused() -> None:
    model, processor = build(112)
    with pytest.raises(ValueError, match="a view has only 64 tokens"):
        compress(model, processor, VisionZip(tokens=65))


@pytest.mark.parametrize("text", ["<image><image>what", "<image>", ["<image>a", "b"]], ids=str)
def test_other_counts_of_images_than_of_placeholders_are_refused(text: Any) -> None:
    model, processor = build(112)
    given = 1 if text == "<image><image>what" else 2
    wanted = str(text).count("<image>")
    with (
        compress(model, processor, TOKENS),
        pytest.raises(ValueError, match=f"has {wanted} <image> placeholders for {given} images"),
    ):
        processor(images=[picture(seed) for seed in range(given)], text=text)


def test_prompts_without_images_are_stocks_to_refuse() -> None:
    model, processor = build(112)
    with (
        compress(model, processor, TOKENS),
        pytest.raises(ValueError, match="`images` are expected"),
    ):
        processor(text=["what"])


def test_other_models_processors_are_refused() -> None:
    model, _ = build(112)
    with pytest.raises(ValueError, match="makes images of 98 x 98 pixels where this model takes 112"):
        compress(model, build(98)[1], TOKENS)
    fewer = build(112)[1]
    fewer.image_seq_length = 49
    with pytest.raises(ValueError, match="makes 49 image tokens where this model has 64"):
        compress(model, fewer, TOKENS)
    with pytest.raises(ValueError, match="needs a PaliGemmaProcessor, got LlavaProcessor"):
        compress(model, build_random("llava")[1], TOKENS)
    assert "_vlmzip" not in vars(model.base_model)


def test_towers_that_are_not_siglip_are_refused() -> None:
    model, _ = build(112)
    model.config.vision_config = parts.clip_config(112)
    with pytest.raises(UnsupportedModelError, match="CLS token would count as a patch"):
        compress(model, None, TOKENS)


def test_a_changed_config_is_noticed() -> None:
    model, processor = build(112)
    with compress(model, processor, TOKENS):
        inputs = processor(images=[picture(1)], text=["<image>"], return_tensors="pt")
        model.config.vision_config.num_hidden_layers = 3
        with pytest.raises(ValueError, match="was changed after compress"):
            model(**inputs)
