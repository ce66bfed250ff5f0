"""Loading a Mini-Gemini from the published layout ("MGM": config.json, weight shards, tokenizer)."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import AddedToken
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    GenerationConfig,
    LlavaImageProcessorPil,
)

from vlmzip.errors import UnsupportedModelError
from vlmzip.mini_gemini.configuration import MiniGeminiConfig
from vlmzip.mini_gemini.modeling import MiniGeminiForConditionalGeneration
from vlmzip.mini_gemini.processing import MiniGeminiProcessor

IMAGE_TOKEN = "<image>"
Weights = dict[str, Tensor]

_LANGUAGE_MODELS = {"mgm": "llama", "mini_gemini": "llama", "mgm_gemma": "gemma"}
_EXPECTED = {
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "image_grid": 1,
    "image_global": False,
}
_AUX = r"model\.vision_tower_aux\.vision_"
_HIGH = "model.high_vision_tower"
_BLOCK = rf"{_AUX}stages\.(\d+)\.blocks\.(\d+)\."
_STAGE = rf"{_HIGH}.stages.\1.layers.\2."
_RENAMES = (
    (r"lm_head\.(.+)", r"lm_head.\1"),
    (r"model\.(embed_tokens|norm|layers)\.(.+)", r"model.language_model.\1.\2"),
    (r"model\.vision_tower\.vision_tower\.vision_model\.(.+)", r"model.vision_tower.\1"),
    (rf"{_AUX}stem\.0\.(.+)", rf"{_HIGH}.embeddings.patch_embeddings.\1"),
    (rf"{_AUX}stem\.1\.(.+)", rf"{_HIGH}.embeddings.layernorm.\1"),
    (rf"{_AUX}stages\.(\d+)\.downsample\.(\d)\.(.+)", rf"{_HIGH}.stages.\1.downsampling_layer.\2.\3"),
    (rf"{_BLOCK}conv_dw\.(.+)", rf"{_STAGE}dwconv.\3"),
    (rf"{_BLOCK}norm\.(.+)", rf"{_STAGE}layernorm.\3"),
    (rf"{_BLOCK}mlp\.fc(\d)\.(.+)", rf"{_STAGE}pwconv\3.\4"),
    (rf"{_BLOCK}gamma", rf"{_STAGE}layer_scale_parameter"),
    (r"model\.vlm_uni_query_projector\.(.+)", r"model.mining.query.\1"),
    (r"model\.vlm_uni_aux_projector\.(.+)", r"model.mining.key.\1"),
    (r"model\.vlm_uni_val_projector\.(.+)", r"model.mining.value.\1"),
    (r"model\.mm_projector\.0\.(.+)", r"model.multi_modal_projector.linear_1.\1"),
    (r"model\.mm_projector\.2\.(.+)", r"model.multi_modal_projector.linear_2.\1"),
)
_NOT_WEIGHTS = re.compile(r".*(rotary_emb\.inv_freq|embeddings\.position_ids)")
_OPEN_CLIP = re.compile(r"visual\.trunk\.(stem|stages)\.(.+)")


def load_published(
    folder: str | Path,
    vision_tower: str | Path | None = None,
    high_vision_tower: str | Path | None = None,
    dtype: torch.dtype = torch.float16,
) -> tuple[MiniGeminiForConditionalGeneration, MiniGeminiProcessor]:
    """Load a published checkpoint; save what you get with ``save_pretrained`` to load it like others.

    Args:
        folder: The checkpoint: config.json, ``*.safetensors`` or ``pytorch_model*.bin``, tokenizer.
        vision_tower: Folder of the CLIP that it was trained on, if its weights are not in ``folder``.
        high_vision_tower: ``open_clip_pytorch_model.bin`` of the ConvNeXt, if its are not.
        dtype: Of the loaded model.

    Returns:
        The model, in eval mode, and its processor, with a chat template only if the tokenizer has one.

    Raises:
        ValueError: Files or weights are missing, or a weight has no place in the model.
        UnsupportedModelError: The checkpoint is of a variant that is not supported, such as HD.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; give the folder of a published checkpoint")
    published = json.loads((folder / "config.json").read_text())
    _check_variant(published)
    weights = {rename(name): tensor for name, tensor in _read(folder) if not _NOT_WEIGHTS.match(name)}
    _add_low_tower(weights, vision_tower)
    _add_high_tower(weights, high_vision_tower)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
    image_token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    text = _text_config(published)
    _add_image_token(weights, text, image_token)
    if text.model_type == "gemma":
        _scale_projector(weights, text.hidden_size**0.5)
    config = MiniGeminiConfig(
        text_config=text,
        vision_config=_clip_config(weights, vision_tower),
        high_vision_config=_convnext_config(weights),
        high_image_size=published.get("image_size_aux", 320),
        vision_feature_layer=published.get("mm_vision_select_layer", -2),
        image_token_index=image_token,
        tie_word_embeddings="lm_head.weight" not in weights,
    )
    model = _filled(config, weights, dtype)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model, _processor(config, published, tokenizer)


def rename(name: str) -> str:
    """The name in our model of a weight of the published layout.

    Raises:
        ValueError: It has none.
    """
    for pattern, target in _RENAMES:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(target)
    raise ValueError(
        f"the weight {name!r} is not one of a Mini-Gemini; is this a checkpoint in the published layout?"
    )


def _check_variant(published: Mapping[str, Any]) -> None:
    kind = published.get("model_type")
    if kind not in _LANGUAGE_MODELS:
        raise UnsupportedModelError(
            f"a checkpoint of model_type {kind!r} is not supported; supported: "
            f"{', '.join(_LANGUAGE_MODELS)}"
        )
    for name, expected in _EXPECTED.items():
        if (found := published.get(name, expected)) != expected:
            raise UnsupportedModelError(
                f"{name}={found!r} is not supported, only {expected!r}; HD checkpoints (image_grid=2) "
                "and other variants cannot be loaded"
            )


def _read(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the checkpoint's shards."""
    safe = sorted(folder.glob("model*.safetensors"))
    pickled = sorted(folder.glob("pytorch_model*.bin"))
    if not safe and not pickled:
        raise ValueError(f"{folder} has neither model*.safetensors nor pytorch_model*.bin")
    for file in safe or pickled:
        shard = load_file(file) if safe else torch.load(file, map_location="cpu", weights_only=True)
        yield from shard.items()


def _add_low_tower(weights: Weights, folder: str | Path | None) -> None:
    """Fill in what the checkpoint lacks of the CLIP tower; its own weights count more."""
    if folder is not None:
        for name, tensor in CLIPVisionModel.from_pretrained(folder).state_dict().items():
            weights.setdefault(f"model.vision_tower.{name}", tensor)
    if "model.vision_tower.embeddings.patch_embedding.weight" not in weights:
        raise ValueError(
            "the checkpoint does not hold the CLIP tower; give the folder of the CLIP that it was "
            "trained on as vision_tower="
        )


def _add_high_tower(weights: Weights, file: str | Path | None) -> None:
    """Fill in what the checkpoint lacks of the ConvNeXt, from an OpenCLIP file."""
    if file is not None:
        for name, tensor in torch.load(file, map_location="cpu", weights_only=True).items():
            if match := _OPEN_CLIP.fullmatch(name):
                part, rest = match.groups()
                weights.setdefault(rename(f"model.vision_tower_aux.vision_{part}.{rest}"), tensor)
    if f"{_HIGH}.embeddings.patch_embeddings.weight" not in weights:
        raise ValueError(
            "the checkpoint does not hold the ConvNeXt tower; give the open_clip_pytorch_model.bin of "
            "the ConvNeXt that it was trained on as high_vision_tower="
        )


def _clip_config(weights: Weights, folder: str | Path | None) -> CLIPVisionConfig:
    """The given CLIP's, or what the shapes tell; OpenAI's CLIPs have heads of 64."""
    if folder is not None:
        return CLIPVisionConfig.from_pretrained(folder)
    tower = "model.vision_tower."
    width, _, patch, _ = weights[f"{tower}embeddings.patch_embedding.weight"].shape
    tokens = len(weights[f"{tower}embeddings.position_embedding.weight"])
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=len(weights[f"{tower}encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=_count(weights, rf"{tower}encoder\.layers\.(\d+)\..+"),
        num_attention_heads=width // 64,
        patch_size=patch,
        image_size=int((tokens - 1) ** 0.5) * patch,
    )


def _convnext_config(weights: Weights) -> ConvNextConfig:
    stages = range(_count(weights, rf"{_HIGH}\.stages\.(\d+)\..+"))
    names = [rf"{_HIGH}\.stages\.{stage}\.layers\.(\d+)\..+" for stage in stages]
    norms = [f"{_HIGH}.stages.{stage}.layers.0.layernorm.weight" for stage in stages]
    return ConvNextConfig(
        num_stages=len(stages),
        hidden_sizes=[len(weights[name]) for name in norms],
        depths=[_count(weights, name) for name in names],
        patch_size=weights[f"{_HIGH}.embeddings.patch_embeddings.weight"].shape[-1],
    )


def _count(weights: Weights, pattern: str) -> int:
    """How many there are of what the pattern numbers."""
    found = [re.fullmatch(pattern, name) for name in weights]
    return len({match[1] for match in found if match})


def _text_config(published: Mapping[str, Any]) -> Any:
    config = CONFIG_MAPPING[_LANGUAGE_MODELS[published["model_type"]]]
    names = {field.name for field in fields(config)} | {"rope_theta", "rope_scaling"}
    names -= {"architectures", "dtype", "transformers_version"}
    return config(**{name: value for name, value in published.items() if name in names})


def _add_image_token(weights: Weights, text: Any, image_token: int) -> None:
    """Rows for a token that the published models do not have in their vocabulary.

    They are the mean row: a mean of logits is never the largest, so the token is never generated.
    """
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        if name in weights and (new := image_token + 1 - len(weights[name])) > 0:
            rows = weights[name]
            mean = rows.float().mean(0, keepdim=True).to(rows.dtype)
            weights[name] = torch.cat([rows, mean.expand(new, -1)])
    text.vocab_size = len(weights["model.language_model.embed_tokens.weight"])


def _scale_projector(weights: Weights, factor: float) -> None:
    """The published Gemma scales what it is given as embeddings; transformers' scales tokens alone."""
    for name in ("weight", "bias"):
        name = f"model.multi_modal_projector.linear_2.{name}"
        weights[name] = (weights[name].float() * factor).to(weights[name].dtype)


def _filled(config: MiniGeminiConfig, weights: Weights, dtype: torch.dtype) -> Any:
    model, info = MiniGeminiForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
    )
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if wrong:
        raise ValueError(f"the checkpoint does not fill the model exactly: {wrong}")
    return model.eval()


def _processor(config: MiniGeminiConfig, published: Mapping[str, Any], tokenizer: Any) -> Any:
    side = config.high_image_size
    return MiniGeminiProcessor(
        image_processor=LlavaImageProcessorPil(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            do_pad=published.get("image_aspect_ratio") == "pad",
        ),
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        chat_template=getattr(tokenizer, "chat_template", None),
        low_image_size=config.vision_config.image_size,
    )
