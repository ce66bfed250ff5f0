"""Every row of the table in bad_input.py: the right error, one clear line, nothing else."""

import copy
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bad_input import CALLS, COMMANDS, Bench, Call, Command, make_checkpoints, make_images
from contract import image
from vlmzip.cli import app
from vlmzip.tiny.random.llava import build


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("bad_input")
    make_images(where, image(0))
    make_checkpoints(where)
    return where


@pytest.fixture(scope="session")
def good() -> tuple[Any, Any]:
    return build(112)


@pytest.mark.parametrize("row", COMMANDS, ids=lambda row: row.name)
def test_command_says_one_line_and_exits_with_2(row: Command, folder: Path) -> None:
    result = CliRunner().invoke(app, row.words(folder), terminal_width=500)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert re.match(r"error: \S", line), line
    assert re.search(row.says, line), line
    assert len(line) < 700, line


@pytest.mark.parametrize("row", CALLS, ids=lambda row: row.name)
def test_call_raises(row: Call, folder: Path, good: tuple[Any, Any]) -> None:
    model, processor = copy.deepcopy(good)
    with pytest.raises(row.error, match=row.says) as caught:
        row.run(Bench(folder, model, processor, image(0)))
    assert type(caught.value) is row.error, "a subclass says more than the table does"


def test_the_table_names_each_row_once() -> None:
    for rows in (COMMANDS, CALLS):
        names = [row.name for row in rows]
        assert len(names) == len(set(names))
    assert len(COMMANDS) + len(CALLS) >= 60


def test_bad_rows_are_about_their_own_fault(folder: Path) -> None:
    """The good image and model, on which the rows are built, work."""
    words = ["ask", f"{folder}/good.png", "hi", "--model", f"{folder}/good", "--max-new-tokens", "1"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.stderr
    assert "torch" in sys.modules
