"""The command line: what ask, show and models print is what the model does."""

import json
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

import vlmzip
from contract import built, cases, image
from vlmzip import Random, VisionZip, compress, families
from vlmzip.asking import prepare, prompt_for
from vlmzip.cli import app, main
from vlmzip.commands.options import build_method
from vlmzip.loading import load
from vlmzip.tiny import random
from vlmzip.tiny.random.llava import build

QUESTION = "What is it?"
PROGRAM = Path(sys.executable).with_name("vlmzip")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, the same saved with settings, one without a chat template, and an image."""
    where = tmp_path_factory.mktemp("cli")
    image(3, 200, 150).save(where / "image.png")
    model, processor = build(112)
    model.save_pretrained(where / "model")
    processor.save_pretrained(where / "model")
    compress(model, processor, VisionZip(tokens=12, order="raster")).save_pretrained(where / "saved")
    _, processor = build(112)
    processor.chat_template = None
    model.save_pretrained(where / "plain")
    processor.save_pretrained(where / "plain")
    return where


def run(folder: Path, verb: str, *words: str) -> Result:
    """Run ``verb`` on the image and checkpoint, which must succeed."""
    question = [QUESTION] if verb == "ask" else []
    given = [] if "--model" in words else ["--model", str(folder / "model")]
    result = CliRunner().invoke(app, [verb, str(folder / "image.png"), *question, *given, *words])
    assert result.exit_code == 0, result.output
    return result


def document(folder: Path, verb: str, *words: str) -> Any:
    return json.loads(run(folder, verb, *words, "--json").stdout)


def by_hand(folder: Path, method: Any, tokens: int) -> tuple[str, Any]:
    """Answer and selection through the Python API."""
    model, processor = load(str(folder / "model"))
    picture = Image.open(folder / "image.png")
    text = f"USER: <image>\n{QUESTION} ASSISTANT:"
    with compress(model, processor, method) as zipped:
        inputs = processor(images=picture, text=text, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        answer = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return answer.strip(), zipped.last[0]


# --- ask --------------------------------------------------------------------------------------------


def test_ask_answers_as_the_python_api_does(folder: Path) -> None:
    answer, _ = by_hand(folder, VisionZip(tokens=20, merge="average"), 6)
    found = document(folder, "ask", "--tokens", "20", "--merge", "average", "--max-new-tokens", "6")
    assert found["compressed"]["answer"] == answer
    assert found["compressed"]["image_tokens"] == 20
    assert found["uncompressed"]["image_tokens"] == 64
    extra = found["uncompressed"]["prompt_tokens"] - found["compressed"]["prompt_tokens"]
    assert extra == 44
    assert found["method"] == {
        "method": "visionzip",
        "tokens": 20,
        "merge": "average",
        "order": "grouped",
    }
    assert found["compressed"]["first_token_ms"] > 0
    assert "answer" not in found["uncompressed"]


def test_compare_answers_as_the_untouched_model_does(folder: Path) -> None:
    model, processor = load(str(folder / "model"))
    inputs = prepare(processor, Image.open(folder / "image.png"), prompt_for(processor, QUESTION), model)
    out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    answer = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    found = document(folder, "ask", "--compare", "--max-new-tokens", "6")
    assert found["uncompressed"]["answer"] == answer
    assert found["uncompressed"]["image_tokens"] == 64
    assert found["compressed"]["image_tokens"] == 7
    assert found["uncompressed"]["first_token_ms"] > 0
    assert found["timing"]["runs"] >= 1


def test_ask_prints_counts_and_the_answer(folder: Path) -> None:
    answer, _ = by_hand(folder, VisionZip(tokens=20), 4)
    printed = run(folder, "ask", "--tokens", "20", "--max-new-tokens", "4").stdout
    assert answer in printed
    assert "20 of 64" in printed
    assert "first token" in printed
    compared = run(folder, "ask", "--tokens", "16", "--max-new-tokens", "4", "--compare").stdout
    assert "4.00 x" in compared


def test_without_a_budget_a_ninth_is_kept_or_what_was_saved(folder: Path) -> None:
    words = ("--max-new-tokens", "1")
    assert document(folder, "ask", *words)["compressed"]["image_tokens"] == 7  # of 65
    saved = document(folder, "ask", *words, "--model", str(folder / "saved"))
    assert saved["method"] == {"method": "visionzip", "tokens": 12, "order": "raster"}
    assert saved["compressed"]["image_tokens"] == 12
    assert build_method(None, merge="average") == VisionZip(keep=1 / 9, merge="average")
    assert build_method("random", tokens=5, merge=None) == Random(tokens=5)


def test_a_processor_without_a_chat_template_gets_llavas_prompt(folder: Path) -> None:
    _, processor = load(str(folder / "plain"))
    assert processor.chat_template is None
    assert prompt_for(processor, "Why?") == "USER: <image>\nWhy? ASSISTANT:"
    assert prompt_for(random.build("paligemma")[1], "Why?") == "<image>Why?"
    words = ("--model", str(folder / "plain"), "--tokens", "9", "--max-new-tokens", "1")
    assert document(folder, "ask", *words)["compressed"]["image_tokens"] == 9


def test_a_template_that_begins_with_the_first_token_does_not_double_it(folder: Path) -> None:
    model, processor = load(str(folder / "model"))
    picture = Image.open(folder / "image.png")
    ids = prepare(processor, picture, "<s>USER: <image> hi", model)["input_ids"][0].tolist()
    assert ids.count(processor.tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(folder: Path, dtype: str) -> None:
    words = ("--dtype", dtype, "--device", "cpu", "--tokens", "9", "--max-new-tokens", "1")
    found = document(folder, "ask", *words)
    assert (found["dtype"], found["device"]) == (dtype, "cpu")


@pytest.mark.parametrize("case", cases())
def test_every_family_answers_and_shows(case: tuple[str, str], tmp_path: Path) -> None:
    model, processor = built(*case)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    image(3, 200, 150).save(tmp_path / "image.png")
    found = document(tmp_path, "ask", "--max-new-tokens", "2", "--keep", "0.3")
    assert 0 < found["compressed"]["image_tokens"] < found["uncompressed"]["image_tokens"]
    shown = document(tmp_path, "show", "--keep", "0.3", "-o", str(tmp_path / "map.png"))
    kept = sum(len(view["dominant"]) + len(view["contextual"]) for view in shown["views"])
    assert kept == found["compressed"]["image_tokens"]
    assert Image.open(tmp_path / "map.png").width > 800


# --- show -------------------------------------------------------------------------------------------


def test_show_prints_the_selection(folder: Path) -> None:
    _, wanted = by_hand(folder, VisionZip(dominant=8, contextual=4), 1)
    found = document(folder, "show", "--dominant", "8", "--contextual", "4")
    (view,) = found["views"]
    assert view["grid"] == [8, 8]
    assert view["cls_token"] is True
    assert [view["dominant"]] == wanted.dominant.tolist()
    assert [view["contextual"]] == wanted.contextual.tolist()
    assert [view["assignment"]] == wanted.assignment.tolist()
    np.testing.assert_allclose([view["scores"]], wanted.scores, rtol=1e-6)
    assert found["out"] is None


def test_the_map_shows_what_the_model_saw_and_what_became_of_it(folder: Path) -> None:
    """Colours are read off the drawing's own tint, not off the file, whose layout may change."""
    from vlmzip.picture import _Map, _palette, _tint, seen_views

    model, processor = load(str(folder / "model"))
    picture = Image.open(folder / "image.png")
    with compress(model, processor, VisionZip(dominant=8, contextual=4, order="raster")) as zipped:
        inputs = prepare(processor, picture, "<image>", model)
        with torch.no_grad():
            model(**inputs)
        selection = zipped.last[0]
    (seen,) = seen_views(processor, inputs, selection, picture)
    crop = picture.resize((149, 112), Image.Resampling.BICUBIC).crop((18, 0, 130, 112))
    assert np.abs(seen.astype(int) - np.asarray(crop).astype(int)).max() <= 2
    tokens = _Map(selection, 0)
    tinted = _tint(tokens, seen)
    grey = seen / 255 @ np.array([0.299, 0.587, 0.114])
    for index in range(64):
        row, column = divmod(index, 8)
        at = (row * 14 + 5, column * 14 + 5)
        token = index + 1  # CLS is token 0
        place = selection.assignment[0, token].item()
        if token in selection.dominant[0]:
            wanted = seen[at] / 255
        else:
            homes = selection.assignment[0, selection.contextual[0]].tolist()
            wanted = 0.62 * _palette(4)[homes.index(place)] + 0.38 * grey[at]
        np.testing.assert_allclose(tinted[at], wanted, atol=1e-9)


@pytest.mark.parametrize("ending", ["png", "jpg", "pdf", "svg"])
def test_show_writes_pictures(folder: Path, tmp_path: Path, ending: str) -> None:
    out = tmp_path / f"map.{ending}"
    result = run(folder, "show", "-o", str(out))
    assert str(out) in result.stdout.replace("\n", "")
    start = out.read_bytes()[:5]
    assert start.startswith(
        {"png": b"\x89PNG", "jpg": b"\xff\xd8", "pdf": b"%PDF", "svg": b"<?xml"}[ending]
    )


@pytest.mark.parametrize("words", [("--method", "random"), ("--keep", "1"), ("--tokens", "1")])
def test_show_draws_maps_without_contextual_tokens(folder: Path, tmp_path: Path, words: Any) -> None:
    run(folder, "show", "-o", str(tmp_path / "map.png"), *words)
    assert (tmp_path / "map.png").stat().st_size > 10_000


# --- models, and the program as a whole ---------------------------------------------------------------


def test_models_lists_every_family() -> None:
    found = json.loads(CliRunner().invoke(app, ["models", "--json"]).stdout)
    assert [card["family"] for card in found["families"]] == list(families())
    assert all(card["models"] and card["tested"] and card["untested"] for card in found["families"])
    assert found["methods"] == list(vlmzip.methods())
    engines = {engine["engine"]: engine["families"] for engine in found["engines"]}
    assert engines["transformers"] == list(families())
    assert {"llava", "llava_next"} <= set(engines["vllm"]) < set(families())
    printed = CliRunner().invoke(app, ["models"]).stdout
    assert all(f"\n{name}\n" in f"\n{printed}" for name in families())


def test_path_prints_a_folder_that_holds_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlmzip.tiny.tiny_path", lambda name: tmp_path / name)
    missing = CliRunner().invoke(app, ["path", "tiny-llava"])
    assert (missing.exit_code, missing.stdout) == (2, "")
    assert missing.stderr.startswith("error: the weights of tiny-llava are not part of this installation")
    (tmp_path / "tiny-llava").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "tiny-llava" / name).touch()
    found = CliRunner().invoke(app, ["path", "tiny-llava"])
    assert (found.exit_code, found.stdout) == (0, f"{tmp_path / 'tiny-llava'}\n")


def test_version_and_help() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout == f"vlmzip {vlmzip.__version__}\n"
    for verb in ("ask", "show", "models", "eval", "demo"):
        result = CliRunner().invoke(app, [verb, "--help"])
        assert result.exit_code == 0
        assert "--json" in result.stdout


def test_no_command_prints_the_help_and_no_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["vlmzip"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert "models" in printed.out + printed.err
    assert "error" not in printed.err


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys; sys.argv = ['vlmzip', 'ask', '--help']\n"
        "from vlmzip.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_stdout_of_the_program_is_one_document_and_stderr_is_quiet(folder: Path) -> None:
    words = ["ask", folder / "image.png", QUESTION, "--model", folder / "model", "--json"]
    done = subprocess.run([PROGRAM, *words, "--max-new-tokens", "1"], capture_output=True, check=True)
    assert json.loads(done.stdout)["compressed"]["image_tokens"] == 7
    assert done.stderr == b""


def test_the_program_fails_with_one_line_and_2(folder: Path) -> None:
    words = ["show", folder / "none.png", "--json"]
    done = subprocess.run([PROGRAM, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"error: there is no file {folder / 'none.png'}\n"


def test_the_first_frame_is_used_and_interruption_exits_with_130(folder: Path, tmp_path: Path) -> None:
    moving = tmp_path / "moving.gif"
    frames = [image(seed) for seed in range(3)]
    frames[0].save(moving, save_all=True, append_images=frames[1:])
    words = ["ask", moving, QUESTION, "--model", folder / "model", "--max-new-tokens", "4000"]
    # A shell's background jobs, and so their children, ignore the signal unless told otherwise.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipe = subprocess.PIPE
    with subprocess.Popen([PROGRAM, *words], stderr=pipe, stdout=pipe, preexec_fn=heed) as program:
        assert program.stderr is not None
        said = program.stderr.readline().decode()
        program.send_signal(signal.SIGINT)
        rest = program.stderr.read().decode()
    assert said == f"note: {moving} has 3 frames; the first is used\n"
    assert program.returncode == 130
    assert "Traceback" not in rest
