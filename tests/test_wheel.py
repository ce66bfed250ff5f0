"""The wheel, built and installed in a new environment, does what the README promises."""

import json
import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import skimage.data
from PIL import Image

from markdown_pages import HUB_NAME, ROOT, blocks
from vlmzip.tiny import NAMES, tiny_path

pytestmark = pytest.mark.xdist_group("wheel")  # one worker, so one build and one environment


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = ["-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    run(Path(sys.executable), *command)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment's folder of programs; vlmzip comes from the wheel, all else from this one.

    torch and transformers take minutes to install, so a .pth file points to where they are. That
    folder's own .pth files are not read, so an editable vlmzip in it stays out of sight.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True, with_pip=False)
    paths = {"base": str(folder), "platbase": str(folder)}
    packages = Path(sysconfig.get_path("purelib", scheme="venv", vars=paths))
    programs = Path(sysconfig.get_path("scripts", scheme="venv", vars=paths))
    pip = ["-m", "pip", "--python", str(programs / "python"), "install", "--no-deps", "--no-index"]
    run(Path(sys.executable), *pip, str(wheel))
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return programs


@pytest.fixture(scope="module")
def folder(environment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random checkpoint and a photo."""
    path = tmp_path_factory.mktemp("user")
    run(environment / "python", "-m", "vlmzip.tiny.random", "llava", "checkpoint", cwd=path)
    Image.fromarray(skimage.data.astronaut()).save(path / "photo.jpg")
    return path


def run(program: Path, *arguments: str, cwd: Path | None = None) -> str:
    """What a program prints; its errors are shown when it fails."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [program, *arguments], cwd=cwd, env=variables, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = next(name.split("/")[0] for name in names if ".dist-info/" in name)
    assert {name.split("/")[0] for name in names} == {"vlmzip", info}
    assert {"vlmzip/py.typed", f"{info}/licenses/LICENSE", f"{info}/entry_points.txt"} <= names
    sources = {
        path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src" / "vlmzip").rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == sources


def test_both_embedded_models_are_in_it_and_it_is_small(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {info.filename: info.file_size for info in archive.infolist()}
    for name in NAMES:
        files = {f"vlmzip/tiny/checkpoints/{name}/{file.name}" for file in tiny_path(name).iterdir()}
        assert files <= packed.keys()
        assert f"vlmzip/tiny/checkpoints/{name}/model.safetensors" in files
    assert wheel.stat().st_size < 30_000_000


def test_an_embedded_model_answers_from_the_wheel(environment: Path, folder: Path) -> None:
    where = Path(run(environment / "vlmzip", "path", "tiny-llava").strip()).resolve()
    assert where.is_relative_to(environment.parent.resolve())
    measure = ["eval", "--questions", "14", "--tokens", "16", "--methods", "visionzip", "--json"]
    found = json.loads(run(environment / "vlmzip", *measure, cwd=folder))
    assert found["rows"][0]["accuracy"] > 0.5


def test_its_version_is_the_package_s(environment: Path, wheel: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    said = run(environment / "python", "-c", "import vlmzip; print(vlmzip.__version__)").strip()
    assert said == project["version"] == wheel.name.split("-")[1]


def test_the_package_that_runs_is_the_installed_one(environment: Path) -> None:
    where = run(environment / "python", "-c", "import vlmzip; print(vlmzip.__file__)").strip()
    assert Path(where).resolve().is_relative_to(environment.parent.resolve())


def test_the_readme_s_ten_lines_answer(environment: Path, folder: Path) -> None:
    first = blocks(ROOT / "README.md", "python")[0]
    statements = [line for line in first.splitlines() if line.strip()]
    assert len(statements) <= 10
    (folder / "ten_lines.py").write_text(first.replace(HUB_NAME, "checkpoint"))
    answer = run(environment / "python", "ten_lines.py", cwd=folder)
    assert "What is in the picture? ASSISTANT:" in answer
    assert not answer.strip().endswith("ASSISTANT:")


def test_the_program_says_what_it_can_do(environment: Path) -> None:
    said = run(environment / "vlmzip", "--help")
    for verb in ("demo", "ask", "show", "eval", "path", "models"):
        assert verb in said
