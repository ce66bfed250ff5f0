"""A LoRA adapter of the language model."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from side_by_side import Ask, Engine, Reference, engine, picture, random_checkpoint

from vlmzip import VisionZip

METHOD = VisionZip(tokens=64)
RANK, ALPHA = 8, 16
ASKS = [Ask("what is it?", [picture(1, 400, 300)]), Ask("and these?", [picture(2), picture(3, 90, 250)])]


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint("llava", tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def reference(stock: Path) -> Reference:
    return Reference(stock, METHOD)


@pytest.fixture(scope="module")
def adapter(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random adapter as peft writes it, of the language model's query and value matrices."""
    folder = tmp_path_factory.mktemp("adapter")
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, module in reference.model.model.language_model.named_modules():
        if name.endswith(("q_proj", "v_proj")):
            rows, columns = module.weight.shape
            key = f"base_model.model.model.language_model.{name}"
            weights[f"{key}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator) * 0.2
            weights[f"{key}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) * 0.2
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none",
              "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM",
              "base_model_name_or_path": "llava"}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def served(stock: Path) -> Iterator[Engine]:
    with engine(
        model=str(stock),
        hf_overrides={"vlmzip": METHOD.settings()},
        enable_lora=True,
        max_lora_rank=RANK,
    ) as running:
        yield running


def test_an_adapter(served: Engine, reference: Reference, adapter: Path) -> None:
    from vllm.lora.request import LoRARequest

    without = served.answers(ASKS)
    adapted = served.answers(ASKS, lora_request=LoRARequest("mine", 1, str(adapter)))
    merge(reference, adapter)
    for ask, answer, plain in zip(ASKS, adapted, without, strict=True):
        assert answer.agrees(reference.answer(ask)), ask.text
        assert not answer.agrees(plain)


def merge(reference: Reference, adapter: Path) -> None:
    """Add the adapter to the reference's own weights."""
    from safetensors.torch import load_file

    weights = load_file(adapter / "adapter_model.safetensors")
    for key, down in weights.items():
        if key.endswith("lora_A.weight"):
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            up = weights[key.replace("lora_A", "lora_B")]
            with torch.no_grad():
                reference.model.get_submodule(module).weight += ALPHA / RANK * up @ down
