"""Answers on disk, one JSON line each, so that a measurement that was stopped can go on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

__all__ = ["AnswerFile"]

_FORMAT = "vlmzip answers 1"


class AnswerFile:
    """A file of answers, read when opened and appended to batch by batch.

    Its first line says what they are answers of: model, test set and so on. A line cut short, as a
    killed program leaves it, is dropped. Without a path answers are kept in memory only.

    Raises:
        ValueError: The file is of something else, or no file of answers at all; nothing is changed.
        OSError: It cannot be read or written.
    """

    def __init__(self, path: Path | None, about: Mapping[str, str]) -> None:
        self._path = path
        self._known: dict[tuple[str, int], tuple[str, str]] = {}
        self._file = None
        if path is None:
            return
        self._file = path.open("a+b")  # also the check that it can be written
        try:
            self._file.seek(0)
            *lines, rest = self._file.read().split(b"\n")
            self._read(path, lines, rest, {"format": _FORMAT, **about})
        except Exception:
            self._file.close()
            raise

    def _read(self, path: Path, lines: list[bytes], rest: bytes, head: Mapping[str, str]) -> None:
        assert self._file is not None
        if not lines:
            if rest and not _line(head).startswith(rest):
                raise ValueError(f"{path} is no file of answers; give a new name with --out")
            self._file.truncate(0)
            self._file.write(_line(head))
            self._file.flush()
            return
        _check_head(path, _parsed(path, 1, lines[0]), head)
        for number, line in enumerate(lines[1:], 2):
            entry = _parsed(path, number, line)
            try:
                place = (_settings_key(entry["method"]), int(entry["question"]))
                self._known[place] = (str(entry["key"]), str(entry["answer"]))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"line {number} of {path} is damaged; delete the file") from error
        if rest:
            self._file.truncate(sum(len(line) + 1 for line in lines))

    def __len__(self) -> int:
        return len(self._known)

    def get(self, settings: Mapping[str, Any], question: int, key: str) -> str | None:
        """The answer that a method's settings gave to a question, None if there is none yet.

        Raises:
            ValueError: It is an answer to another question.
        """
        known = self._known.get((_settings_key(settings), question))
        if known is None:
            return None
        if known[0] != key:
            raise ValueError(
                f"{self._path} holds answers to other questions (number {question} differs); delete it "
                "or give another name with --out"
            )
        return known[1]

    def add(self, settings: Mapping[str, Any], answers: Sequence[tuple[int, str, str]]) -> None:
        """Keep answers, each with the question's number and key, at once on disk."""
        name = _settings_key(settings)
        self._known.update({(name, number): (key, text) for number, key, text in answers})
        if self._file is not None:
            entries = (
                {"method": settings, "question": number, "key": key, "answer": text}
                for number, key, text in answers
            )
            self._file.write(b"".join(map(_line, entries)))
            self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, ensure_ascii=False).encode() + b"\n"


def _settings_key(settings: Mapping[str, Any]) -> str:
    return json.dumps(dict(settings), sort_keys=True)


def _parsed(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(line)
        if not isinstance(entry, dict):
            raise ValueError("no JSON object")
    except ValueError as error:
        if number == 1:
            raise ValueError(f"{path} is no file of answers; give a new name with --out") from error
        raise ValueError(f"line {number} of {path} is damaged; delete the file") from error
    return entry


def _check_head(path: Path, found: dict[str, Any], wanted: Mapping[str, str]) -> None:
    if found.get("format") != wanted["format"]:
        raise ValueError(f"{path} is no file of answers; give a new name with --out")
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ValueError(
                f"{path} holds answers of another {name} ({found.get(name)}, now {value}); delete it or "
                "give another name with --out"
            )
