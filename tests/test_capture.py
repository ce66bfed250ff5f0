"""Reading q and k off one layer: what is read, what keeps running as it did, what is left out."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations import flash_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip import modeling_clip
from transformers.models.llama import modeling_llama
from transformers.models.siglip import modeling_siglip

import slow.llava as slow_llava
import vlmzip
from contract import METHODS, TOLERANCE, Case, fresh
from vlmzip import UnsupportedModelError, VisionZip
from vlmzip.capture import Tap, tap_attention
from vlmzip.patch import Patches

METHOD = METHODS[0]
BLOCKS = 4
READ = 2  # vision_feature_layer -2


@pytest.fixture(params=["clip", "siglip"])
def case(request: pytest.FixtureRequest) -> Case:
    return fresh("llava", request.param)


def tower_of(case: Case) -> Any:
    return case.model.model.vision_tower


def zipped_inputs(case: Case, counts: list[int], method: Any = METHOD) -> dict[str, Any]:
    with vlmzip.compress(case.model, case.processor, method):
        return case.inputs(counts)


# --- what is read -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        METHOD,
        VisionZip(tokens=12, order="raster"),
        VisionZip(tokens=12, send_cls=False),
        VisionZip(dominant=5, contextual=0),
        VisionZip(keep=1.0),
    ],
    ids=repr,
)
def test_last_is_what_the_reference_says(case: Case, method: VisionZip) -> None:
    inputs = zipped_inputs(case, [2, 0, 1], method)
    with vlmzip.compress(case.model, None, method) as zipped:
        assert zipped.last == ()
        case.model(**inputs)
        last = zipped.last
    assert len(last) == 3
    for pixels, one in zip(inputs["pixel_values"], last, strict=True):
        expected, scores = slow_llava.zip_image(case.model, pixels, method)
        assert torch.equal(one.dominant, expected.dominant)
        assert torch.equal(one.contextual, expected.contextual)
        assert torch.equal(one.assignment, expected.assignment)
        assert one.scores.dtype == torch.float32
        torch.testing.assert_close(one.scores, scores[None], rtol=1e-4, atol=1e-7)
        assert one.grid == ((8, 8),)
        tensors = (one.scores, one.dominant, one.contextual, one.assignment)
        assert not any(tensor.requires_grad for tensor in tensors)


def test_last_is_of_the_latest_forward_that_had_images(case: Case) -> None:
    one, two, none = (zipped_inputs(case, counts) for counts in ([1], [2], [0]))
    with vlmzip.compress(case.model, None, METHOD) as zipped:
        case.model(**one)
        assert len(zipped.last) == 1
        case.model.generate(**two, max_new_tokens=3)
        assert len(zipped.last) == 2
        case.model(**none)
        assert len(zipped.last) == 2


def test_bfloat16_keeps_what_its_own_scores_say(case: Case) -> None:
    inputs = zipped_inputs(case, [2])
    exact = [slow_llava.zip_image(case.model, one, METHOD)[1] for one in inputs["pixel_values"]]
    case.model.bfloat16()
    with vlmzip.compress(case.model, None, METHOD) as zipped, torch.no_grad():
        found = case.model.get_image_features(inputs["pixel_values"].bfloat16()).pooler_output
        last = zipped.last
        states = tower_of(case)(inputs["pixel_values"].bfloat16(), output_hidden_states=True)
    cls = case.model.config.vision_config.model_type == "clip_vision_model"
    for index, one in enumerate(last):
        torch.testing.assert_close(one.scores[0], exact[index], rtol=0.05, atol=1e-4)
        dominant = one.dominant[0]
        assert len(dominant) == 10
        rest = [j for j in range(int(cls), one.scores.shape[1]) if j not in dominant]
        assert one.scores[0, dominant[int(cls) :]].min() >= one.scores[0, rest].max()
        hidden = states.hidden_states[-2][index][dominant]
        expected = slow_llava.project(case.model, hidden)
        torch.testing.assert_close(found[index][:10], expected, rtol=0.02, atol=0.002)


# --- attention functions ----------------------------------------------------------------------


@pytest.fixture
def eager_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by a module's class name whenever eager attention runs."""
    calls: list[str] = []
    for file in (modeling_clip, modeling_siglip, modeling_llama):
        stock = file.eager_attention_forward

        def counted(module: Any, *args: Any, stock: Any = stock, **kwargs: Any) -> Any:
            calls.append(type(module).__name__)
            return stock(module, *args, **kwargs)

        monkeypatch.setattr(file, "eager_attention_forward", counted)
    return calls


def counted_sdpa(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Grows whenever SDPA runs; True for a vision layer."""
    calls: list[bool] = []
    stock = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def counted(module: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append("Llama" not in type(module.config).__name__)
        return stock(module, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", counted)
    return calls


def test_no_eager_attention_anywhere(
    case: Case, eager_calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = zipped_inputs(case, [1, 1])
    sdpa_calls = counted_sdpa(monkeypatch)
    with vlmzip.compress(case.model, None, METHOD):
        case.model(**inputs)
    assert sdpa_calls == [True] * (READ + 1) + [False] * 2
    assert eager_calls == []


def test_switching_attention_while_compressed(case: Case, eager_calls: list[str]) -> None:
    inputs = zipped_inputs(case, [1, 2])
    expected = case.greedy(inputs, METHOD)
    eager_calls.clear()
    with vlmzip.compress(case.model, None, METHOD):
        case.model.set_attn_implementation("eager")
        case.assert_generates(case.generate(inputs), expected)
        vision = [name for name in eager_calls if "Llama" not in name]
        assert len(vision) == READ + 1
        eager_calls.clear()
        case.model.set_attn_implementation("sdpa")
        case.assert_generates(case.generate(inputs), expected)
        assert eager_calls == []


def test_attentions_can_still_be_had(case: Case) -> None:
    pixels = zipped_inputs(case, [1])["pixel_values"]
    case.model.set_attn_implementation("eager")
    stock = tower_of(case)(pixels, output_attentions=True).attentions
    with vlmzip.compress(case.model, None, METHOD):
        found = tower_of(case)(pixels, output_attentions=True).attentions
        asked = case.model.get_image_features(pixels, output_attentions=True).attentions
    assert len(found) == len(stock) == BLOCKS
    assert all(map(torch.equal, found, stock))
    assert all(map(torch.equal, asked[: READ + 1], stock))


@pytest.fixture
def flash_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """transformers' own FlashAttention path, with a stand-in for the kernel's call alone."""
    calls: list[Any] = []

    def kernel(query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Tensor:
        calls.append((mask, kwargs["attn_implementation"], kwargs["is_causal"]))
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        out = nn.functional.scaled_dot_product_attention(query, key, value, scale=kwargs["softmax_scale"])
        return out.transpose(1, 2)

    monkeypatch.setattr(flash_attention, "_flash_attention_forward", kernel)
    return calls


def test_flash_attention_stays_in_use(case: Case, flash_calls: list[Any]) -> None:
    inputs = zipped_inputs(case, [1, 2])
    expected = case.greedy(inputs, METHOD)
    with vlmzip.compress(case.model, None, METHOD):
        tower_of(case).config._attn_implementation_internal = "flash_attention_2"
        out = case.generate(inputs)
    case.assert_generates(out, expected)
    assert flash_calls == [(None, "flash_attention_2", False)] * (READ + 1)


def test_flash_attention_sees_the_encoders_config(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def stand_in(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **how: Any) -> Any:
        assert module.config._attn_implementation == "flash_attention_2"
        assert module.config is tower_of(case).config
        assert mask is None
        assert next(module.modules()) is not None
        assert not module.is_causal
        seen.append(how["scaling"])
        out = nn.functional.scaled_dot_product_attention(query, key, value, scale=how["scaling"])
        return out.transpose(1, 2), None

    inputs = zipped_inputs(case, [1])
    expected = case.greedy(inputs, METHOD)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", stand_in)
    tower_of(case).config._attn_implementation_internal = "flash_attention_2"
    with vlmzip.compress(case.model, None, METHOD):
        read = tower_of(case).encoder.layers[READ].self_attn.config
        assert "flash" in read._attn_implementation  # encoders make masks by the name
        case.assert_generates(case.generate(inputs), expected)
    assert seen == [32**-0.5] * (READ + 1)


# --- what does not run, and what does ---------------------------------------------------------


def runs(case: Case) -> list[int]:
    """Grows by a block's index whenever its MLP runs."""
    ran: list[int] = []
    for index, block in enumerate(tower_of(case).encoder.layers):
        block.mlp.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    return ran


def test_blocks_after_the_one_read_do_not_run(case: Case) -> None:
    inputs = zipped_inputs(case, [1])
    ran = runs(case)
    zipped = vlmzip.compress(case.model, None, METHOD)
    case.model.generate(**inputs, max_new_tokens=3)
    assert ran == [0, 1, READ]
    ran.clear()
    tower_of(case)(inputs["pixel_values"])
    assert ran == [0, 1, 2, 3]
    ran.clear()
    zipped.remove()
    case.model.get_image_features(inputs["pixel_values"])
    assert ran == [0, 1, 2, 3]


def test_the_tower_called_on_its_own_is_stock(case: Case) -> None:
    pixels = zipped_inputs(case, [2])["pixel_values"]
    stock = tower_of(case)(pixels, output_hidden_states=True)
    with vlmzip.compress(case.model, None, METHOD) as zipped:
        case.model.get_image_features(pixels[:1])
        last = zipped.last
        found = tower_of(case)(pixels, output_hidden_states=True)
        assert zipped.last is last
    assert stock.keys() == found.keys()
    assert torch.equal(found.last_hidden_state, stock.last_hidden_state)
    assert len(found.hidden_states) == BLOCKS + 1
    assert all(map(torch.equal, found.hidden_states, stock.hidden_states))


def test_the_projector_called_on_its_own_is_stock(case: Case) -> None:
    hidden = torch.randn(2, 65, 64)
    projector = case.model.model.multi_modal_projector
    stock = projector(hidden)
    with vlmzip.compress(case.model, None, METHOD):
        assert torch.equal(projector(hidden), stock)


def test_image_features_come_as_they_were_asked_for(case: Case) -> None:
    pixels = zipped_inputs(case, [2])["pixel_values"]
    with vlmzip.compress(case.model, None, METHOD):
        named = case.model.get_image_features(pixels)
        plain = case.model.get_image_features(pixels, return_dict=False)
        by_base = case.model.model.get_image_features(pixel_values=pixels)
    assert [len(one) for one in named.pooler_output] == [12, 12]
    assert isinstance(plain, tuple)
    (kept,) = [one for one in plain if isinstance(one, list)]
    assert all(map(torch.equal, kept, named.pooler_output))
    assert all(map(torch.equal, by_base.pooler_output, named.pooler_output))


# --- refusals ---------------------------------------------------------------------------------


def test_attention_that_looks_nothing_up_is_refused() -> None:
    class Own(nn.Module):
        pass

    patches = Patches()
    with pytest.raises(UnsupportedModelError, match="Own has no config with an attention"):
        tap_attention(Own(), Tap(cls_token=True), patches)


def test_attention_replaced_after_compress_is_noticed(case: Case) -> None:
    inputs = zipped_inputs(case, [1])

    class Own(nn.Module):
        def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
            return hidden_states, None

    with vlmzip.compress(case.model, None, METHOD):
        tower_of(case).encoder.layers[READ].self_attn = Own()
        with pytest.raises(UnsupportedModelError, match=r"was not seen.*Call compress\(\) last"):
            case.model(**inputs)


def test_an_error_in_the_forward_disarms_the_tap(case: Case) -> None:
    inputs = zipped_inputs(case, [1])
    expected = case.greedy(inputs, METHOD)
    stock = tower_of(case)(inputs["pixel_values"]).last_hidden_state
    with vlmzip.compress(case.model, None, METHOD):
        hook = tower_of(case).encoder.layers[READ].mlp.register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            case.model(**inputs)
        hook.remove()
        assert torch.equal(tower_of(case)(inputs["pixel_values"]).last_hidden_state, stock)
        case.assert_generates(case.generate(inputs), expected)


def fail(*_: Any) -> None:
    raise KeyboardInterrupt


def test_tolerance_is_tight_enough_to_tell_layers_apart(case: Case) -> None:
    """The scores of neighbouring layers differ by more than the tests allow."""
    pixels = zipped_inputs(case, [1])["pixel_values"]
    _, attentions = slow_llava.run_tower(tower_of(case), pixels)
    rows = [one[0].mean((0, 1)) for one in attentions]
    assert (rows[READ] - rows[READ - 1]).abs().max() > TOLERANCE["atol"]
