"""Loading the published layout: a checkpoint written in it, by a model written from its description.

The layout's own ConvNeXt, mining and splicing are written out here a second time, on plain tensors, so
that a wrong name, transposition, scale or order in the loader shows in the logits.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import gelu, interpolate, layer_norm, linear
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaForCausalLM,
)
from typer.testing import CliRunner

from contract import image
from vlmzip import UnsupportedModelError, VisionZip, compress
from vlmzip.mini_gemini.__main__ import main
from vlmzip.mini_gemini.conversion import load_published, rename
from vlmzip.tiny.random import parts

CHANNELS, DEPTHS, HIGH = (8, 16, 24, 32), (1, 2, 1, 1), 96
Weights = dict[str, Tensor]


class ChannelNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Block(nn.Module):
    """A ConvNeXt block under the names of the published weights."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(channels, 4 * channels), "fc2": nn.Linear(4 * channels, channels)}
        )
        self.gamma = nn.Parameter(torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv_dw(x).movedim(1, -1))
        return x + (self.gamma * self.mlp["fc2"](gelu(self.mlp["fc1"](y)))).movedim(-1, 1)


class Aux(nn.Module):
    """The high-resolution tower under the names of the published weights."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_stem = nn.Sequential(
            nn.Conv2d(3, CHANNELS[0], 4, 4), ChannelNorm(CHANNELS[0], eps=1e-6)
        )
        self.vision_stages = nn.ModuleList()
        for index, (channels, depth) in enumerate(zip(CHANNELS, DEPTHS, strict=True)):
            stage = nn.ModuleDict({"blocks": nn.Sequential(*(Block(channels) for _ in range(depth)))})
            if index:
                before = CHANNELS[index - 1]
                stage["downsample"] = nn.Sequential(
                    ChannelNorm(before, eps=1e-6), nn.Conv2d(before, channels, 2, 2)
                )
            self.vision_stages.append(stage)

    def forward(self, pixels: Tensor) -> Tensor:
        x, maps = self.vision_stem(pixels), []
        for stage in self.vision_stages:
            x = stage["blocks"](stage["downsample"](x) if "downsample" in stage else x)
            maps.append(interpolate(x, scale_factor=maps[0].shape[-1] / x.shape[-1] if maps else 1.0,
                                    mode="bilinear", align_corners=False))  # fmt: skip
        return torch.cat(maps, 1)


class Published:
    """A Mini-Gemini as published: its checkpoint, and its logits."""

    def __init__(self, llm: str = "llama", heads: int = 1) -> None:
        torch.manual_seed(1)
        self.tokenizer = parts.tokenizer()
        vocab = len(self.tokenizer)
        if llm == "llama":
            self.llm: Any = LlamaForCausalLM(parts.llama_config(vocab))
        else:
            config = GemmaConfig(
                vocab_size=vocab, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=1, head_dim=32, pad_token_id=0,
            )  # fmt: skip
            self.llm = GemmaForCausalLM(config)
        self.gemma = llm == "gemma"
        config = CLIPVisionConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=heads,
            image_size=112, patch_size=14,
        )  # fmt: skip
        self.clip, self.aux = CLIPVisionModel(config).eval(), Aux().eval()
        sizes = {
            "mm_projector.0": (64, 64), "mm_projector.2": (64, 64),
            "vlm_uni_query_projector.1": (64, 64), "vlm_uni_aux_projector.1": (64, sum(CHANNELS)),
            "vlm_uni_val_projector.1": (64, sum(CHANNELS)),
        }  # fmt: skip
        self.rest: Weights = {}
        for name, (rows, columns) in sizes.items():
            self.rest[f"{name}.weight"] = torch.randn(rows, columns) / math.sqrt(columns)
            self.rest[f"{name}.bias"] = torch.randn(rows)
            if "uni" in name:
                norm = name.replace(".1", ".0")
                self.rest[f"{norm}.weight"] = torch.rand(columns) + 0.5
                self.rest[f"{norm}.bias"] = torch.randn(columns)

    def weights(self) -> Weights:
        found = dict(self.llm.state_dict())
        if self.gemma:
            del found["lm_head.weight"]
        prefix = "model.vision_tower.vision_tower.vision_model."
        found |= {f"{prefix}{name}": tensor for name, tensor in self.clip.state_dict().items()}
        found[f"{prefix}embeddings.position_ids"] = torch.arange(65)[None]
        found |= {f"model.vision_tower_aux.{n}": tensor for n, tensor in self.aux.state_dict().items()}
        found |= {f"model.{name}": tensor for name, tensor in self.rest.items()}
        return {name: tensor.clone() for name, tensor in found.items()}

    def write(self, folder: Path, weights: Weights | None = None, **changes: Any) -> Path:
        weights = self.weights() if weights is None else weights
        folder.mkdir(exist_ok=True)
        names = sorted(weights)
        for part in range(2):
            shard = {name: weights[name] for name in names[part::2]}
            save_file(shard, folder / f"model-0000{part + 1}-of-00002.safetensors")
        config = self.llm.config.to_dict() | {
            "model_type": "mgm_gemma" if self.gemma else "mgm",
            "architectures": ["MGMLlamaForCausalLM"],
            "mm_vision_tower": "model_zoo/OpenAI/clip",
            "mm_vision_tower_aux": "model_zoo/OpenAI/convnext",
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch",
            "mm_use_im_start_end": False,
            "image_size_aux": HIGH,
        }
        (folder / "config.json").write_text(json.dumps(config | changes))
        self.tokenizer.save_pretrained(folder)
        return folder

    def uni(self, kind: str, x: Tensor) -> Tensor:
        name = f"vlm_uni_{kind}_projector"
        rest = self.rest
        normed = layer_norm(x, x.shape[-1:], rest[f"{name}.0.weight"], rest[f"{name}.0.bias"])
        return linear(normed, rest[f"{name}.1.weight"], rest[f"{name}.1.bias"])

    def image_features(self, high: Tensor) -> Tensor:
        """[64, D] of one image [3, H, W], at high resolution; the low one is scaled from it."""
        low = interpolate(high[None], size=(112, 112), mode="bilinear", align_corners=False)
        patches = self.clip(low, output_hidden_states=True).hidden_states[-2][0, 1:]
        features = self.aux(high[None])[0]
        side = features.shape[-1] // 8
        mined = []
        for index, patch in enumerate(patches):
            y, x = index // 8 * side, index % 8 * side
            pixels = features[:, y : y + side, x : x + side].flatten(1).T
            logits = self.uni("aux", pixels) @ self.uni("query", patch) / 8  # the root of 64
            mined.append(patch + logits.softmax(0) @ self.uni("val", pixels))
        first, second = (f"mm_projector.{i}" for i in (0, 2))
        hidden = linear(torch.stack(mined), self.rest[f"{first}.weight"], self.rest[f"{first}.bias"])
        return linear(gelu(hidden), self.rest[f"{second}.weight"], self.rest[f"{second}.bias"])

    @torch.no_grad()
    def logits(self, pieces: list[Any]) -> Tensor:
        """[T, V] of token ids and images [3, H, W] in turns."""
        rows = self.llm.model.embed_tokens.weight
        embeds = [self.image_features(p) if isinstance(p, Tensor) else rows[p] for p in pieces]
        scale = math.sqrt(64) if self.gemma else 1.0
        return self.llm(inputs_embeds=torch.cat(embeds)[None] * scale).logits[0]


def assert_same_logits(published: Published, model: Any, processor: Any) -> None:
    text = ["look: ", " and ", "?"]
    inputs = processor(images=[image(1), image(2, 70, 130)], text=["<image>".join(text)],
                       return_tensors="pt")  # fmt: skip
    words = [published.tokenizer(part, add_special_tokens=False)["input_ids"] for part in text]
    pixels = inputs["pixel_values_high"]
    expected = published.logits([words[0], pixels[0], words[1], pixels[1], words[2]])
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    vocab = expected.shape[-1]
    torch.testing.assert_close(logits[:, :vocab], expected, rtol=1e-4, atol=1e-4)
    assert (logits[:, vocab:].amax(-1) < logits[:, :vocab].amax(-1)).all(), "<image> is never likeliest"


@pytest.mark.parametrize("llm", ["llama", "gemma"])
def test_a_checkpoint_in_the_published_layout_gives_the_published_logits(
    tmp_path: Path, llm: str
) -> None:
    published = Published(llm)
    model, processor = load_published(published.write(tmp_path / "a"), dtype=torch.float32)
    assert_same_logits(published, model, processor)
    model.save_pretrained(tmp_path / "b")
    processor.save_pretrained(tmp_path / "b")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "b", dtype=torch.float32)
    assert_same_logits(published, again, AutoProcessor.from_pretrained(tmp_path / "b"))


def test_a_converted_checkpoint_is_compressed_like_any_other(tmp_path: Path) -> None:
    model, processor = load_published(Published().write(tmp_path), dtype=torch.float32)
    with compress(model, processor, VisionZip(tokens=12)) as zipped:
        inputs = processor(images=[image(1)], text=["<image>"], return_tensors="pt")
        model.generate(**inputs, max_new_tokens=2)
        assert inputs["input_ids"].shape == (1, 12)
        assert zipped.last[0].dominant.shape == (1, 10)


def test_towers_that_the_checkpoint_does_not_hold_come_from_their_own_files(tmp_path: Path) -> None:
    published = Published(heads=2)
    weights = {n: t for n, t in published.weights().items() if "vision_tower" not in n}
    folder = published.write(tmp_path / "mgm", weights)
    published.clip.save_pretrained(tmp_path / "clip")
    open_clip = {
        "visual.trunk." + name.removeprefix("vision_"): tensor
        for name, tensor in published.aux.state_dict().items()
    }
    file = tmp_path / "open_clip_pytorch_model.bin"
    torch.save(
        open_clip | {"visual.trunk.head.norm.weight": torch.ones(3), "logit_scale": torch.ones(1)}, file
    )
    with pytest.raises(ValueError, match="does not hold the CLIP tower"):
        load_published(folder, high_vision_tower=file)
    with pytest.raises(ValueError, match="does not hold the ConvNeXt tower"):
        load_published(folder, vision_tower=tmp_path / "clip")
    found = load_published(folder, tmp_path / "clip", file, dtype=torch.float32)
    assert_same_logits(published, *found)


def test_the_checkpoint_s_own_tower_counts_more_than_a_given_one(tmp_path: Path) -> None:
    published = Published(heads=2)
    folder = published.write(tmp_path / "mgm")
    other = CLIPVisionModel(published.clip.config)
    other.save_pretrained(tmp_path / "clip")
    found = load_published(folder, vision_tower=tmp_path / "clip", dtype=torch.float32)
    assert_same_logits(published, *found)


def test_pickled_shards_are_read_too(tmp_path: Path) -> None:
    published = Published()
    folder = published.write(tmp_path)
    for file in sorted(folder.glob("*.safetensors")):
        torch.save(load_file(file), folder / f"pytorch_{file.stem}.bin")
        file.unlink()
    assert_same_logits(published, *load_published(folder, dtype=torch.float32))


def test_images_are_padded_to_a_square_where_the_checkpoint_says_so(tmp_path: Path) -> None:
    published = Published()
    wide = [Image.new("RGB", (200, 100), "white")]
    for ratio, padded in (("pad", True), ("square", False)):
        folder = published.write(tmp_path / ratio, image_aspect_ratio=ratio)
        _, processor = load_published(folder)
        pixels = processor(images=wide, text=["<image>"], return_tensors="pt")["pixel_values_high"]
        assert (pixels[0, 0, 0, 0] < pixels[0, 0, HIGH // 2, 0]) == padded


def test_every_name_has_one_place_and_no_other_name_has() -> None:
    names = [n for n in Published().weights() if not n.endswith("position_ids")]
    assert len({rename(name) for name in names}) == len(names)
    with pytest.raises(ValueError, match=r"'model\.vision_fpn\.0\.weight' is not one of a Mini-Gemini"):
        rename("model.vision_fpn.0.weight")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_grid": 2}, "image_grid=2 is not supported"),
        ({"image_global": True}, "image_global=True is not supported"),
        ({"mm_projector_type": "linear"}, "mm_projector_type='linear'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end=True"),
        ({"model_type": "mgm_mixtral"}, "model_type 'mgm_mixtral'"),
    ],
    ids=str,
)
def test_variants_that_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = Published().write(tmp_path, {}, **changes)
    with pytest.raises(UnsupportedModelError, match=message):
        load_published(folder)


def test_checkpoints_that_are_not_whole(tmp_path: Path) -> None:
    published = Published()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_published(tmp_path / "nothing")
    weights = published.weights()
    del weights["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"does not fill the model exactly.*layers\.1\.mlp\.up_proj"):
        load_published(published.write(tmp_path / "gap", weights))
    folder = published.write(tmp_path / "empty")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match="has neither"):
        load_published(folder)


def test_the_command_converts_and_complains_in_one_line(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(main)
    folder = Published().write(tmp_path / "mgm")
    done = CliRunner().invoke(app, [str(folder), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert type(AutoProcessor.from_pretrained(tmp_path / "out")).__name__ == "MiniGeminiProcessor"
    failed = CliRunner().invoke(app, [str(tmp_path / "nothing"), str(tmp_path / "out")])
    assert failed.exit_code == 2
    assert failed.stderr.count("\n") == 1
