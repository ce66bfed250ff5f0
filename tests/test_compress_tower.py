"""compress_tower(): CLIP, SigLIP and SigLIP 2 on their own."""

import pytest
import torch
from transformers import (
    CLIPVisionModel,
    LlamaConfig,
    LlamaModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionModel,
)

import reference
from vlmzip import UnsupportedModelError, VisionZip, compress, compress_tower
from vlmzip.tiny.random import parts
from vlmzip.tiny.random.llava import build


def make(kind):
    torch.manual_seed(0)
    if kind == "clip":
        return CLIPVisionModel(parts.clip_config(112)).eval()
    return SiglipVisionModel(parts.siglip_config(112)).eval()


def naflex():
    torch.manual_seed(0)
    config = Siglip2VisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        patch_size=14,
        num_patches=64,
    )
    return Siglip2VisionModel(config).eval()


def qk(tower, block, pixels, **kwargs):
    """The layer's own projections, [B, H, N, d]: read by plain hooks, apart from the tap."""
    seen = {}
    attention = tower.encoder.layers[block].self_attn
    hooks = [
        getattr(attention, name).register_forward_hook(
            lambda _m, _i, out, name=name: seen.update({name: out})
        )
        for name in ("q_proj", "k_proj")
    ]
    hidden = tower(pixels, output_hidden_states=True, **kwargs).hidden_states
    for hook in hooks:
        hook.remove()
    split = [
        seen[n].unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for n in ("q_proj", "k_proj")
    ]
    return *split, attention.scale, hidden


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("layer", [-2, -1, 2])
@torch.no_grad()
def test_equals_the_formulae(kind, layer):
    tower, pixels = make(kind), torch.randn(2, 3, 112, 112)
    block = layer % 5 - 1
    q, k, scale, hidden = qk(tower, block, pixels)
    cls = kind == "clip"
    zipped = compress_tower(tower, VisionZip(tokens=16), layer=layer)
    out = zipped(pixels)
    weights = (q @ k.transpose(-1, -2) * scale).softmax(-1)
    scores = weights[:, :, 0].mean(1) if cls else weights.mean((1, 2))
    torch.testing.assert_close(out.scores, scores, rtol=1e-4, atol=1e-6)
    want = reference.zip_tokens(
        hidden[layer],
        scores,
        k.mean(1),
        dominant=14,
        contextual=2,
        cls_token=cls,
        merge="reference",
        order="grouped",
    )
    torch.testing.assert_close(
        out.tokens, torch.as_tensor(want.tokens, dtype=torch.float32), rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_siglip2_compresses_each_image_as_if_alone():
    tower = naflex()
    shapes = torch.tensor([[8, 8], [4, 12], [6, 7]])
    sizes = shapes.prod(1).tolist()
    patches = torch.zeros(3, 64, 14 * 14 * 3)
    mask = torch.zeros(3, 64, dtype=torch.int64)
    for i, size in enumerate(sizes):
        patches[i, :size] = torch.randn(size, 14 * 14 * 3)
        mask[i, :size] = 1
    zipped = compress_tower(tower, VisionZip(tokens=16))
    out = zipped(patches, pixel_attention_mask=mask, spatial_shapes=shapes)
    assert out.tokens.shape == (3, 16, 64)
    for i, size in enumerate(sizes):
        alone = zipped(
            patches[i : i + 1, :size],
            pixel_attention_mask=mask[i : i + 1, :size],
            spatial_shapes=shapes[i : i + 1],
        )
        torch.testing.assert_close(out.tokens[i], alone.tokens[0], rtol=1e-4, atol=1e-4)
        assert out.dominant[i].tolist() == alone.dominant[0].tolist()
        assert (out.assignment[i, size:] == -1).all()
        q, k, scale, _ = qk(
            tower,
            2,
            patches[i : i + 1, :size],
            pixel_attention_mask=mask[i : i + 1, :size],
            spatial_shapes=shapes[i : i + 1],
        )
        received = (q @ k.transpose(-1, -2) * scale).softmax(-1).mean((0, 1, 2))
        torch.testing.assert_close(out.scores[i, :size], received, rtol=1e-4, atol=1e-6)


def test_siglip2_wants_its_arguments_and_equal_counts():
    zipped = compress_tower(naflex(), VisionZip(keep=0.5))
    with pytest.raises(ValueError, match="spatial_shapes"):
        zipped(torch.zeros(1, 64, 588))
    shapes = torch.tensor([[8, 8], [4, 4]])
    mask = torch.ones(2, 64, dtype=torch.int64)
    mask[1, 16:] = 0
    with pytest.raises(ValueError, match="different numbers"):
        zipped(torch.randn(2, 64, 588), pixel_attention_mask=mask, spatial_shapes=shapes)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_tower_itself_works_as_before(kind):
    tower, pixels = make(kind), torch.randn(1, 3, 112, 112)
    names = set(vars(tower.encoder.layers[2].self_attn))
    before = tower(pixels).last_hidden_state
    zipped = compress_tower(tower, VisionZip(tokens=8))
    assert zipped(pixels).tokens.shape == (1, 8, 64)
    assert torch.equal(tower(pixels).last_hidden_state, before)
    zipped.remove()
    zipped.remove()
    assert torch.equal(tower(pixels).last_hidden_state, before)
    assert set(vars(tower.encoder.layers[2].self_attn)) == names
    with pytest.raises(RuntimeError, match="removed"):
        zipped(pixels)


def test_bad_input():
    with pytest.raises(TypeError, match="vision model"):
        compress_tower(torch.nn.Linear(2, 2), VisionZip(tokens=4))
    with pytest.raises(TypeError, match="method"):
        compress_tower(make("clip"), 64)
    with pytest.raises(ValueError, match="65 tokens"):
        compress_tower(make("clip"), VisionZip(tokens=66))
    with pytest.raises(UnsupportedModelError, match="llama"):
        compress_tower(
            LlamaModel(
                LlamaConfig(
                    hidden_size=8,
                    num_hidden_layers=1,
                    num_attention_heads=1,
                    intermediate_size=8,
                    vocab_size=8,
                )
            ),
            VisionZip(tokens=4),
        )
    with pytest.raises(UnsupportedModelError, match="does not exist"):
        compress_tower(make("clip"), VisionZip(tokens=4), layer=7)
    model, _ = build(image_size=112)
    with (
        compress(model, None, VisionZip(tokens=4)),
        pytest.raises(ValueError, match="already compressed"),
    ):
        compress_tower(model.model.vision_tower, VisionZip(tokens=4))
    zipped = compress_tower(model.model.vision_tower, VisionZip(tokens=4))
    with pytest.raises(ValueError, match="already compressed"):
        compress(model, None, VisionZip(tokens=4))
    zipped.remove()
    compress(model, None, VisionZip(tokens=4)).remove()
    for first, second in ((-2, -3), (-3, -2), (-2, -1)):
        tower = make("clip")
        names = [set(vars(module)) for module in tower.modules()]
        zipped = compress_tower(tower, VisionZip(tokens=4), layer=first)
        with pytest.raises(ValueError, match="already compressed"):
            compress_tower(tower, VisionZip(tokens=4), layer=second)
        assert zipped(torch.randn(1, 3, 112, 112)).tokens.shape == (1, 4, 64)
        zipped.remove()
        left = zip(names, (set(vars(module)) for module in tower.modules()), strict=True)
        assert all(now - before <= {"_output_capturing_hooks_installed"} for before, now in left)
    tower = make("clip")
    compress_tower(tower, VisionZip(tokens=4))
    with pytest.raises(ValueError, match="already compressed"):
        compress_tower(tower, VisionZip(tokens=4))
