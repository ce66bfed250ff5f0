"""The contract every family keeps, whatever its layout: the same tests over all of them."""

import copy
from typing import Any

import pytest
import torch

import vlmzip
from contract import TOLERANCE, Case, cases, fresh, placeholders

BATCHES = {"one": [1], "mixed": [1, 2, 0], "text only": [0, 0]}  # images in each row


@pytest.fixture(params=cases())
def case(request: pytest.FixtureRequest) -> Case:
    return fresh(*request.param)


def zipped_inputs(case: Case, method: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """What the compressed processor makes; the model is left alone afterwards."""
    with vlmzip.compress(case.model, case.processor, method):
        return case.inputs(*args, **kwargs)


@pytest.mark.parametrize("counts", BATCHES.values(), ids=BATCHES)
def test_one_placeholder_for_each_kept_token_and_the_text_untouched(
    case: Case, counts: list[int]
) -> None:
    stock = case.inputs(counts)
    dropped = case.slow.dropped(case.processor) if hasattr(case.slow, "dropped") else set()
    for method in case.methods:
        inputs = zipped_inputs(case, method, counts)
        features = case.features(inputs, method) if sum(counts) else []
        assert len(features) == sum(counts)
        here = placeholders(case.model, inputs["input_ids"]) & inputs["attention_mask"].bool()
        starts = [sum(counts[:row]) for row in range(len(counts))]
        for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
            kept = sum(len(one) for one in features[start : start + count])
            assert here[row].sum() == kept
            assert text_of(case, inputs, row, set()) == text_of(case, stock, row, dropped)
        if counts and sum(counts):
            assert kept <= placeholders(case.model, stock["input_ids"]).sum()


def text_of(case: Case, inputs: dict[str, Any], row: int, dropped: set[int]) -> list[int]:
    ids = inputs["input_ids"][row]
    keep = inputs["attention_mask"][row].bool() & ~placeholders(case.model, ids)
    return [token for token in ids[keep].tolist() if token not in dropped]


@pytest.mark.parametrize(("counts", "side"), [([2, 1], "left"), ([1, 2, 0], "right")])
def test_forward_equals_the_slow_path(case: Case, counts: list[int], side: str) -> None:
    for method in case.methods:
        inputs = zipped_inputs(case, method, counts, side)
        features = case.features(inputs, method) if sum(counts) else []
        with torch.no_grad():
            expected = case.logits(inputs, features, method)
            with vlmzip.compress(case.model, None, method) as zipped:
                logits = case.model(**inputs).logits
                assert len(zipped.last) == sum(counts)
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(logits[real], expected[real], **TOLERANCE)


@pytest.mark.parametrize("counts", BATCHES.values(), ids=BATCHES)
def test_generate_equals_the_slow_path(case: Case, counts: list[int]) -> None:
    method = case.methods[0]
    inputs = zipped_inputs(case, method, counts)
    expected = case.greedy(inputs, method)
    with vlmzip.compress(case.model, None, method):
        out = case.generate(inputs)
    case.assert_generates(out, expected)


@pytest.mark.parametrize("later", [0, 1], ids=["text", "image"])
def test_second_turn_on_the_first_ones_cache(case: Case, later: int) -> None:
    if later and not getattr(case.slow, "LATER_IMAGES", True):
        pytest.skip("transformers itself gives this family's later images wrong positions or masks")
    method = case.methods[0]
    with vlmzip.compress(case.model, case.processor, method):
        first = case.inputs([1])
        turn = case.generate(first)
        second = case.inputs([later], first=1)
        talk = joined(case, first, turn.sequences, second)
        given = {**talk, **{name: second[name] for name in second if name not in talk}}
        out = case.generate(given, past_key_values=turn.past_key_values)
    images = {
        name: torch.cat([first[name], second[name]]) if name in second else first[name]
        for name in first
        if name not in talk
    }
    case.assert_generates(out, case.greedy({**talk, **images}, method))


def joined(
    case: Case, first: dict[str, Any], sequences: torch.Tensor, second: dict[str, Any]
) -> dict[str, Any]:
    """The whole conversation's tokens: prompt, answer, next prompt."""
    answer = sequences[:, first["input_ids"].shape[1] :]
    talk = case.grown(first, torch.cat([answer, second["input_ids"]], 1))
    names = {"input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"} & set(first)
    for name in names - {"input_ids"}:
        talk[name][:, -second[name].shape[1] :] = second[name]
    return {name: talk[name] for name in names}


def test_gradients_equal_the_slow_paths(case: Case) -> None:
    method = case.methods[0]
    inputs = zipped_inputs(case, method, [1, 2], "right")
    labels = inputs["input_ids"].clone()
    labels[placeholders(case.model, labels) | (inputs["attention_mask"] == 0)] = -100
    with torch.no_grad():
        features = case.features(inputs, method)
    slow = case.logits(inputs, features, method)
    loss = torch.nn.functional.cross_entropy(slow[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    expected = language_gradients(case.model)
    case.model.zero_grad()
    with vlmzip.compress(case.model, None, method):
        out = case.model(**inputs, labels=labels)
        out.loss.backward()
    torch.testing.assert_close(out.loss, loss, **TOLERANCE)
    found = language_gradients(case.model)
    assert expected
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, **TOLERANCE)
    reached = {name for name, p in case.model.named_parameters() if p.grad is not None}
    assert any("vis" in name or "image_tower" in name for name in reached)


def language_gradients(model: Any) -> dict[str, torch.Tensor]:
    base = model.base_model
    language_model = base.text_model if hasattr(base, "text_model") else base.language_model
    inner = {id(p) for p in language_model.parameters()}
    return {
        name: p.grad.clone()
        for name, p in model.named_parameters()
        if id(p) in inner and p.grad is not None
    }


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations_agree(case: Case, attention: str) -> None:
    if attention == "sdpa" and not case.model.get_decoder()._supports_sdpa:
        pytest.skip("this transformers does not run this language model under SDPA")
    method = case.methods[0]
    inputs = zipped_inputs(case, method, [1, 1])
    expected = case.greedy(inputs, method)
    case.model.set_attn_implementation(attention)
    with vlmzip.compress(case.model, None, method):
        case.assert_generates(case.generate(inputs), expected)


def test_budget_of_every_token(case: Case) -> None:
    """K = N changes nothing but what the family never sends on; K > N is refused or means all."""
    stock = case.inputs([1])
    most = int(placeholders(case.model, stock["input_ids"]).sum())
    method = vlmzip.VisionZip(keep=1.0, order="raster")
    inputs = zipped_inputs(case, method, [1])
    case_features = case.features(inputs, method)
    assert abs(sum(len(one) for one in case_features) - most) <= most
    with torch.no_grad(), vlmzip.compress(case.model, None, method):
        logits = case.model(**inputs).logits
    torch.testing.assert_close(logits, case.logits(inputs, case_features, method), **TOLERANCE)


def test_a_copy_is_compressed_on_its_own(case: Case) -> None:
    method = case.methods[0]
    stock_inputs = case.inputs([1])
    stock = case.generate(stock_inputs)
    zipped = vlmzip.compress(case.model, case.processor, method)
    inputs = case.inputs([1])
    expected = case.generate(inputs)
    twin = copy.deepcopy(case.model)
    zipped.remove()
    copied = Case(case.slow, twin, case.processor)
    copied.assert_generates(copied.generate(inputs), [step.float() for step in expected.logits])
    vlmzip.Compressed(twin).remove()
    assert all(map(torch.equal, copied.generate(stock_inputs).logits, stock.logits))


def test_remove_gives_everything_back(case: Case) -> None:
    inputs = case.inputs([1, 2])
    stock = case.generate(inputs)  # transformers hangs its own hooks on the tower in its first run
    before = footprint(case.model)
    config = case.model.config.to_dict()
    kind = type(case.processor)
    held = dict(vars(case.processor))
    zipped = vlmzip.compress(case.model, case.processor, case.methods[0])
    assert footprint(case.model) != before
    assert case.model.config.to_dict() == config
    case.generate(case.inputs([1, 2]))
    zipped.remove()
    zipped.remove()
    assert footprint(case.model) == before
    assert case.model.config.to_dict() == config
    assert type(case.processor) is kind
    assert vars(case.processor) == held
    again = case.inputs([1, 2])
    assert torch.equal(again["input_ids"], inputs["input_ids"])
    assert all(map(torch.equal, case.generate(again).logits, stock.logits))


def footprint(model: Any) -> dict[str, Any]:
    """Every module's attributes, hooks and bound methods, by identity where they are objects."""
    return {
        f"{name}.{key}": sorted(value) if isinstance(value, dict) else id(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
    }


def test_a_stock_prompt_is_refused(case: Case) -> None:
    inputs = case.inputs([1])
    with (
        vlmzip.compress(case.model, None, case.methods[0]),
        pytest.raises(ValueError, match="prompt was not made by the processor"),
    ):
        case.model(**inputs)


def test_bfloat16(case: Case) -> None:
    method = case.methods[0]
    case.model.bfloat16()
    with vlmzip.compress(case.model, case.processor, method) as zipped, torch.no_grad():
        inputs = case.inputs([1, 1])
        logits = case.model(**inputs).logits
        kept = zipped.last
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
    assert all(one.scores.dtype == torch.float32 for one in kept)
