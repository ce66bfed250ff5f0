"""A compressed model under checkpointing, LoRA, accelerate and torch.compile, and on disk."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import accelerate
import peft
import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from contract import METHODS, Case, fresh, placeholders
from vlmzip import VisionZip, compress

METHOD = METHODS[0]
K = 12


@pytest.fixture
def case() -> Case:
    return fresh("llava", "clip")


def zipped_inputs(case: Case, counts: list[int]) -> dict[str, Any]:
    with compress(case.model, case.processor, METHOD):
        return case.inputs(counts)


# --- gradient checkpointing -------------------------------------------------------------------


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(tower: str, reentrant: bool) -> None:
    case = fresh("llava", tower)
    inputs = zipped_inputs(case, [1, 2])
    case.model.train()
    with compress(case.model, None, METHOD) as zipped:
        expected = backward(case.model, inputs)
        case.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        layer = case.model.model.vision_tower.encoder.layers[2]
        ran: list[int] = []
        layer.mlp.register_forward_pre_hook(lambda *_: ran.append(1))
        loss = case.model(**inputs, labels=inputs["input_ids"]).loss
        last = zipped.last
        loss.backward()
        assert len(ran) == 2  # it was recomputed
        assert zipped.last is last
        found = {n: p.grad for n, p in case.model.named_parameters() if p.grad is not None}
        case.model.zero_grad()
        again = backward(case.model, inputs)
    assert found.keys() == expected.keys() == again.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)
        torch.testing.assert_close(again[name], gradient, msg=name)


def backward(model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


# --- LoRA -------------------------------------------------------------------------------------


def with_lora(model: Any) -> Any:
    """A peft model whose adapters change a lot, on the tower's q and k too; the same every time."""
    torch.manual_seed(5)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"])
    adapted = peft.get_peft_model(model, config)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return adapted.eval()


@pytest.mark.parametrize("first", ["lora", "compress"])
def test_lora_is_seen_by_the_scores(case: Case, first: str) -> None:
    inputs = zipped_inputs(case, [1, 2])
    plain = case.greedy(inputs, METHOD)
    merged = with_lora(copy.deepcopy(case.model)).merge_and_unload()
    expected = Case(case.slow, merged, case.processor).greedy(inputs, METHOD)
    assert (expected[0] - plain[0]).abs().max() > 0.1
    if first == "lora":
        adapted = with_lora(case.model)
        zipped = compress(adapted, None, METHOD)
    else:
        zipped = compress(case.model, None, METHOD)
        adapted = with_lora(case.model)
    tuned = Case(case.slow, adapted, case.processor)
    tuned.assert_generates(tuned.generate(inputs), expected)
    adapted(**inputs, labels=inputs["input_ids"]).loss.backward()
    trained = [n for n, p in adapted.named_parameters() if p.grad is not None]
    assert trained
    assert any("vision_tower" in name for name in trained)
    assert all("lora" in name for name in trained)
    unloaded = Case(case.slow, adapted.merge_and_unload(), case.processor)
    unloaded.assert_generates(unloaded.generate(inputs), expected)
    zipped.remove()
    with pytest.raises(ValueError, match="do not match"):
        unloaded.generate(inputs)


def test_a_model_with_adapters_is_not_saved_half(case: Case, tmp_path: Any) -> None:
    """Saved as it is, the checkpoint would load with random attention weights."""
    with (
        compress(with_lora(case.model), None, METHOD) as zipped,
        pytest.raises(ValueError, match="merge_and_unload"),
    ):
        zipped.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


# --- accelerate -------------------------------------------------------------------------------


def offload(model: Any, how: str, folder: Any) -> None:
    if how == "cpu_offload":
        accelerate.cpu_offload(model, execution_device="cpu")
    elif how == "disk_offload":
        accelerate.disk_offload(model, folder, execution_device="cpu")
    else:
        tower = "model.vision_tower"
        parts = [f"{tower}.{n}" for n in ("embeddings", "pre_layrnorm", "post_layernorm")]
        parts += ["model.multi_modal_projector", "model.language_model", "lm_head"]
        places = dict.fromkeys(parts, "cpu")
        places |= {f"{tower}.encoder.layers.{i}": "disk" for i in range(4)}
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


@pytest.mark.parametrize("off", ["compress", "accelerate"])
@pytest.mark.parametrize("first", ["compress", "accelerate"])
@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "dispatch_model"])
def test_offloading(case: Case, how: str, first: str, off: str, tmp_path: Any) -> None:
    """Attached and taken off in any order."""
    stock_inputs, inputs = case.inputs([1]), zipped_inputs(case, [1, 2])
    expected = case.greedy(inputs, METHOD)
    tower, pixels = case.model.model.vision_tower, stock_inputs["pixel_values"]
    with torch.no_grad():
        stock, alone = case.model(**stock_inputs).logits, tower(pixels).last_hidden_state
    if first == "accelerate":
        offload(case.model, how, tmp_path)
    zipped = compress(case.model, None, METHOD)
    if first == "compress":
        offload(case.model, how, tmp_path)
    case.assert_generates(case.generate(inputs), expected)
    if off == "compress":
        zipped.remove()
        assert torch.equal(case.model(**stock_inputs).logits, stock)
        remove_hook_from_submodules(case.model)
    else:
        remove_hook_from_submodules(case.model)
        case.assert_generates(case.generate(inputs), expected)
        zipped.remove()
    assert torch.equal(case.model(**stock_inputs).logits, stock)
    assert torch.equal(tower(pixels).last_hidden_state, alone)
    ours = [key for module in case.model.modules() for key in vars(module) if "vlmzip" in key]
    assert ours == []


# --- torch.compile ----------------------------------------------------------------------------


def test_compiled_forward_in_one_graph(case: Case) -> None:
    stock_inputs, inputs = case.inputs([1]), zipped_inputs(case, [1, 2])
    with torch.no_grad():
        stock = case.model(**stock_inputs).logits
        zipped = compress(case.model, None, METHOD)
        expected = case.model(**inputs).logits
        torch._dynamo.reset()
        compiled = torch.compile(case.model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(**inputs).logits, expected)
        with pytest.raises(RuntimeError, match=r"was compiled.*run one without torch\.compile"):
            _ = zipped.last
        with pytest.raises(TypeError, match="compress it first, then compile"):
            compress(compiled, None, METHOD)
        case.model(**inputs)
        assert len(zipped.last) == 3
        zipped.remove()  # the compiled code must notice
        torch.testing.assert_close(compiled(**stock_inputs).logits, stock)


def test_only_the_tower_compiled(case: Case) -> None:
    stock_inputs, inputs = case.inputs([1]), zipped_inputs(case, [1, 2])
    expected = case.greedy(inputs, METHOD)
    with torch.no_grad():
        stock = case.model(**stock_inputs).logits
    torch._dynamo.reset()
    zipped = compress(case.model, None, METHOD)
    case.model.model.vision_tower.compile(backend="eager")
    case.assert_generates(case.generate(inputs), expected)
    assert len(zipped.last) == 3
    zipped.remove()
    with torch.no_grad():
        torch.testing.assert_close(case.model(**stock_inputs).logits, stock)
    with pytest.raises(ValueError, match="do not match"):
        case.model(**inputs)


def test_threads_share_a_compiled_tower(case: Case) -> None:
    """Compiled code cannot see whose forward it is in: threads must not read each other's scores."""
    size = case.model.config.vision_config.image_size
    pixels = [torch.randn(1, 3, size, size) for _ in range(4)]

    def encode(index: int) -> Tensor:
        with torch.no_grad():
            return case.model.get_image_features(pixels[index]).pooler_output[0]

    torch._dynamo.reset()
    with compress(case.model, None, METHOD):
        expected = [encode(index) for index in range(4)]
        case.model.model.vision_tower.compile(backend="eager")
        encode(0)
        with ThreadPoolExecutor(4) as pool:
            for index, found in zip([0, 1, 2, 3] * 20, pool.map(encode, [0, 1, 2, 3] * 20), strict=True):
                torch.testing.assert_close(found, expected[index])


# --- checkpoints ------------------------------------------------------------------------------


def test_a_checkpoint_remembers_its_settings(case: Case, tmp_path: Any) -> None:
    method = VisionZip(tokens=K, merge="average")
    stock_inputs = case.inputs([1])
    with torch.no_grad():
        stock = case.model(**stock_inputs).logits
    with compress(case.model, case.processor, method) as zipped:
        inputs = case.inputs([1, 2])
        out = case.generate(inputs)
        zipped.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["VlmzipLlavaForConditionalGeneration"]
    assert config["vlmzip"]["method"] == "visionzip"
    assert config["vlmzip"]["tokens"] == K
    assert config["vlmzip"]["merge"] == "average"
    assert config["model_type"] == "llava"

    processor = AutoProcessor.from_pretrained(tmp_path)
    for loader in (LlavaForConditionalGeneration, AutoModelForImageTextToText):
        model = loader.from_pretrained(tmp_path)
        assert type(model) is LlavaForConditionalGeneration
        loaded = Case(case.slow, model, processor)
        plain = loaded.inputs([1])
        assert torch.equal(plain["input_ids"], stock_inputs["input_ids"])
        with torch.no_grad():
            assert torch.equal(model(**stock_inputs).logits, stock)
        with compress(model, processor) as again:
            assert again.method == zipped.method
            assert torch.equal(loaded.inputs([1, 2])["input_ids"], inputs["input_ids"])
            assert torch.equal(loaded.generate(inputs).sequences, out.sequences)
        with compress(model, processor, VisionZip(tokens=5)):
            shorter = loaded.inputs([1])["input_ids"]
            assert placeholders(model, shorter).sum() == 5


def test_plain_saving_while_compressed_is_stock(case: Case, tmp_path: Any) -> None:
    case.model.save_pretrained(tmp_path / "stock")
    before = case.model.config.to_dict()
    with compress(case.model, case.processor, METHOD):
        assert case.model.config.to_dict() == before
        case.model.save_pretrained(tmp_path / "zipped")
    configs = [(tmp_path / name / "config.json").read_text() for name in ("stock", "zipped")]
    assert configs[0] == configs[1]
    stock, zipped = (weights(tmp_path / name) for name in ("stock", "zipped"))
    assert stock.keys() == zipped.keys()
    assert all(torch.equal(stock[name], zipped[name]) for name in stock)


def weights(folder: Any) -> dict[str, Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize(
    ("stored", "error", "words"),
    [
        (None, ValueError, "pass one, such as"),
        ("visionzip", ValueError, "must be a settings dict, got 'visionzip'"),
        ({"method": "zip"}, ValueError, "unknown method 'zip'; known:.*visionzip"),
        ({"method": "visionzip"}, ValueError, "exactly one budget"),
        ({"method": "visionzip", "token": 64}, ValueError, "unknown setting token"),
        ({"method": "visionzip", "tokens": 66}, ValueError, "only 65 tokens"),
    ],
)
def test_stored_settings_are_checked(case: Case, stored: Any, error: Any, words: str) -> None:
    if stored is not None:
        case.model.config.vlmzip = stored
    with pytest.raises(error, match=words):
        compress(case.model, case.processor)
    assert "_vlmzip" not in vars(case.model.model)
