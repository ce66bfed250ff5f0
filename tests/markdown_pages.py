"""Reading code blocks, tables and links out of the project's Markdown files."""

import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent
HUB_NAME = "llava-hf/llava-1.5-7b-hf"

_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)(?: (?P<needs>\w+))?\n(?P<code>.*?)^(?P=indent)```$", re.M | re.S
)
_LINK = re.compile(r"\]\((?!https?:)([^)\s]*)\)")


def blocks(path: Path, language: str, needs: str | None = None) -> list[str]:
    """The code blocks of a language, in order, without their indentation.

    A word after the language, as in "```python vllm", says what a block needs to run; such blocks are
    left out unless asked for.
    """
    found = _FENCE.finditer(path.read_text())
    wanted = (language, needs)
    return [textwrap.dedent(b["code"]) for b in found if (b["language"], b["needs"]) == wanted]


def commands(path: Path) -> list[str]:
    """The commands of the shell blocks, in order, without comments, continued lines joined."""
    lines = "\n".join(blocks(path, "sh")).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def links(path: Path) -> list[str]:
    """Targets of the links that stay inside the project."""
    return _LINK.findall(path.read_text())


def anchors(path: Path) -> set[str]:
    """The names that its headings can be linked by."""
    heads = re.findall(r"^#+ (.*)$", _FENCE.sub("", path.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
