"""Attaching to one instance, taking it back, and what must keep working in between."""

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoProcessor, LlamaConfig, LlamaForCausalLM, LlavaNextProcessor

import slow.llava as slow_llava
from contract import METHODS, TOLERANCE, Case, fresh, placeholders
from vlmzip import Compressed, UnsupportedModelError, VisionZip, compress
from vlmzip.tiny.random.llava import build

METHOD = METHODS[0]
K = 12


@pytest.fixture
def case() -> Case:
    return fresh("llava", "clip")


def zipped_inputs(case: Case, counts: list[int], method: Any = METHOD) -> dict[str, Any]:
    with compress(case.model, case.processor, method):
        return case.inputs(counts)


def attributes(root: Any) -> dict[str, Any]:
    """Every module's attributes by identity, hooks and tables by their keys."""
    return {
        f"{name}.{key}": sorted(map(str, value)) if isinstance(value, dict) else id(value)
        for name, module in root.named_modules()
        for key, value in vars(module).items()
    }


def run_once(case: Case) -> Tensor:
    """Logits; transformers hangs hooks of its own on a tower in its first run."""
    with torch.no_grad():
        logits: Tensor = case.model(**case.inputs([1])).logits
    return logits


def assert_stock(case: Case, inputs: dict[str, Any], logits: Tensor) -> None:
    """The model answers a stock prompt as it did before."""
    with torch.no_grad():
        assert torch.equal(case.model(**inputs).logits, logits)


# --- this instance, and only while it is attached ---------------------------------------------


def test_other_instances_stay_as_they_are(case: Case) -> None:
    other = fresh("llava", "clip")
    inputs = other.inputs([1])
    stock = run_once(other)
    before = attributes(other.model)
    classes = {type(m): dict(vars(type(m))) for m in case.model.modules()}
    with compress(case.model, case.processor, METHOD):
        case.model(**case.inputs([1]))
        assert {cls: dict(vars(cls)) for cls in classes} == classes
        assert_stock(other, inputs, stock)
        assert attributes(other.model) == before
        assert torch.equal(other.inputs([1])["input_ids"], inputs["input_ids"])


def test_an_exception_inside_with_takes_it_off_too(case: Case) -> None:
    inputs = case.inputs([1])
    stock = run_once(case)
    before, kind = attributes(case.model), type(case.processor)
    with pytest.raises(KeyboardInterrupt), compress(case.model, case.processor, METHOD):
        interrupted(case)
    assert attributes(case.model) == before
    assert type(case.processor) is kind
    assert_stock(case, inputs, stock)


def interrupted(case: Case) -> None:
    case.model(**case.inputs([1]))
    raise KeyboardInterrupt


def test_a_compress_that_fails_leaves_nothing_behind(case: Case) -> None:
    before, kind = attributes(case.model), type(case.processor)
    attention = case.model.model.vision_tower.encoder.layers[2].self_attn
    config, attention.config = attention.config, None
    with pytest.raises(UnsupportedModelError, match="CLIPAttention has no config"):
        compress(case.model, case.processor, METHOD)
    attention.config = config
    assert attributes(case.model) == before
    assert type(case.processor) is kind
    compress(case.model, case.processor, METHOD).remove()


def test_twice(case: Case) -> None:
    other = fresh("llava", "clip")
    zipped = compress(case.model, case.processor, METHOD)
    with pytest.raises(ValueError, match=r"model is already compressed; call remove\(\)"):
        compress(case.model, other.processor, METHOD)
    with pytest.raises(ValueError, match=r"processor is already compressed; call remove\(\)"):
        compress(other.model, case.processor, METHOD)
    assert "_vlmzip" not in vars(other.model.model)
    zipped.remove()
    zipped.remove()
    with compress(case.model, case.processor, METHOD) as again:
        zipped.remove()  # an old handle does not touch a new compression
        assert len(placeholders_of(case)) == K
        assert again.last == ()
        case.model(**case.inputs([1]))
        assert len(again.last) == 1


def placeholders_of(case: Case) -> Tensor:
    return placeholders(case.model, case.inputs([1])["input_ids"]).nonzero()


def test_a_handle_after_remove(case: Case, tmp_path: Any) -> None:
    zipped = compress(case.model, case.processor, METHOD)
    zipped.remove()
    with pytest.raises(RuntimeError, match="was removed"):
        _ = zipped.last
    with pytest.raises(RuntimeError, match="was removed"):
        zipped.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not compressed; call compress"):
        Compressed(case.model)


def test_two_budgets_on_two_models(case: Case) -> None:
    other = fresh("llava", "siglip")
    few, many = VisionZip(tokens=4), VisionZip(tokens=30, merge="average")
    expected = []
    for one, method in ((case, few), (other, many)):
        inputs = zipped_inputs(one, [1, 1], method)
        expected.append((one, inputs, one.greedy(inputs, method)))
    with compress(case.model, case.processor, few), compress(other.model, other.processor, many):
        assert len(placeholders_of(case)) == 4
        assert len(placeholders_of(other)) == 30
        for one, inputs, logits in expected:
            one.assert_generates(one.generate(inputs), logits)


def test_the_base_model_alone(case: Case) -> None:
    inputs = zipped_inputs(case, [1])
    expected = case.features(inputs, METHOD)
    with compress(case.model.model, None, METHOD):
        found = case.model.model.get_image_features(inputs["pixel_values"]).pooler_output
    torch.testing.assert_close(list(found), expected, **TOLERANCE)


# --- threads ----------------------------------------------------------------------------------


def run_in_threads(*jobs: Any) -> None:
    """Run all at once; the first error, if any, is raised here."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(jobs))

    def guarded(job: Any) -> None:
        try:
            start.wait()
            for _ in range(6):
                job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_two_threads_on_one_model(case: Case) -> None:
    batches = [zipped_inputs(case, [n]) for n in (1, 2)]
    batches[1]["pixel_values"] = batches[1]["pixel_values"].flip(0)
    expected = [case.greedy(inputs, METHOD) for inputs in batches]
    kept = [
        [slow_llava.zip_image(case.model, one, METHOD)[0].dominant for one in b["pixel_values"]]
        for b in batches
    ]
    assert not torch.equal(kept[0][0], kept[1][0])
    zipped = compress(case.model, None, METHOD)

    def job(index: int) -> None:
        case.assert_generates(case.generate(batches[index]), expected[index])
        assert len(zipped.last) == index + 1
        for one, dominant in zip(zipped.last, kept[index], strict=True):
            assert torch.equal(one.dominant, dominant)

    run_in_threads(lambda: job(0), lambda: job(1))
    assert zipped.last == ()


def test_the_tower_is_stock_in_another_thread(case: Case) -> None:
    """While one thread compresses, another may call the tower on its own."""
    inputs = zipped_inputs(case, [1])
    expected = case.greedy(inputs, METHOD)
    tower = case.model.model.vision_tower
    with torch.no_grad():
        stock = tower(inputs["pixel_values"]).last_hidden_state
    compress(case.model, None, METHOD)

    def alone() -> None:
        with torch.no_grad():
            assert torch.equal(tower(inputs["pixel_values"]).last_hidden_state, stock)

    run_in_threads(alone, lambda: case.assert_generates(case.generate(inputs), expected))


# --- copies and pickles -----------------------------------------------------------------------


def test_copies_go_their_own_way(case: Case) -> None:
    stock, inputs = run_once(case), case.inputs([1])
    before = attributes(case.model)
    zipped = compress(case.model, case.processor, METHOD)
    model, processor = copy.deepcopy((case.model, case.processor))
    twin = Case(case.slow, model, processor)
    copied = Compressed(model, processor)
    assert copied.method == zipped.method
    case.model(**case.inputs([1]))
    assert len(zipped.last) == 1
    assert copied.last == ()
    copied.remove()
    assert len(placeholders_of(case)) == K
    assert torch.equal(twin.inputs([1])["input_ids"], inputs["input_ids"])
    assert_stock(twin, inputs, stock)
    assert attributes(model).keys() == before.keys()
    zipped.remove()
    assert attributes(case.model) == before


def test_a_copied_handle_has_its_own_model(case: Case) -> None:
    zipped = compress(case.model, case.processor, METHOD)
    copied = copy.deepcopy(zipped)
    zipped.remove()
    twin = Case(case.slow, copied.model, copied.processor)
    twin.model(**twin.inputs([1, 2]))
    assert len(copied.last) == 3
    copied.remove()
    assert len(placeholders_of(twin)) == 64


def test_a_processor_travels_compressed(case: Case) -> None:
    with compress(case.model, case.processor, METHOD):
        sent = pickle.dumps(case.processor)
        copied = copy.copy(case.processor)
        inputs = case.inputs([1, 2])
    for processor in (pickle.loads(sent), copied):
        assert type(processor).__name__ == "LlavaProcessor"
        arrived = Case(case.slow, case.model, processor).inputs([1, 2])
        assert torch.equal(arrived["input_ids"], inputs["input_ids"])
        with pytest.raises(ValueError, match="processor is already compressed"):
            compress(case.model, processor, METHOD)


class Collate:
    """What a DataLoader sends to its workers."""

    def __init__(self, case: Case) -> None:
        self.processor, self.images = case.processor, case.images
        self.texts = [case.prompt(1, "what?"), case.prompt(1, "and where is it?")]

    def __call__(self, rows: list[int]) -> dict[str, Tensor]:
        return dict(
            self.processor(
                images=[self.images[row] for row in rows],
                text=[self.texts[row] for row in rows],
                padding=True,
                return_tensors="pt",
            )
        )


def test_a_processor_works_in_a_spawned_worker(case: Case) -> None:
    with compress(case.model, case.processor, METHOD):
        collate = Collate(case)
        loader = torch.utils.data.DataLoader(
            [0, 1],
            batch_size=2,
            num_workers=1,
            collate_fn=collate,
            multiprocessing_context="spawn",
        )
        (batch,) = loader
        expected = collate([0, 1])
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    assert placeholders(case.model, batch["input_ids"]).sum() == 2 * K


def test_a_compressed_processor_saves_as_a_stock_one(case: Case, tmp_path: Any) -> None:
    case.processor.save_pretrained(tmp_path / "stock")
    with compress(case.model, case.processor, METHOD):
        case.processor.save_pretrained(tmp_path / "zipped")
    names = sorted(path.name for path in (tmp_path / "stock").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "zipped").iterdir())
    for name in names:
        saved = [(tmp_path / folder / name).read_text() for folder in ("stock", "zipped")]
        assert saved[0] == saved[1], name
    loaded = AutoProcessor.from_pretrained(tmp_path / "zipped")
    assert type(loaded) is type(case.processor)
    stock = Case(case.slow, case.model, loaded)
    assert len(placeholders_of(stock)) == 64


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "processor", "method", "words"),
    [
        ("llava", None, METHOD, "PreTrainedModel, got str"),
        (None, None, METHOD, "PreTrainedModel, got NoneType"),
        (torch.nn.Linear(2, 2), None, METHOD, "PreTrainedModel, got Linear"),
        (..., "llava", METHOD, "processor or None, got str"),
        (..., ..., 64, "VisionZip\\(tokens=64\\), got 64"),
        (..., ..., {"tokens": 64}, "method must be a vlmzip method"),
        (..., ..., VisionZip, "method must be a vlmzip method"),
    ],
)
def test_wrong_kinds(case: Case, model: Any, processor: Any, method: Any, words: str) -> None:
    model = case.model if model is ... else model
    processor = case.processor if processor is ... else processor
    with pytest.raises(TypeError, match=words):
        compress(model, processor, method)
    assert "_vlmzip" not in vars(case.model.model)


def test_parts_of_a_processor_are_not_one(case: Case) -> None:
    for part in (case.processor.tokenizer, case.processor.image_processor):
        with pytest.raises(TypeError, match="processor or None"):
            compress(case.model, part, METHOD)


def test_unknown_families_are_refused(case: Case) -> None:
    config = LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, vocab_size=40)
    with pytest.raises(UnsupportedModelError, match=r"'llama' is not supported.*llava"):
        compress(LlamaForCausalLM(config), None, METHOD)
    with pytest.raises(UnsupportedModelError, match=r"'clip_vision_model' is not supported"):
        compress(case.model.model.vision_tower, None, METHOD)


def test_processors_of_other_models(case: Case) -> None:
    token = case.processor.tokenizer
    wrong: dict[str, Any] = {}
    wrong["'llava' model needs a LlavaProcessor, got LlavaNextProcessor"] = LlavaNextProcessor(
        image_processor=case.processor.image_processor, tokenizer=token, patch_size=14
    )
    for words, name, value in (
        ("image token has id 300", "image_token_id", 300),
        ("makes 49 image tokens where this model has 64", "patch_size", 16),
        ("makes 65 image tokens where this model has 64", "vision_feature_select_strategy", "full"),
        ("makes 63 image tokens where this model has 64", "num_additional_image_tokens", 0),
        ("cannot process an image", "patch_size", None),
    ):
        wrong[words] = copy.deepcopy(case.processor)
        setattr(wrong[words], name, value)
    wrong["makes 576 image tokens where this model has 64"] = build(image_size=336)[1]
    for words, processor in wrong.items():
        with pytest.raises(ValueError, match=words.replace("'", "")):
            compress(case.model, processor, METHOD)
        assert "_vlmzip" not in vars(case.model.model)


def test_a_processor_changed_after_compress_is_noticed(case: Case) -> None:
    with compress(case.model, case.processor, METHOD):
        case.processor.patch_size = 16
        with pytest.raises(ValueError, match="makes 49 image tokens"):
            case.inputs([1])


def test_a_compressed_prompt_on_a_stock_model_is_refused_by_transformers(case: Case) -> None:
    inputs = zipped_inputs(case, [1])
    with pytest.raises(ValueError, match="do not match"):
        case.model(**inputs)
