"""What the documentation says is so: code blocks run, commands parse, tables and links are right."""

import functools
import importlib.util
import inspect
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import skimage.data
import torch
import typer
from PIL import Image

import vlmzip
from markdown_pages import HUB_NAME, ROOT, anchors, blocks, commands, links
from vlmzip.cli import app, main
from vlmzip.families.base import Family
from vlmzip.methods import from_settings
from vlmzip.methods.base import REGISTRY, Method
from vlmzip.tiny.random import build

README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
METHOD_PAGE = ROOT / "docs" / "adding-a-method.md"
QUICK = {"ask", "show", "models"}


def pages(language: str) -> list[Any]:
    return [pytest.param(page, id=page.name) for page in PAGES if blocks(page, language)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    for part in build("llava"):
        part.save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def _folder_with_a_photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(skimage.data.astronaut()).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _no_method_stays() -> Iterator[None]:
    before = dict(REGISTRY)
    yield
    REGISTRY.clear()
    REGISTRY.update(before)


def run_blocks(page: Path, checkpoint: Path) -> dict[str, Any]:
    """Run a page's Python from top to bottom, in one namespace, as a reader would."""
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page, "python"):
        exec(compile(block.replace(HUB_NAME, str(checkpoint)), page.name, "exec"), names)
    return names


@pytest.mark.parametrize("page", pages("python"))
def test_the_python_runs(page: Path, checkpoint: Path) -> None:
    run_blocks(page, checkpoint)


def test_the_readme_shows_what_is_kept(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = run_blocks(README, checkpoint)["image"]
    said = re.findall(r"print\(image\.(\w+)\) +# \[(\d+), (\d+)\]", README.read_text())
    assert [name for name, *_ in said] == ["dominant", "contextual", "assignment"]
    for name, *shape in said:
        assert list(getattr(image, name).shape) == [int(size) for size in shape]


def test_a_later_turn_uses_the_cache_of_the_first(checkpoint: Path) -> None:
    names = run_blocks(README, checkpoint)
    first, second = names["first"], names["second"]
    assert second.shape[1] > first.sequences.shape[1] + names["question"].shape[1]
    assert torch.equal(second[:, : first.sequences.shape[1]], first.sequences)


def test_the_documented_method_is_a_method(checkpoint: Path) -> None:
    run_blocks(METHOD_PAGE, checkpoint)
    method = from_settings({"method": "strongest", "tokens": 7})
    scores = torch.tensor([[9.0, 0.3, 0.1, 0.8, 0.3, 0.7, 0.2, 0.0, 0.4, 0.5]])
    hidden = torch.arange(10.0).reshape(1, 10, 1)
    out = method(hidden, scores, torch.randn(1, 10, 4), (3, 3), 4, True)
    assert out.tokens.flatten().tolist() == [0, 3, 5, 9]
    assert out.assignment[0].tolist() == [0, -1, -1, 1, -1, 2, -1, -1, -1, 3]

    model, processor = build("llava")
    with vlmzip.compress(model, processor, method) as zipped:
        text = f"USER: {processor.image_token} ASSISTANT:"
        inputs = processor(images=Image.open("photo.jpg"), text=text, return_tensors="pt")
        assert (inputs["input_ids"] == model.config.image_token_id).sum() == 7
        model.generate(**inputs, max_new_tokens=1)
        (image,) = zipped.last
    assert image.dominant.shape == (1, 7)
    assert set(image.dominant[0, 1:].tolist()) == set((image.scores[0, 1:].topk(6).indices + 1).tolist())


@pytest.mark.parametrize("page", pages("sh"))
def test_the_commands_are_there(page: Path) -> None:
    for command in commands(page):
        check_command(shlex.split(command, comments=True))


def test_the_commands_of_the_readme_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    for command in commands(README):
        words = shlex.split(command, comments=True)
        if words[0] == "vlmzip" and words[1] in QUICK:
            run_program(words, monkeypatch)
        elif words[:3] == ["python", "-m", "vlmzip.tiny.random"]:
            run_program(words[2:], monkeypatch)
        else:
            continue
        ran.append(words[1])
    assert {"ask", "show"} <= set(ran)
    assert Image.open("map.png").size > (100, 100)


def run_program(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", words)
    module = functools.partial(runpy.run_module, words[0], run_name="__main__", alter_sys=True)
    with pytest.raises(SystemExit) as end:
        (main if words[0] == "vlmzip" else module)()
    assert not end.value.code, words


def check_command(words: list[str]) -> None:
    """A documented command exists, with its options; it is not run.

    Raises:
        AssertionError: It does not, or nobody has taught this function the program.
    """
    while "=" in words[0]:
        words = words[1:]
    match words:
        case ["make", *targets]:
            known = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
            assert {target for target in targets if "=" not in target} <= set(known), words
        case ["pip", "install", *arguments]:
            project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            extras = re.findall(r"\[([\w,-]+)\]", " ".join(arguments))
            for extra in ",".join(extras).split(",") if extras else []:
                assert extra in project["optional-dependencies"], words
        case ["vlmzip", verb, *arguments]:
            group: Any = typer.main.get_command(app)
            assert verb in group.commands, f"no verb: {words}"
            command = group.commands[verb]
            if hasattr(command, "commands"):  # bench serve
                verb, *arguments = arguments
                command = command.commands[verb]
            if "--help" not in arguments:
                command.make_context(verb, list(arguments))
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(module) is not None, words
        case ["python", script, *_]:
            assert (ROOT / script).is_file(), words
        case ["bash", script, *_]:
            assert (ROOT / script).is_file(), words
        case ["git" | "cd" | "source", *_]:
            pass
        case ["printf" | "ray" | "vllm", *_]:  # other people's; tests/vllm sends what printf prints
            pass
        case _:
            raise AssertionError(f"no test knows this command: {words}")


@pytest.mark.parametrize("page", [pytest.param(page, id=page.name) for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_tables_say_what_the_code_says() -> None:
    tables = docs_tables()
    for (file, name), table in tables.TABLES.items():
        text = (ROOT / "docs" / file).read_text()
        assert tables.filled(text, name, table()) == text, f"docs/{file} is out of date: run `make docs`"


def docs_tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_tables", ROOT / "scripts" / "docs_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_family_page_names_everything_to_write() -> None:
    text = (ROOT / "docs" / "adding-a-family.md").read_text()
    fields = set(inspect.get_annotations(Family))
    for name in Family.__abstractmethods__ | fields:
        assert f"| `{name}` |" in text, name


def test_the_method_page_names_every_argument_of_select() -> None:
    text = METHOD_PAGE.read_text()
    for name in list(inspect.signature(Method.select).parameters)[1:]:
        assert f"| `{name}` |" in text, name


def test_the_readme_names_every_setting_of_visionzip() -> None:
    text = README.read_text()
    for name in vlmzip.VisionZip.setting_names():
        assert re.search(rf"\b{name}\s?=", text), name
