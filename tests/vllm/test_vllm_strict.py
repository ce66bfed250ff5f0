"""Never uncompressed by accident; and without settings nothing but the stock model."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from side_by_side import Ask, Reference, engine, picture, write_checkpoint

from vlmzip import UnsupportedModelError
from vlmzip.tiny.random.llava import build

OURS = ["VlmzipLlavaForConditionalGeneration"]
SETTINGS = {"method": "visionzip", "tokens": 16}


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("strict")
    write_checkpoint(*build(112), folder)
    return folder


def test_without_the_plugin_a_strict_configuration_does_not_start(stock: Path) -> None:
    from vllm import EngineArgs

    options = {"model": str(stock), "hf_overrides": {"architectures": OURS, "vlmzip": SETTINGS}}
    assert EngineArgs(**options).create_model_config().architecture == OURS[0]
    without = subprocess.run(
        [
            sys.executable,
            "-c",
            f"from vllm import EngineArgs; EngineArgs(**{options!r}).create_model_config()",
        ],
        env=os.environ | {"VLLM_PLUGINS": "none"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert without.returncode != 0
    assert f"Model architectures {OURS!r} are not supported" in without.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"architectures": OURS}, "never runs uncompressed, and its config holds no vlmzip settings"),
        ({"vlmzip": {"method": "visionzip"}}, "give exactly one budget"),
        ({"vlmzip": {"method": "nonsense", "tokens": 16}}, "unknown method 'nonsense'"),
        ({"vlmzip": {**SETTINGS, "colour": 1}}, "unknown setting colour"),
        ({"vlmzip": {**SETTINGS, "tokens": 66}}, "a view has only 65 tokens"),
        ({"vlmzip": {**SETTINGS, "max_visual_tokens": 66}}, "max_visual_tokens=66 does not fit"),
        ({"vlmzip": 64}, "must be a settings dict, got 64"),
    ],
)
def test_settings_that_do_not_fit_do_not_start(stock: Path, overrides: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message), engine(model=str(stock), hf_overrides=overrides):
        pass


def test_a_budget_for_all_requests_is_no_request(stock: Path) -> None:
    options = {"hf_overrides": {"vlmzip": SETTINGS}, "mm_processor_kwargs": {"visual_tokens": 8}}
    with (
        pytest.raises(ValueError, match="visual_tokens belongs to requests"),
        engine(model=str(stock), **options),
    ):
        pass


def test_a_siglip_tower_that_would_lose_a_patch_does_not_start(tmp_path: Path) -> None:
    model, processor = build(112, "siglip")
    model.config.vision_feature_select_strategy = "default"
    write_checkpoint(model, processor, tmp_path)
    with (
        pytest.raises(UnsupportedModelError, match="an image patch would be lost"),
        engine(model=str(tmp_path), hf_overrides={"vlmzip": SETTINGS}),
    ):
        pass


def test_without_settings_it_is_the_stock_model(stock: Path) -> None:
    from vllm.model_executor.models.llava import LlavaForConditionalGeneration, LlavaMultiModalProcessor

    asks = [Ask("what is it?", [picture(1)]), Ask("and these?", [picture(2), picture(3, 90, 200)])]
    with engine(model=str(stock)) as running:
        assert type(running.runner.mm_budget.processor) is LlavaMultiModalProcessor
        ours = running.answers(asks)
        running.forget()
        assert type(running.model).__mro__[1] is LlavaForConditionalGeneration
        running.model.__class__ = LlavaForConditionalGeneration
        assert running.answers(asks) == ours
    reference = Reference(stock, None)
    assert all(answer.agrees(reference.answer(ask)) for ask, answer in zip(asks, ours, strict=True))
