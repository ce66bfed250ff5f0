"""The file of answers: what is kept, what is gone on with, and what is refused."""

import json
from pathlib import Path

import pytest

from vlmzip.evaluation import AnswerFile

ABOUT = {"model": "abc", "test set": "scenes-1"}
ZIP, RANDOM = {"method": "visionzip", "tokens": 16}, {"method": "random", "tokens": 16}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "answers.jsonl"
    with AnswerFile(path, ABOUT) as file:
        file.add(ZIP, [(0, "k0", "red"), (3, "k3", "top left")])
        file.add(RANDOM, [(0, "k0", "groß")])
    return path


def test_answers_are_there_again(path: Path) -> None:
    with AnswerFile(path, ABOUT) as file:
        assert len(file) == 3
        assert file.get(ZIP, 0, "k0") == "red"
        assert file.get({"tokens": 16, "method": "visionzip"}, 3, "k3") == "top left"
        assert file.get(RANDOM, 0, "k0") == "groß"
        assert file.get(RANDOM, 3, "k3") is None
        assert file.get(ZIP | {"merge": "average"}, 0, "k0") is None


def test_what_is_added_is_on_disk_at_once(path: Path) -> None:
    with AnswerFile(path, ABOUT) as file:
        file.add(ZIP, [(7, "k7", "no")])
        assert json.loads(path.read_text().splitlines()[-1])["answer"] == "no"


@pytest.mark.parametrize("cut", [1, 2, 20])
def test_a_line_that_was_cut_short_is_asked_again(path: Path, cut: int) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with AnswerFile(path, ABOUT) as file:
        assert len(file) == 2
        assert file.get(RANDOM, 0, "k0") is None
        file.add(RANDOM, [(0, "k0", "groß")])
    assert path.read_bytes() == whole


@pytest.mark.parametrize("length", [0, 1, 30])
def test_a_first_line_that_was_cut_short_is_written_again(path: Path, length: int) -> None:
    head = path.read_bytes().split(b"\n")[0] + b"\n"
    path.write_bytes(head[:length])
    with AnswerFile(path, ABOUT) as file:
        assert len(file) == 0
    assert path.read_bytes() == head


@pytest.mark.parametrize("name", ABOUT)
def test_answers_of_something_else_are_refused_and_stay(path: Path, name: str) -> None:
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"answers of another {name} .*delete it or"):
        AnswerFile(path, ABOUT | {name: "other"})
    assert path.read_bytes() == before


def test_answers_to_another_question_are_refused(path: Path) -> None:
    with AnswerFile(path, ABOUT) as file, pytest.raises(ValueError, match="number 3 differs"):
        file.get(ZIP, 3, "other")


@pytest.mark.parametrize("text", ["notes", "notes\nmore\n", "[1]\n", '{"format": "x"}\n', "{}"])
def test_other_files_are_refused_and_stay(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match="no file of answers"):
        AnswerFile(path, ABOUT)
    assert path.read_text() == text


@pytest.mark.parametrize(
    "line", ["what", "{}", '{"method": 3}', '{"method": {}, "question": "x", "key": "k", "answer": "a"}']
)
def test_a_damaged_line_is_named(path: Path, line: str) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], line + "\n", *lines[2:]]))
    with pytest.raises(ValueError, match=r"line 3 of .* is damaged"):
        AnswerFile(path, ABOUT)


def test_without_a_path_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with AnswerFile(None, ABOUT) as file:
        file.add(ZIP, [(0, "k0", "red")])
        assert file.get(ZIP, 0, "k0") == "red"
    assert list(tmp_path.iterdir()) == []
