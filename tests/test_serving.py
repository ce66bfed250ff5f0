"""What a server is started with, and what is refused before: all of it without vLLM."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import vlmzip
from vlmzip import Random, UnsupportedModelError, VisionZip, compress
from vlmzip.cli import app
from vlmzip.tiny.random import build
from vlmzip.tiny.random.llava import build as build_llava
from vlmzip.vllm import engine_args
from vlmzip.vllm.command import serve_command
from vlmzip.vllm.engine import check_arguments, make_plan

OURS = "VlmzipLlavaForConditionalGeneration"
STRICT = {
    "architectures": [OURS],
    "vlmzip": {"method": "visionzip", "tokens": 12, "order": "grouped"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA of 64 patches, the same with stored settings, a LLaVA-NeXT, and a family not served."""
    where = tmp_path_factory.mktemp("serving")
    model, processor = build_llava(112)
    for part in (model, processor):
        part.save_pretrained(where / "llava")
    compress(model, processor, VisionZip(tokens=9, order="raster")).save_pretrained(where / "stored")
    for family in ("llava_next", "paligemma"):
        for part in build(family):
            part.save_pretrained(where / family)
    return where


def changed(folder: Path, out: Path, **values: Any) -> str:
    """A copy of the LLaVA's config.json with other values, in a folder of its own."""
    config = json.loads((folder / "llava" / "config.json").read_text())
    out.mkdir()
    (out / "config.json").write_text(json.dumps(config | values))
    return str(out)


# --- the plan ----------------------------------------------------------------------------------------


def test_the_overrides_name_our_architecture_and_the_settings(folder: Path) -> None:
    plan = make_plan(str(folder / "llava"), VisionZip(tokens=12))
    assert plan.overrides() == STRICT
    assert plan.overrides({"text_config": {"vocab_size": 9}}) == {
        "text_config": {"vocab_size": 9},
        **STRICT,
    }
    limited = make_plan(str(folder / "llava"), VisionZip(tokens=12), 30)
    assert limited.overrides()["vlmzip"] == STRICT["vlmzip"] | {"max_visual_tokens": 30}
    assert limited.compression.most == 30


def test_stored_settings_serve_without_a_method_and_yield_to_one(folder: Path) -> None:
    stored = make_plan(str(folder / "stored"), None)
    assert stored.overrides() == {
        "architectures": [OURS],
        "vlmzip": {"method": "visionzip", "tokens": 9, "order": "raster"},
    }
    assert make_plan(str(folder / "stored"), VisionZip(tokens=12)).overrides() == STRICT
    assert make_plan(str(folder / "stored"), None, 20).settings["max_visual_tokens"] == 20


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"architectures": ["LlavaForConditionalGeneration"]}, "must not set architectures"),
        ({"vlmzip": {"method": "visionzip", "tokens": 3}, "a": 1}, "must not set vlmzip"),
        (lambda config: config, "must be a dict"),
    ],
)
def test_overrides_that_undo_the_compression_are_refused(folder: Path, own: Any, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        engine_args(folder / "llava", VisionZip(tokens=12), hf_overrides=own)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model_impl": "transformers"}, "model_impl='transformers'.*auto or vllm"),
        ({"model_impl": "terratorch"}, "model_impl"),
        ({"config_format": "mistral"}, "config_format"),
        ({"hf_config_path": "elsewhere"}, "hf_config_path"),
        ({"enable_mm_embeds": True}, "enable_mm_embeds"),
    ],
)
def test_arguments_that_undo_the_compression_are_refused(
    folder: Path, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        engine_args(folder / "llava", VisionZip(tokens=12), **arguments)
    check_arguments({"model_impl": "vllm", "config_format": "hf", "dtype": "bfloat16"})


def test_what_cannot_be_served_is_refused(folder: Path, tmp_path: Path) -> None:
    llava = str(folder / "llava")
    with pytest.raises(UnsupportedModelError, match=r"'paligemma'.*supported: llava, llava_next"):
        make_plan(str(folder / "paligemma"), VisionZip(tokens=12))
    other = changed(folder, tmp_path / "mantis", architectures=["MantisForConditionalGeneration"])
    with pytest.raises(UnsupportedModelError, match="MantisForConditionalGeneration"):
        make_plan(other, VisionZip(tokens=12))
    with pytest.raises(ValueError, match="stores none; give a budget, such as --tokens 64"):
        make_plan(llava, None)
    with pytest.raises(ValueError, match=r"a budget of 66 tokens does not fit.*65"):
        make_plan(llava, VisionZip(tokens=66))
    with pytest.raises(ValueError, match="max_visual_tokens=66 does not fit"):
        make_plan(llava, VisionZip(tokens=12), 66)
    with pytest.raises(ValueError, match="max_visual_tokens must be at least 1"):
        make_plan(llava, VisionZip(tokens=12), 0)
    with pytest.raises(TypeError, match="must be a vlmzip method"):
        make_plan(llava, {"tokens": 12})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no checkpoint folder"):
        make_plan("./nothing-here", VisionZip(tokens=12))
    bad = changed(folder, tmp_path / "bad", vlmzip={"method": "visionzip", "tokens": 12, "colour": 1})
    with pytest.raises(ValueError, match="unknown setting colour"):
        make_plan(bad, None)


def test_without_vllm_nothing_is_promised(folder: Path) -> None:
    with pytest.raises(RuntimeError, match=r"vLLM is not installed.*install_vllm\.sh"):
        vlmzip.vllm.engine_args(folder / "llava", Random(tokens=12), max_model_len=512)


# --- the command ---------------------------------------------------------------------------------------


def test_options_go_to_vllm_as_they_stand(folder: Path) -> None:
    plan = make_plan(str(folder / "llava"), VisionZip(tokens=12))
    given = ["--port", "8001", "--dtype=float32", "-tp", "2", "--limit-mm-per-prompt", '{"image": 2}']
    program, verb, model, option, overrides, *rest = serve_command(plan, given)
    assert (Path(program).name, verb, model) == ("vllm", "serve", str(folder / "llava"))
    assert option == "--hf-overrides"
    assert json.loads(overrides) == STRICT
    assert rest == given
    assert "--trust-request-mm-kwargs" in serve_command(plan, given, request_budgets=True)
    asked = serve_command(plan, ["--trust-request-mm-kwargs"], request_budgets=True)
    assert asked.count("--trust-request-mm-kwargs") == 1


@pytest.mark.parametrize(
    "words", [["--hf-overrides", '{"a": 1}'], ['--hf_overrides={"a": 1}'], ['--hf-overrides={"a": 1}']]
)
def test_overrides_of_the_command_line_are_merged(folder: Path, words: list[str]) -> None:
    plan = make_plan(str(folder / "llava"), VisionZip(tokens=12))
    command = serve_command(plan, [*words, "--port", "1"])
    assert command[5:] == ["--port", "1"]
    assert json.loads(command[4]) == {"a": 1, **STRICT}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--hf-overrides", '{"architectures": []}'], "must not set architectures"),
        (["--hf-overrides", '{"vlmzip": {}}'], "must not set vlmzip"),
        (["--hf-overrides", "{"], "is not JSON"),
        (["--hf-overrides", "[]"], "must be a JSON object"),
        (["--hf-overrides"], "needs a value"),
        (["--hf-overrides.vlmzip.tokens", "3"], "as JSON"),
        (["--hf_overrides.a=3"], "as JSON"),
        (["--hf-over", "{}"], "in full: --hf-overrides"),
        (["--model-impl", "transformers"], "model_impl"),
        (["--model_impl=transformers"], "model_impl"),
        (["--model-i", "transformers"], "in full: --model-impl"),
        (["--model", "other"], "first argument"),
        (["--config", "serve.yaml"], "a file of options"),
        (["--config-format", "mistral"], "config_format"),
        (["--hf-config-path", "x"], "hf_config_path"),
        (["--enable-mm-embeds"], "enable_mm_embeds"),
    ],
)
def test_options_that_undo_the_compression_are_refused(
    folder: Path, words: list[str], reason: str
) -> None:
    done = serve(folder, "--tokens", "12", "--dry-run", *words)
    assert done.exit_code == 2
    assert reason in done.stderr


# --- the verb -----------------------------------------------------------------------------------------


def serve(folder: Path, *words: str, model: str = "llava") -> Result:
    return CliRunner().invoke(app, ["serve", str(folder / model), *words])


def test_a_dry_run_prints_the_command_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--tokens", "12", "--dry-run", "--port", "8001")
    monkeypatch.delenv("VLLM_NO_USAGE_STATS", raising=False)
    quiet = serve(folder, *words)
    assert quiet.stdout.startswith("VLLM_NO_USAGE_STATS=1 ")
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "0")
    done = serve(folder, *words)
    assert quiet.stdout.removeprefix("VLLM_NO_USAGE_STATS=1 ") == done.stdout
    assert done.exit_code == 0, done.stderr
    plan = make_plan(str(folder / "llava"), VisionZip(tokens=12))
    assert shlex.split(done.stdout) == serve_command(plan, ["--port", "8001"])
    assert "note: it would not start here: vLLM is not installed" in done.stderr


def test_the_dry_runs_document(folder: Path) -> None:
    words = ("--dominant", "8", "--contextual", "4", "--merge", "average", "--request-budgets")
    done = serve(folder, *words, "--max-visual-tokens", "40", "--dry-run", "--json")
    found = json.loads(done.stdout)
    assert found["family"] == "llava"
    assert found["architecture"] == OURS
    assert found["vlmzip"] == {
        "method": "visionzip",
        "dominant": 8,
        "contextual": 4,
        "merge": "average",
        "order": "grouped",
        "max_visual_tokens": 40,
    }
    assert found["sample"] == {"width": 640, "height": 480, "image_tokens": 12, "stock": 64}
    assert "--trust-request-mm-kwargs" in found["command"]
    assert "vLLM is not installed" in found["problem"]


def test_the_sample_is_counted_as_the_family_counts(folder: Path) -> None:
    words = ("--tokens", "16", "--dry-run", "--json")
    found = json.loads(serve(folder, *words, model="llava_next").stdout)
    plan = make_plan(str(folder / "llava_next"), VisionZip(tokens=16))
    views = plan.compression.family.anyres.views((480, 640))  # type: ignore[attr-defined]
    assert found["sample"]["image_tokens"] == 16 * views
    assert found["sample"]["stock"] > 16 * views


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((), "give a budget, such as --tokens 64"),
        (("--tokens", "12"), "vLLM is not installed"),
        (("--tokens", "99", "--dry-run"), "does not fit"),
        (("--tokens", "12", "--keep", "0.5"), "exactly one budget"),
        (("--tokens", "12", "--method", "none"), "unknown method"),
        (("--tokens", "12", "--json"), "--json goes with --dry-run"),
        (("--tokens", "12", "--max-visual-tokens", "20"), "give --request-budgets"),
        (("--keep", "0.1", "--request-budgets"), "needs --max-visual-tokens"),
        (("--tokens", "12", "--request-budgets", "--max-visual-tokens", "0"), "at least 1"),
    ],
)
def test_it_refuses_with_one_line_and_2(folder: Path, words: tuple[str, ...], reason: str) -> None:
    done = serve(folder, *words)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert reason in done.stderr


def test_the_model_comes_first(folder: Path) -> None:
    done = CliRunner().invoke(app, ["serve", "--port", "8001", str(folder / "llava"), "--tokens", "9"])
    assert done.exit_code == 2
    assert "MODEL comes before" in done.stderr


def test_a_checkpoint_without_a_processor_is_refused(folder: Path, tmp_path: Path) -> None:
    bare = changed(folder, tmp_path / "bare")
    done = serve(folder, "--tokens", "12", "--dry-run", model=bare)
    assert done.exit_code == 2
    assert "holds no processor" in done.stderr
