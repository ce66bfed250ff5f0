"""vlmzip demo: what it prints is what the model does."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from vlmzip import VisionZip, compress
from vlmzip.asking import prepare, prompt_for
from vlmzip.cli import app
from vlmzip.commands.demo import _prefills
from vlmzip.loading import load
from vlmzip.tiny.questions import KINDS
from vlmzip.tiny.testset import exam_questions


@pytest.fixture(scope="module")
def printed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str, Path]:
    """The document, the printed report and the picture, on 14 questions instead of 300."""
    out = tmp_path_factory.mktemp("demo") / "map.png"
    words = ["demo", "--model", str(folder / "tiny-llava"), "-o", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vlmzip.evaluation.task.SUBSET", 14)
        document = CliRunner().invoke(app, [*words, "--json"])
        out.unlink()
        report = CliRunner().invoke(app, words)
    assert (document.exit_code, document.stderr) == (0, "")
    assert report.exit_code == 0
    return json.loads(document.stdout), report.stdout, out


def test_it_answers_the_first_question_of_each_kind(printed: tuple[Any, str, Path], folder: Path) -> None:
    found, _, _ = printed
    assert [scene["kind"] for scene in found["scenes"]] == list(KINDS)
    model, processor = load(str(folder / "tiny-llava"), device="cpu")
    for scene, question in zip(found["scenes"], exam_questions(7), strict=True):
        assert scene["question"] == question.question
        assert scene["right_answer"] == question.answer
        assert (scene["all"]["image_tokens"], scene["few"]["image_tokens"]) == (144, 16)
        assert scene["all"]["prompt_tokens"] - scene["few"]["prompt_tokens"] == 128
        for side in ("all", "few"):
            assert 0 < scene[side]["prefill_ms"] < scene[side]["first_token_ms"]
    question = exam_questions(7)[4]
    with compress(model, processor, VisionZip(tokens=16)):
        prompt = prompt_for(processor, question.question)
        inputs = prepare(processor, question.images[0], prompt, model)
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    text = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert found["scenes"][4]["few"]["answer"] == text.strip()


def test_it_measures_accuracy_beside_random(printed: tuple[Any, str, Path]) -> None:
    found, report, _ = printed
    rows = [(row["method"], row["tokens"], row["n"]) for row in found["rows"]]
    assert rows == [("none", 144, 14), ("visionzip", 16, 14), ("random", 16, 14)]
    assert found["questions"] == 14
    assert "minus random" in report


def test_it_says_which_answers_are_wrong(printed: tuple[Any, str, Path]) -> None:
    found, report, _ = printed
    wrong = sum(
        scene[side]["answer"] != scene["right_answer"]
        for scene in found["scenes"]
        for side in ("all", "few")
    )
    assert report.count("(wrong)") == wrong > 0


def test_it_draws_every_scene(printed: tuple[Any, str, Path]) -> None:
    found, report, out = printed
    assert found["picture"] == str(out)
    assert str(out) in report.replace("\n", "")
    picture = Image.open(out)
    assert picture.height > 2 * picture.width


def test_prefill_is_every_forward_of_the_language_model(folder: Path) -> None:
    model, processor = load(str(folder / "tiny-llava"), device="cpu")
    question = exam_questions(1)[0]
    inputs = prepare(processor, question.images[0], prompt_for(processor, question.question), model)
    with _prefills(model) as times:
        model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert len(times) == 3
    model.generate(**inputs, max_new_tokens=1, do_sample=False)
    assert len(times) == 3, "the hooks stayed"
