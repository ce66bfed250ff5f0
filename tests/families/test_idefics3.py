"""Idefics3: crops with their tags, padding, the shuffle's blocks, the record, and what is refused."""

import copy
import pickle
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import Idefics3Config

from contract import embedded_logits, image, placeholders
from slow import idefics3 as slow
from slow.internvl import raster_blocks
from vlmzip import Random, Uniform, UnsupportedModelError, VisionZip, compress
from vlmzip.families import family_of
from vlmzip.families.idefics3 import Idefics3
from vlmzip.tiny.random.idefics3 import build

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
TEXT = "USER: {}what is it? ASSISTANT:"


@pytest.fixture(scope="module")
def built() -> tuple[Any, Any]:
    return build()


@pytest.fixture
def pair(built: tuple[Any, Any]) -> tuple[Any, Any]:
    return copy.deepcopy(built)


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
    [((90, 90), 5), ((1, 1), 5), ((190, 90), 3), ((1, 700), 3), ((300, 40), 3)],
    ids=str,
)
def test_every_grid(pair: tuple[Any, Any], size: tuple[int, int], views: int, order: Any) -> None:
    model, processor = pair
    method = VisionZip(tokens=7, order=order)
    inputs, (last,) = compare(model, processor, method, "<image>", images=image(1, *size))
    assert count(model, inputs) == 7 * views
    assert last.scores.shape == last.assignment.shape == (views, 16)
    assert last.grid == ((4, 4),) * views


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("edge", [112, 224, 560])
def test_the_tags_stay_and_are_counted(pair: tuple[Any, Any], split: bool, edge: int) -> None:
    model, processor = pair
    processor.image_processor.size = {"longest_edge": edge}
    processor.image_processor.do_image_splitting = split
    text, picture = "<image>", image(1, 190, 90)
    stock = processor(text=text, images=picture)["input_ids"][0]
    with compress(model, processor, VisionZip(tokens=5)):
        ids = processor(text=text, images=picture)["input_ids"][0]
        (sized,) = processor._get_num_multimodal_tokens(image_sizes=[(90, 190)]).num_image_tokens
    token = processor.image_token_id
    assert [other for other in ids if other != token] == [other for other in stock if other != token]
    assert ids.count(token) * 16 == stock.count(token) * 5
    assert len(ids) == sized


def test_an_image_that_is_not_split(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    given = {"images": image(1, 190, 90), "do_image_splitting": False}
    inputs, (last,) = compare(model, processor, VisionZip(tokens=5), "<image>", **given)
    assert count(model, inputs) == 5
    assert len(last.dominant) == 1


@pytest.mark.parametrize(
    "method",
    [
        VisionZip(dominant=7, contextual=0),
        VisionZip(tokens=9, merge="average", order="grouped"),
        VisionZip(tokens=1),
        VisionZip(keep=0.5),
    ],
    ids=str,
)
def test_images_in_one_prompt(pair: tuple[Any, Any], method: VisionZip) -> None:
    model, processor = pair
    pictures = [image(1, 190, 90), image(2, 90, 90), image(3, 90, 190)]
    _, last = compare(model, processor, method, "<image> and <image><image>", images=pictures)
    assert [len(one.dominant) for one in last] == [3, 5, 3]


@pytest.mark.parametrize("method", [Random(tokens=5), Uniform(tokens=5)], ids=str)
def test_methods_without_contextual_tokens(pair: tuple[Any, Any], method: Any) -> None:
    model, processor = pair
    with compress(model, processor, method) as zipped:
        inputs = processor(text="<image>", images=image(1, 190, 90), return_tensors="pt")
        model.generate(**inputs, max_new_tokens=1)
        assert [one.contextual.numel() for one in zipped.last] == [0]
    assert count(model, inputs) == 5 * 3


# --- what a merged token is ---------------------------------------------------------------------


@pytest.mark.parametrize("order", [None, "grouped"])
def test_keeping_every_token_is_stock(pair: tuple[Any, Any], order: Any) -> None:
    model, processor = pair
    given = {"text": ["<image><image> a", "<image>"], "padding": True, "return_tensors": "pt"}
    given["images"] = [image(1, 190, 90), image(2, 90, 90), image(3, 90, 190)]
    with torch.no_grad():
        stock_inputs = processor(**given)
        stock = model(**stock_inputs).logits
        with compress(model, processor, VisionZip(tokens=16, order=order)):
            inputs = processor(**given)
            assert torch.equal(inputs["input_ids"], stock_inputs["input_ids"])
            assert torch.equal(model(**inputs).logits, stock)


def test_a_merged_token_is_its_blocks_patches(pair: tuple[Any, Any]) -> None:
    """Which pixels reach a token of the connector: the gradient says so, not anybody's arithmetic."""
    model, processor = pair
    model.model.vision_model.encoder.layers = torch.nn.ModuleList()  # nothing mixes patches any more
    inputs = processor(text="<image>", images=image(1, 190, 90), return_tensors="pt")
    pixels = inputs["pixel_values"].requires_grad_()
    tokens = model.model.get_image_features(pixels).pooler_output
    tokens = tokens if isinstance(tokens, torch.Tensor) else torch.cat(list(tokens))
    for index, block in enumerate(raster_blocks(8, 8, 2)):
        token = tokens.view(3, 16, -1)[0, index]
        (gradient,) = torch.autograd.grad(token.sum(), pixels, retain_graph=True)
        touched = gradient[0, 0].abs().sum(0).unflatten(0, (8, 14)).unflatten(2, (8, 14)).sum((1, 3))
        assert touched.flatten().nonzero()[:, 0].tolist() == sorted(block)


def test_scores_are_what_the_block_receives(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    inputs, (last,) = compare(model, processor, VisionZip(tokens=6), "<image>", images=image(1, 190, 90))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model.model.vision_model(inputs["pixel_values"][0], output_attentions=True)
    received_VP = out.attentions[-1].mean((1, 2))
    expected_VN = torch.nn.functional.avg_pool2d(received_VP.view(-1, 1, 8, 8), 2).flatten(1)
    torch.testing.assert_close(last.scores, expected_VN, **TOLERANCE)
    assert torch.equal(last.dominant, expected_VN.topk(5).indices.sort().values)


@pytest.mark.parametrize(
    "settings",
    [
        {"image_size": 126, "merge": 3},
        {"image_size": 120},
        {"image_size": 128, "patch": 16, "merge": 4},
        {"image_size": 70, "merge": 1},
    ],
    ids=str,
)
def test_other_configs(settings: dict[str, Any]) -> None:
    """A view of 120 pixels has 8 patches of 14 and a rest, as SmolVLM's of 384."""
    model, processor = build(**settings)
    compare(model, processor, VisionZip(tokens=3), "<image>", images=image(1, 190, 90))


# --- padding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (37, 501), (190, 90), (113, 112), (2000, 3)], ids=str)
def test_the_stock_processor_pads_whole_views_only(
    pair: tuple[Any, Any], size: tuple[int, int], split: bool
) -> None:
    """What the fixed K rests on: in a batch of prompts of different length, a view is full or filler."""
    _, processor = pair
    pictures = [image(1, *size), image(2, 90, 90), image(3, 90, 190)]
    mask = processor(
        text=["<image>", "<image><image>"],
        images=pictures,
        padding=True,
        do_image_splitting=split,
        return_tensors="pt",
    )["pixel_attention_mask"]
    assert mask.shape[-2:] == (112, 112)
    shares = mask.float().mean((-1, -2))
    assert set(shares.flatten().tolist()) == {0.0, 1.0}


def test_a_view_that_is_in_part_padding(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    with compress(model, processor, VisionZip(tokens=6)), torch.no_grad():
        inputs = processor(text="<image>", images=image(1, 190, 90), return_tensors="pt")
        expected = model(**inputs).logits
        mask = inputs["pixel_attention_mask"]
        mask[0, 1, 110:] = 0  # within a patch: stock does not call that padding
        assert torch.equal(model(**inputs).logits, expected)
        mask[0, 1, 70:] = 0
        with pytest.raises(ValueError, match="pads part of a view"):
            model(**inputs)
        del inputs["pixel_attention_mask"]
        assert torch.equal(model(**inputs).logits, expected)


def test_an_image_that_stock_takes_for_padding(pair: tuple[Any, Any]) -> None:
    """Pixels that are all zero: stock drops the view, and fills its places from the next one."""
    model, processor = pair
    pictures = [Image.new("RGB", (90, 90)), image(2, 190, 90)]
    with compress(model, processor, VisionZip(tokens=6)):
        inputs = processor(
            text="<image><image>", images=pictures, do_normalize=False, return_tensors="pt"
        )
        with pytest.raises(ValueError, match="48 image placeholders for 18 image tokens"):
            model(**inputs)


# --- the record, and other ways in ----------------------------------------------------------------


def test_the_record_of_a_batch_with_beams(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    pictures = [image(1, 190, 90), image(2, 90, 90), image(3, 90, 190)]
    with compress(model, processor, VisionZip(tokens=6)) as zipped:
        inputs = processor(
            text=["<image><image> what", "<image>"], images=pictures, padding=True, return_tensors="pt"
        )
        model.generate(**inputs, max_new_tokens=2, num_beams=3)
        assert [len(one.dominant) for one in zipped.last] == [3, 5, 3]
        beams = zipped.last
        with torch.no_grad():
            model(**inputs)
        for one, other in zip(zipped.last, beams, strict=True):
            torch.testing.assert_close(one.scores, other.scores, **TOLERANCE)
        model.model.get_image_features(inputs["pixel_values"])  # no prompt, nobody knows whose crops
        assert [len(one.dominant) for one in zipped.last] == [1] * 11


def test_embeddings_instead_of_ids(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    with compress(model, processor, VisionZip(tokens=6)), torch.no_grad():
        inputs = processor(text="<image> what", images=image(1, 190, 90), return_tensors="pt")
        expected = model(**inputs).logits
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        pixels = inputs["pixel_values"]
        found = model(inputs_embeds=embeds, pixel_values=pixels).logits
        torch.testing.assert_close(found, expected, **TOLERANCE)
        with pytest.raises(ValueError, match="prompt was not made by the processor"):
            model(inputs_embeds=embeds[:, :-20], pixel_values=pixels)


def test_tuple_output(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    with compress(model, processor, VisionZip(tokens=6)), torch.no_grad():
        pixels = processor(text="<image>", images=image(1, 190, 90), return_tensors="pt")["pixel_values"]
        named = model.model.get_image_features(pixels)
        plain = model.model.get_image_features(pixels, return_dict=False)
    assert isinstance(plain, tuple)
    assert sum(one.numel() for one in named.pooler_output) == 3 * 6 * 64
    assert all(map(torch.equal, plain[-1], named.pooler_output))


def test_compiled(pair: tuple[Any, Any]) -> None:
    """With graph breaks, as stock: it picks the real views by their values."""
    model, processor = pair
    with compress(model, processor, VisionZip(tokens=6)), torch.no_grad():
        inputs = processor(text="<image>", images=image(1, 190, 90), return_tensors="pt")
        expected = model(**inputs, use_cache=False).logits
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(**inputs, use_cache=False).logits, expected, **TOLERANCE)


# --- budgets, and what is refused -----------------------------------------------------------------


def test_the_published_layout() -> None:
    vision = {"image_size": 364, "patch_size": 14, "num_hidden_layers": 27}
    family = family_of(Idefics3Config(vision_config=vision))
    assert isinstance(family, Idefics3)
    shuffled = family.shuffled
    assert (shuffled.tower.patches, shuffled.grid, shuffled.tower.block) == (676, (13, 13), 26)
    with pytest.raises(ValueError, match="a setting of this family's processor"):
        family.attachment(VisionZip(total_tokens=640))
    with pytest.raises(ValueError, match="only 169 tokens"):
        family.attachment(VisionZip(tokens=170))


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"image_size": [364, 182], "patch_size": 14}, "is not square"),
        ({"image_size": 224, "patch_size": [14, 7]}, "is not square"),
        ({"image_size": 378, "patch_size": 14}, "cannot be merged in blocks of 2 x 2"),
    ],
    ids=str,
)
def test_configs_that_cannot_be_compressed(vision: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        family_of(Idefics3Config(vision_config=vision))


def test_a_processor_of_another_model(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    for change, message in [
        (lambda p: setattr(p, "image_seq_len", 35), "its image size, crop size"),
        (lambda p: setattr(p, "image_seq_len", 32), "image_seq_len=32 is not this model's 16"),
        (lambda p: setattr(p.image_processor, "max_image_size", {"longest_edge": 56}), "its image size"),
    ]:
        other = copy.deepcopy(processor)
        change(other)
        with pytest.raises(ValueError, match=message):
            compress(model, other, VisionZip(tokens=12))
        assert "_vlmzip" not in vars(model.model)
    model.config.image_token_id = 7
    with pytest.raises(ValueError, match="image token has id 4"):
        compress(model, processor, VisionZip(tokens=12))


def test_inputs_that_do_not_fit(pair: tuple[Any, Any]) -> None:
    """Stock writes whatever is left over of the features to the placeholders there are."""
    model, processor = pair
    picture = image(1, 190, 90)
    with compress(model, processor, VisionZip(tokens=6)):
        inputs = processor(text="<image>", images=picture, return_tensors="pt")
        pixels = inputs["pixel_values"]
        with pytest.raises(ValueError, match="views of another size"):
            model(**{**inputs, "pixel_values": torch.zeros(1, 3, 3, 56, 56)})
        for given in (pixels[:, :2], torch.cat([pixels, pixels])):
            with pytest.raises(ValueError, match="prompt was not made by the processor"):
                model(input_ids=inputs["input_ids"], pixel_values=given)
            with pytest.raises(ValueError, match="prompt was not made by the processor"):
                model.generate(input_ids=inputs["input_ids"], pixel_values=given, max_new_tokens=1)
        with pytest.raises(ValueError, match="1 <image> placeholders for 2 images"):
            processor(text="<image>", images=[picture, picture])
        with pytest.raises(ValueError, match="2 <image> placeholders for 1 images"):
            processor(text="<image><image>", images=picture)
        with pytest.raises(ValueError, match="nothing to put there"):
            processor(text="<image>")
        with pytest.raises(ValueError, match="pixels"):
            processor(text="<image>", images=picture, max_image_size={"longest_edge": 56})
        assert processor(text="<image>" * 12)["input_ids"][0].count(processor.image_token_id) == 12
        model.config.scale_factor = 4
        with pytest.raises(ValueError, match="was changed after compress"):
            model(**inputs)


def test_processor_pickles(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    picture = image(1, 190, 90)
    with compress(model, processor, VisionZip(tokens=6)):
        twin = pickle.loads(pickle.dumps(processor))
        expected = processor(text="<image>", images=picture)["input_ids"]
        assert twin(text="<image>", images=picture)["input_ids"] == expected
