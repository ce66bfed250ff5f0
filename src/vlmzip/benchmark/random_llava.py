"""A LLaVA of any size with random weights, written shard by shard: never in memory as a whole.

    python -m vlmzip.benchmark.random_llava clip-l-3b OUT --dtype bfloat16

What a server computes does not depend on what its weights are worth, so speed can be measured on a
checkpoint that nobody had to download. Images have 336 x 336 pixels in 14 x 14 patches, as in
LLaVA-1.5, so that prompts are as long as the real ones in every shape.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from vlmzip.tiny.random import parts

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD_BYTES = 1 << 30


@dataclass(frozen=True)
class Shape:
    """Sizes of a vision tower (CLIP) and of a language model (Llama)."""

    tower_width: int
    tower_layers: int
    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int


SHAPES = {
    # CLIP-L, and a language model of the shape of Llama 3.2 3B but for its vocabulary.
    "clip-l-3b": Shape(1024, 24, 3072, 8192, 28, 24, 8),
    # About the same proportion of tower to language model, for machines without a GPU.
    "small": Shape(192, 12, 768, 2048, 12, 12, 12),
    "tiny": Shape(64, 4, 256, 512, 4, 4, 4),
}


def write(name: str, out: Path, dtype: str = "float32", seed: int = 0) -> None:
    """Write the checkpoint of a shape, with its processor.

    Args:
        name: A name in ``SHAPES``.
        out: The folder; made if it is not there.
        dtype: "float32", "bfloat16" or "float16".
        seed: The weights follow from it.

    Raises:
        ValueError: There is no such shape or dtype, or the folder holds files already.
    """
    if name not in SHAPES:
        raise ValueError(f"unknown shape {name!r}; known: {', '.join(SHAPES)}")
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already; give a new folder")
    processor = _processor()
    config = _config(SHAPES[name], processor.tokenizer)
    config.dtype = DTYPES[dtype]
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(out)
    processor.save_pretrained(out)
    _write_shards(out, _weights(config, DTYPES[dtype], seed))


def _processor() -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=parts.clip_image_processor(336),
        tokenizer=parts.tokenizer("<image>"),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=parts.CHAT_TEMPLATE,
    )


def _config(shape: Shape, tokenizer: Any) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=shape.tower_width,
        intermediate_size=4 * shape.tower_width,
        num_hidden_layers=shape.tower_layers,
        num_attention_heads=max(1, shape.tower_width // 64),
        image_size=336,
        patch_size=14,
        projection_dim=shape.tower_width,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=4096,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=576,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def _weights(config: LlavaConfig, dtype: torch.dtype, seed: int) -> Iterator[tuple[str, Tensor]]:
    """One weight after the other, under the names of the hub's files."""
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed)
    for name, blank in model.named_parameters():
        if blank.dim() == 1 and name.endswith(".weight"):  # a norm
            value = torch.ones(blank.shape, dtype=dtype)
        elif name.endswith(".bias"):
            value = torch.zeros(blank.shape, dtype=dtype)
        else:
            value = (torch.randn(blank.shape, generator=generator) * 0.02).to(dtype)
        yield _hub_name(name), value


def _hub_name(name: str) -> str:
    for ours, theirs in (
        ("model.vision_tower.vision_model.", "vision_tower.vision_model."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.language_model.", "language_model.model."),
        ("model.", ""),
        ("lm_head.", "language_model.lm_head."),
    ):
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    raise AssertionError(f"no hub name for {name}")


def _write_shards(out: Path, weights: Iterator[tuple[str, Tensor]]) -> None:
    """Files of about ``SHARD_BYTES``, and the index that says which weight is where."""
    places: dict[str, str] = {}
    total = size = count = 0
    shard: dict[str, Tensor] = {}

    def flush() -> None:
        nonlocal shard, size, count
        count += 1
        file = f"model-{count:05d}.safetensors"
        save_file(shard, out / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, file))
        shard, size = {}, 0

    for name, value in weights:
        if shard and size + value.nbytes > SHARD_BYTES:
            flush()
        shard[name] = value
        size += value.nbytes
        total += value.nbytes
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def main(
    shape: Annotated[str, typer.Argument(help=f"One of: {', '.join(SHAPES)}.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must be new or empty.")],
    dtype: Annotated[str, typer.Option(help=f"One of: {', '.join(DTYPES)}.")] = "bfloat16",
    seed: Annotated[int, typer.Option(help="The weights follow from it.")] = 0,
) -> None:
    """Write a LLaVA with random weights, for measuring speed."""
    try:
        write(shape, out, dtype, seed)
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    typer.echo(f"wrote a random LLaVA of shape {shape} in {dtype} to {out}")


if __name__ == "__main__":
    typer.run(main)
