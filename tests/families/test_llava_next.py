"""LLaVA-NeXT: grids, orders, budgets over several views, and what is refused."""

import copy
import pickle
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import LlavaNextConfig, SiglipVisionConfig

from contract import embedded_logits, image, placeholders
from slow import llava_next as slow
from vlmzip import Random, Uniform, UnsupportedModelError, VisionZip, compress
from vlmzip.anyres import Anyres, crop_order
from vlmzip.families import family_of
from vlmzip.merging import ZipOutput, keep_tokens
from vlmzip.tiny.random.llava_next import build

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
# One size (width, height) for each grid of crops, and sizes that no view fits.
SIZES = {
    "1x2": (200, 100),
    "2x1": (100, 200),
    "2x2": (220, 210),
    "3x1": (100, 330),
    "1x3": (330, 100),
    "smaller than a crop": (20, 30),
    "one pixel": (1, 1),
    "a line": (600, 2),
    "large": (900, 700),
}
VIEWS = {"1x2": 3, "2x1": 3, "2x2": 5, "3x1": 4, "1x3": 4}


@pytest.fixture(scope="module")
def built() -> tuple[Any, Any]:
    return build()


@pytest.fixture
def pair(built: tuple[Any, Any]) -> tuple[Any, Any]:
    return copy.deepcopy(built)


def compare(model: Any, processor: Any, method: Any, images: list[Image.Image]) -> Any:
    """The compressed model's logits against the slow path's; returns inputs and the record."""
    text = "USER: " + "<image>\n" * len(images) + "what is it? ASSISTANT:"
    with compress(model, processor, method) as zipped, torch.no_grad():
        inputs = processor(text=text, images=images, return_tensors="pt")
        fast = model(**inputs).logits
        last = zipped.last
    with torch.no_grad():
        expected = embedded_logits(model, inputs, slow.features(model, inputs, method))
    torch.testing.assert_close(fast, expected, **TOLERANCE)
    return inputs, last


@pytest.mark.parametrize("order", ["grouped", "raster"])
@pytest.mark.parametrize("name", SIZES)
def test_every_grid(pair: tuple[Any, Any], name: str, order: Any) -> None:
    model, processor = pair
    method = VisionZip(tokens=13, order=order)
    inputs, (last,) = compare(model, processor, method, [image(1, *SIZES[name])])
    views = len(last.dominant)
    assert views == VIEWS.get(name, views)
    assert int(placeholders(model, inputs["input_ids"]).sum()) == 13 * views
    assert last.scores.shape == last.assignment.shape == (views, 65)
    assert last.grid == ((8, 8),) * views
    size = SIZES[name][::-1]
    with compress(model, processor, method):
        sized = processor._get_num_multimodal_tokens(image_sizes=[size])
    assert sized.num_image_tokens == [13 * views]


@pytest.mark.parametrize(
    "method",
    [
        VisionZip(tokens=10, send_cls=False),
        VisionZip(dominant=7, contextual=0),
        VisionZip(dominant=1, contextual=6),
        VisionZip(tokens=9, merge="average"),
        VisionZip(tokens=1),
        VisionZip(total_tokens=64),
        VisionZip(total_tokens=64, send_cls=False, order="raster"),
        VisionZip(tokens=65),
    ],
    ids=str,
)
def test_images_of_different_size_in_one_prompt(pair: tuple[Any, Any], method: VisionZip) -> None:
    sizes = [SIZES["1x2"], SIZES["2x2"], SIZES["3x1"]]
    _, last = compare(*pair, method, [image(i, *size) for i, size in enumerate(sizes)])
    assert [len(one.dominant) for one in last] == [3, 5, 4]


def test_a_tower_without_cls_token() -> None:
    model, processor = build(tower="siglip")
    for order in ("grouped", "raster"):
        method = VisionZip(tokens=12, order=order)
        _, last = compare(model, processor, method, [image(1, *SIZES["2x2"]), image(2, *SIZES["1x3"])])
        assert [len(one.dominant) for one in last] == [5, 4]


def test_the_order_is_the_references() -> None:
    """Worked by hand: 1 x 2 crops of CLS and 2 x 2 patches; one token of the four kept is contextual."""
    dominant = torch.tensor([[0, 2, 3], [0, 1, 4]])  # patches (0, 1), (1, 0) and (0, 0), (1, 1)
    contextual = torch.tensor([[1], [2]])
    grouped = torch.tensor([[0, 3, 1, 2, 3], [0, 1, 3, 3, 2]])
    out = ZipOutput(torch.zeros(2, 4, 1), dominant, contextual, grouped)
    order = crop_order(out, (1, 2), (2, 2), True, "grouped").tolist()
    # First rows of both crops, second rows of both, CLS tokens, contextual tokens.
    assert order == [1, 5, 2, 6, 0, 4, 3, 7]
    raster = torch.tensor([[0, 1, 2, 3, 1], [0, 1, 2, 2, 3]])
    out = ZipOutput(torch.zeros(2, 4, 1), dominant, contextual, raster)
    assert crop_order(out, (1, 2), (2, 2), True, "raster").tolist() == [1, 2, 5, 6, 3, 7, 0, 4]


def test_crops_stand_above_each_other_in_a_column() -> None:
    kept = torch.tensor([[1, 2], [0, 3]])
    out = keep_tokens(torch.zeros(2, 4, 1), kept)
    assert crop_order(out, (2, 1), (2, 2), False, "grouped").tolist() == [0, 1, 2, 3]
    assert crop_order(out, (1, 2), (2, 2), False, "grouped").tolist() == [0, 2, 1, 3]


@pytest.mark.parametrize("method", [Random(tokens=11), Uniform(tokens=11), Random(tokens=1)], ids=str)
def test_methods_without_contextual_tokens(pair: tuple[Any, Any], method: Any) -> None:
    """What reaches the LLM are the projected tokens at the recorded indices, in the documented order."""
    model, processor = pair
    picture = image(1, *SIZES["2x2"])
    with compress(model, processor, method) as zipped, torch.no_grad():
        inputs = processor(text="<image>", images=picture, return_tensors="pt")
        (found,) = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output
        (last,) = zipped.last
    assert int(placeholders(model, inputs["input_ids"]).sum()) == len(found) == 5 * method.tokens
    with torch.no_grad():
        states = model.model.vision_tower(inputs["pixel_values"][0], output_hidden_states=True)
        tokens = model.model.multi_modal_projector(states.hidden_states[-2])
    crops = [(v, int(i)) for v in range(1, 5) for i in last.dominant[v]]
    patches = sorted(
        ((v - 1) // 2 * 8 + (i - 1) // 8, (v - 1) % 2 * 8 + (i - 1) % 8, v, i) for v, i in crops if i
    )
    expected = [tokens[0, i] for i in last.dominant[0]]
    expected += [tokens[v, i] for _, _, v, i in patches] + [tokens[v, i] for v, i in crops if i == 0]
    torch.testing.assert_close(found, torch.stack(expected), **TOLERANCE)


def test_padding_views_are_not_encoded(pair: tuple[Any, Any]) -> None:
    """An image with few crops in a batch with a larger one: what pads its pixels must not matter."""
    model, processor = pair
    method = VisionZip(tokens=12)
    with compress(model, processor, method) as zipped, torch.no_grad():
        inputs = processor(
            text=["<image> a", "<image> b"],
            images=[image(1, *SIZES["1x2"]), image(2, *SIZES["2x2"])],
            padding=True,
            return_tensors="pt",
        )
        assert inputs["pixel_values"].shape[:2] == (2, 5)
        logits = model(**inputs).logits
        assert [len(one.dominant) for one in zipped.last] == [3, 5]
        seen: list[int] = []
        tower = model.model.vision_tower
        handle = tower.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
        inputs["pixel_values"][0, 3:] = 7.0
        assert torch.equal(model(**inputs).logits, logits)
        handle.remove()
    assert seen == [8]


def test_views_one_after_the_other(pair: tuple[Any, Any]) -> None:
    """Pixels [views of all images, C, H, W] instead of a padded batch."""
    model, processor = pair
    with compress(model, processor, VisionZip(tokens=12)), torch.no_grad():
        inputs = processor(
            text="<image><image>",
            images=[image(1, *SIZES["1x2"]), image(2, *SIZES["2x2"])],
            return_tensors="pt",
        )
        expected = model(**inputs).logits
        pixels = inputs["pixel_values"]
        inputs["pixel_values"] = torch.cat([pixels[0, :3], pixels[1]])
        assert torch.equal(model(**inputs).logits, expected)


def test_batches_do_not_change_an_image(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    pictures = [image(1, *SIZES["1x2"]), image(2, *SIZES["2x2"]), image(3, *SIZES["1x3"])]
    with compress(model, processor, VisionZip(tokens=12)), torch.no_grad():
        together = processor.image_processor(pictures, return_tensors="pt")
        found = model.get_image_features(**together).pooler_output
        for picture, one in zip(pictures, found, strict=True):
            alone = processor.image_processor([picture], return_tensors="pt")
            (expected,) = model.get_image_features(**alone).pooler_output
            torch.testing.assert_close(one, expected, **TOLERANCE)


# --- budgets ----------------------------------------------------------------------------------


def published() -> Any:
    """The family fitted to the published checkpoints' layout: 5 views of 577 tokens."""
    return family_of(LlavaNextConfig())


@pytest.mark.parametrize(("total", "k"), [(640, 128), (320, 64), (160, 32), (643, 128)])
def test_the_papers_totals(total: int, k: int) -> None:
    family = published()
    method = VisionZip(total_tokens=total)
    assert family.anyres.most_views == 5
    assert family.sized_image_tokens(method, 0, (672, 672)) == 5 * k
    assert family.sized_image_tokens(method, 0, (300, 600)) == 3 * k
    assert family.sized_image_tokens(VisionZip(tokens=k), 0, (1008, 336)) == 4 * k


def test_totals_given_as_a_view_s_budget_are_explained() -> None:
    with pytest.raises(ValueError, match=r"up to 5 views.*total_tokens=640 or tokens=128"):
        published().attachment(VisionZip(dominant=540, contextual=100))
    with pytest.raises(ValueError, match=r"total_tokens=2880 or tokens=576"):
        published().attachment(VisionZip(tokens=2880))
    with pytest.raises(ValueError, match=r"give a budget of 577 or fewer$"):
        published().attachment(VisionZip(tokens=6000))
    with pytest.raises(ValueError, match="under 2 tokens for each of up to 5 views"):
        published().attachment(VisionZip(total_tokens=9))


def test_more_views_share_a_total() -> None:
    grids = [[336, 672], [1344, 1344]]
    assert family_of(LlavaNextConfig(image_grid_pinpoints=grids)).anyres.most_views == 17
    with pytest.raises(ValueError, match="up to 17 views"):
        family_of(LlavaNextConfig(image_grid_pinpoints=grids)).attachment(VisionZip(total_tokens=33))


# --- refused, or understood ---------------------------------------------------------------------


def test_configs_that_cannot_be_compressed() -> None:
    siglip = SiglipVisionConfig(image_size=336, patch_size=14)
    with pytest.raises(UnsupportedModelError, match="an image patch would be lost"):
        family_of(LlavaNextConfig(vision_config=siglip))
    with pytest.raises(UnsupportedModelError, match="multiples of the vision tower's image size 336"):
        family_of(LlavaNextConfig(image_grid_pinpoints=[[336, 500]]))
    with pytest.raises(UnsupportedModelError, match="got none"):
        family_of(LlavaNextConfig(image_grid_pinpoints=[]))


@pytest.mark.parametrize("layer", [-1, -3, 2, [-3, -2]])
def test_other_layers(layer: Any) -> None:
    model, processor = build()
    config = copy.deepcopy(model.config)
    config.vision_feature_layer = layer
    torch.manual_seed(0)
    model = type(model)(config).eval()
    compare(model, processor, VisionZip(tokens=12), [image(1, *SIZES["2x2"])])


def test_a_processor_of_another_model(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    other = copy.deepcopy(processor)
    other.image_processor.image_grid_pinpoints = [[112, 224]]
    with pytest.raises(ValueError, match=r"image_grid_pinpoints .* are not the model's"):
        compress(model, other, VisionZip(tokens=12))
    other = copy.deepcopy(processor)
    other.patch_size = 7
    with pytest.raises(ValueError, match="its patch size, image size"):
        compress(model, other, VisionZip(tokens=12))
    other = copy.deepcopy(processor)
    other.num_additional_image_tokens = 0
    with pytest.raises(ValueError, match="num_additional_image_tokens"):
        compress(model, other, VisionZip(tokens=12))
    with pytest.raises(ValueError, match="are another model's"):
        compress(model, build(image_size=56)[1], VisionZip(tokens=12))


def test_pinpoints_of_one_call(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    with (
        compress(model, processor, VisionZip(tokens=12)),
        pytest.raises(ValueError, match="leave them as this model's processor has them"),
    ):
        processor(
            text="<image>",
            images=image(1, *SIZES["2x2"]),
            images_kwargs={"image_grid_pinpoints": [[112, 112]]},
        )


def test_pixels_and_sizes_that_do_not_fit(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    with compress(model, processor, VisionZip(tokens=12)):
        inputs = processor(text="<image>", images=image(1, *SIZES["2x2"]), return_tensors="pt")
        pixels, sizes = inputs["pixel_values"], inputs["image_sizes"]
        with pytest.raises(ValueError, match="do not fit image_sizes"):
            model.get_image_features(pixels[:, :3], sizes)
        with pytest.raises(ValueError, match="do not fit image_sizes"):
            model.get_image_features(pixels[0, :3], sizes)
        with pytest.raises(ValueError, match="do not fit image_sizes"):
            model.get_image_features(pixels, sizes.repeat(2, 1))
        with pytest.raises(ValueError, match="image_sizes is missing"):
            model(input_ids=inputs["input_ids"], pixel_values=pixels)
        with pytest.raises(ValueError, match="leave the argument out"):
            model(**inputs, vision_feature_select_strategy="full")
        with pytest.raises(ValueError, match="differs from -2"):
            model(**inputs, vision_feature_layer=-1)


def test_prompts_without_images(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    with compress(model, processor, VisionZip(tokens=12)):
        assert processor(text="no image").input_ids
        processor(text="<image>" * 36)
        for wrong in (1, 12, 25):
            with pytest.raises(ValueError, match="no images were given"):
                processor(text="<image>" * wrong)
        with pytest.raises(ValueError, match="1 <image> placeholders for 2 images"):
            processor(text="<image>", images=[image(1), image(2)])


def test_packing_outside_a_forward_is_stock(pair: tuple[Any, Any]) -> None:
    model, _ = pair
    views, sizes = torch.randn(3, 64, 64), torch.tensor([[100, 200]])
    given = {"vision_feature_select_strategy": "default", "image_newline": model.model.image_newline}
    with torch.no_grad():
        (expected,), _ = model.pack_image_features([views], sizes, **given)
        with compress(model, None, VisionZip(tokens=12)):
            (found,), _ = model.pack_image_features([views], sizes, **given)
    assert torch.equal(found, expected)


def test_family_and_processor_pickle(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    picture = image(1, *SIZES["3x1"])
    with compress(model, processor, VisionZip(tokens=12)):
        twin = pickle.loads(pickle.dumps(processor))
        expected = processor(text="<image>", images=picture)["input_ids"]
        assert twin(text="<image>", images=picture)["input_ids"] == expected


def test_anyres_agrees_with_transformers() -> None:
    from transformers.models.llava_next.modeling_llava_next import (
        get_anyres_image_grid_shape,
        image_size_to_num_patches,
    )

    config = LlavaNextConfig()
    anyres = Anyres.from_config(config)
    pinpoints = config.image_grid_pinpoints
    for height in (1, 37, 335, 336, 337, 500, 672, 1008, 2000):
        for width in (1, 50, 336, 671, 673, 900, 1009, 3000):
            size = (height, width)
            assert anyres.grid(size) == get_anyres_image_grid_shape(size, pinpoints, 336)
            assert anyres.views(size) == image_size_to_num_patches(size, pinpoints, 336)
