"""The measurement against answers taken one by one, and what a run that was stopped leaves behind."""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from vlmzip import Random, VisionZip, compress
from vlmzip.asking import prepare, prompt_for
from vlmzip.cli import app
from vlmzip.evaluation import (
    AnswerFile,
    Contender,
    SceneTask,
    contenders,
    document,
    evaluate,
    fingerprint,
    wilson,
)
from vlmzip.evaluation.tables import over
from vlmzip.loading import load
from vlmzip.tiny.questions import KINDS
from vlmzip.tiny.testset import exam_questions

PROGRAM = Path(sys.executable).with_name("vlmzip")
COUNT = 14
ENTRANTS = [
    Contender("none", 144),
    Contender("visionzip", 16, VisionZip(tokens=16)),
    Contender("random", 16, Random(tokens=16)),
]


@pytest.fixture(scope="session")
def loaded(folder: Path) -> tuple[Any, Any]:
    return load(str(folder / "tiny-llava"), device="cpu")


@pytest.fixture(scope="session")
def by_hand(loaded: tuple[Any, Any]) -> dict[str, list[str]]:
    """Each contender's answers, question by question, through the Python API."""
    model, processor = loaded
    found: dict[str, list[str]] = {}
    for entrant in ENTRANTS:
        zipped = compress(model, processor, entrant.method) if entrant.method else None
        for question in exam_questions(COUNT):
            prompt = prompt_for(processor, question.question)
            inputs = prepare(processor, question.images[0], prompt, model)
            assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == entrant.tokens
            out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
            new = out[0, inputs["input_ids"].shape[1] :]
            text = processor.decode(new, skip_special_tokens=True).strip()
            found.setdefault(entrant.name, []).append(text)
        if zipped:
            zipped.remove()
    return found


@dataclass(frozen=True)
class Asked:
    """A test question whose right answer is what we say."""

    question: str
    answer: str
    kind: str
    image: Image.Image
    key: str


@dataclass(frozen=True)
class AskedTask:
    examples: list[Asked]
    name: str = "asked"
    max_new_tokens: int = 8

    def is_right(self, example: Any, given: str) -> bool:
        return bool(given == example.answer)


def task_with(answers: list[str]) -> AskedTask:
    return AskedTask(
        [
            Asked(question.question, answer, question.kind, question.images[0], str(number))
            for number, (question, answer) in enumerate(zip(exam_questions(COUNT), answers, strict=True))
        ]
    )


@pytest.mark.parametrize("batch", [1, 4, 50])
def test_batches_answer_as_questions_one_by_one(
    loaded: tuple[Any, Any], by_hand: dict[str, list[str]], batch: int
) -> None:
    """The right answers are VisionZip's on even questions and nobody's on odd ones."""
    keyed = [text if n % 2 == 0 else "\0" for n, text in enumerate(by_hand["visionzip"])]
    with AnswerFile(None, {}) as file:
        rows = evaluate(*loaded, task_with(keyed), ENTRANTS, file, batch=batch)
        for row in rows:
            given = [file.get(row.contender.settings, n, str(n)) for n in range(COUNT)]
            assert given == by_hand[row.contender.name]
    for row in rows:
        wanted = [
            given == answer for given, answer in zip(by_hand[row.contender.name], keyed, strict=True)
        ]
        assert list(row.right) == wanted
    assert sum(rows[1].right) == COUNT / 2
    assert len(set(map(tuple, by_hand.values()))) == 3, "three contenders that answer alike test nothing"


def test_the_document_counts_right_answers(
    loaded: tuple[Any, Any], by_hand: dict[str, list[str]]
) -> None:
    keyed = [text if n % 2 == 0 else "\0" for n, text in enumerate(by_hand["visionzip"])]
    with AnswerFile(None, {}) as file:
        rows = evaluate(*loaded, task_with(keyed), ENTRANTS, file)
    found = document("a/model", rows)
    assert found.keys() == {"model", "rows"}
    assert [(row["method"], row["tokens"]) for row in found["rows"]] == [
        ("none", 144),
        ("visionzip", 16),
        ("random", 16),
    ]
    few = found["rows"][1]
    assert few.keys() == {"method", "tokens", "accuracy", "low", "high", "n", "by_kind"}
    assert (few["accuracy"], few["n"]) == (0.5, COUNT)
    assert (few["low"], few["high"]) == (wilson(7, 14).low, wilson(7, 14).high)
    # Questions 0 to 13 go through the seven kinds twice; 0, 2, 4, 6 are of the first round.
    wanted = {kind: {"accuracy": 0.5, "n": 2} for kind in KINDS}
    assert few["by_kind"] == wanted
    gain = over(rows, rows[1], "random")
    assert gain is not None
    assert gain.difference == pytest.approx((7 - sum(rows[2].right)) / COUNT)
    assert over(rows, rows[0], "random") is None
    assert over(rows, rows[2], "random") is None


def test_the_model_is_as_before(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    with AnswerFile(None, {}) as file:
        evaluate(model, processor, task_with([""] * COUNT), ENTRANTS, file)
    compress(model, processor, VisionZip(tokens=3)).remove()


def test_contenders_are_none_and_every_method_at_every_budget(loaded: tuple[Any, Any]) -> None:
    example = SceneTask(1).examples[0]
    found = contenders(*loaded, example, ["visionzip", "random", "uniform"], None)
    assert [(one.name, one.tokens) for one in found] == [("none", 144)] + [
        (name, tokens) for name in ("visionzip", "random", "uniform") for tokens in (48, 16, 8)
    ]
    (_, seeded) = contenders(*loaded, example, ["random"], [5], seed=3)
    assert seeded.method == Random(tokens=5, seed=3)


@pytest.mark.parametrize(
    ("names", "budgets", "seed", "says"),
    [
        (["visionzip"], [146], None, "a view has only 145"),
        (["visionzip"], [0], None, "tokens"),
        (["visionzip"], [-3], None, "tokens"),
        (["vision"], [9], None, "unknown method 'vision'"),
        (["none"], [9], None, "unknown method 'none'"),
        ([], [9], None, "no methods"),
        (["random"], [], None, "no tokens"),
        (["random", "random"], [9], None, "twice: random, random"),
        (["random"], [9, 9], None, "twice: 9, 9"),
        (["uniform"], [9], 1, "none of uniform draws at random"),
    ],
)
def test_contenders_that_cannot_be(
    loaded: tuple[Any, Any], names: list[str], budgets: list[int], seed: int | None, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        contenders(*loaded, SceneTask(1).examples[0], names, budgets, seed)


def test_a_batch_of_none_is_refused(loaded: tuple[Any, Any]) -> None:
    with AnswerFile(None, {}) as file, pytest.raises(ValueError, match="at least 1 question"):
        evaluate(*loaded, task_with([""] * COUNT), ENTRANTS, file, batch=0)


# --- the built-in task ------------------------------------------------------------------------------


def test_the_scenes_are_the_test_set_s(loaded: tuple[Any, Any]) -> None:
    task = SceneTask(9)
    for example, question in zip(task.examples, exam_questions(9), strict=True):
        assert (example.question, example.answer, example.kind) == (
            question.question,
            question.answer,
            question.kind,
        )
        assert example.image.tobytes() == question.images[0].tobytes()
        assert task.is_right(example, question.answer)
        assert task.is_right(example, f" {question.answer.capitalize()}.\n")
        assert not task.is_right(example, f"{question.answer} x")
        assert not task.is_right(example, "")


def test_a_subset_is_the_beginning_and_its_keys_stay() -> None:
    few, more = SceneTask(10), SceneTask(40)
    assert [one.key for one in few.examples] == [one.key for one in more.examples[:10]]
    assert len({one.key for one in more.examples}) == 40
    # Answers on disk are known by these; if one changes, test set or dataclasses did.
    assert few.examples[0].key == "6397be3695a63223"


@pytest.mark.parametrize("count", [0, -1, 3151])
def test_counts_of_questions_that_cannot_be(count: int) -> None:
    with pytest.raises(ValueError, match="between 1 and 3150"):
        SceneTask(count)


# --- the fingerprint --------------------------------------------------------------------------------


def test_the_fingerprint_is_the_model_s(loaded: tuple[Any, Any], folder: Path) -> None:
    model, processor = loaded
    known = fingerprint(model, processor)
    assert fingerprint(*load(str(folder / "tiny-llava"), device="cpu")) == known
    assert fingerprint(*load(str(folder / "tiny-siglip"), device="cpu")) != known
    with compress(model, processor, VisionZip(tokens=5)):
        assert fingerprint(model, processor) == known
    other_model, other_processor = load(str(folder / "tiny-llava"), device="cpu")
    with torch.no_grad():
        other_model.model.vision_tower.embeddings.position_embedding.weight[3, 4] += 1e-3
    assert fingerprint(other_model, processor) != known
    other_processor.chat_template += " "
    assert fingerprint(model, other_processor) != known
    half, _ = load(str(folder / "tiny-llava"), "bfloat16", "cpu")
    assert fingerprint(half, processor) != known


# --- vlmzip eval ------------------------------------------------------------------------------------


def words(folder: Path, *more: Any) -> list[str]:
    budget = ["--questions", "10", "--tokens", "16,8", "--methods", "visionzip,uniform"]
    return ["eval", "--model", str(folder / "tiny-llava"), *budget, *map(str, more)]


def run(arguments: list[str]) -> Any:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result


def answer_rightly(file: Path, wrong: int) -> None:
    """Make all answers of the first contender right, save the first so many."""
    head, *lines = file.read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    questions = exam_questions(10)
    for entry in entries:
        if entry["method"] == {"method": "none"} and entry["question"] >= wrong:
            entry["answer"] = questions[entry["question"]].answer
    file.write_text("\n".join([head, *map(json.dumps, entries)]) + "\n")


def test_eval_prints_one_document_and_keeps_answers(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    first = run(words(folder, "--json", "-o", file))
    assert first.stderr == ""
    found = json.loads(first.stdout)
    assert found["model"] == str(folder / "tiny-llava")
    rows = [(row["method"], row["tokens"], row["n"]) for row in found["rows"]]
    assert rows == [
        ("none", 144, 10),
        ("visionzip", 16, 10),
        ("visionzip", 8, 10),
        ("uniform", 16, 10),
        ("uniform", 8, 10),
    ]
    assert len(file.read_text().splitlines()) == 1 + 5 * 10

    answer_rightly(file, wrong=3)
    again = run(words(folder, "--json", "--resume", file))
    assert "holds 50 answers already" in again.stderr
    full = json.loads(again.stdout)["rows"][0]
    assert (full["accuracy"], full["n"]) == (0.7, 10)
    assert (full["low"], full["high"]) == (wilson(7, 10).low, wilson(7, 10).high)
    assert {kind: count["n"] for kind, count in full["by_kind"].items()} == {
        kind: 2 if number < 3 else 1 for number, kind in enumerate(KINDS)
    }
    assert full["by_kind"]["colour"]["accuracy"] == 0.5
    printed = run(words(folder, "--out", file)).stdout
    assert "70.0" in printed
    assert "39.7 to 89.2" in printed
    assert all(kind in printed for kind in KINDS)


def test_a_run_that_was_killed_goes_on(folder: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    wanted = run(words(folder, "--json", "--batch", "1", "-o", whole)).stdout
    command = [str(PROGRAM), *words(folder, "--json", "--batch", "1", "-o", parts)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as program:
        while not parts.exists() or len(parts.read_bytes().splitlines()) < 6:
            assert program.poll() is None
            time.sleep(0.002)
        program.kill()
    with parts.open("rb") as file:
        kept = file.read()
    assert 6 <= len(kept.splitlines()) < 51, "it was not killed in the middle"
    assert run(words(folder, "--json", "--batch", "1", "-o", parts)).stdout == wanted
    assert parts.read_bytes().startswith(kept[: kept.rindex(b"\n") + 1])
    assert sorted(parts.read_bytes().splitlines()) == sorted(whole.read_bytes().splitlines())


def test_answers_of_other_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    run(words(folder, "-o", file))
    before = file.read_bytes()
    changed = words(folder, "-o", file, "--model", folder / "tiny-siglip")
    result = CliRunner().invoke(app, changed)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "holds answers of another model" in result.stderr
    assert file.read_bytes() == before


def test_a_tower_without_cls_is_measured_too(folder: Path) -> None:
    words = ["eval", "--model", str(folder / "tiny-siglip"), "--questions", "3", "--json"]
    found = json.loads(run([*words, "--tokens", "144,16", "--methods", "random,visionzip"]).stdout)
    assert [row["tokens"] for row in found["rows"]] == [144, 144, 16, 144, 16]
