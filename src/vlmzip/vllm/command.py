"""The ``vllm serve`` command that serves a plan, from options that people give to ``vllm serve``."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmzip.vllm.engine import Plan, check_arguments, default_arguments

# vLLM reports its use over the network unless told not to; a server asks for nothing there by itself.
QUIET = {"VLLM_NO_USAGE_STATS": "1"}

# Options whose meaning is taken: read here, or refused with the reason.
_READ = ("hf-overrides", "model-impl", "config-format", "hf-config-path", "enable-mm-embeds")
_REFUSED = {
    "model": "the model is MODEL, the first argument",
    "config": "a file of options could undo the compression unseen; give its options here",
}
_SWITCHES = ("enable-mm-embeds",)


def program() -> str:
    """The ``vllm`` program beside this Python, so that the plugin checked is the plugin loaded."""
    beside = Path(sys.executable).with_name("vllm")
    return str(beside) if beside.exists() else "vllm"


def serve_command(plan: Plan, options: Sequence[str], *, request_budgets: bool = False) -> list[str]:
    """The words of the ``vllm serve`` command.

    Args:
        plan: What is served.
        options: Options of ``vllm serve``, as on its command line; ``--hf-overrides`` is merged.
        request_budgets: Requests may choose their own ``visual_tokens``.

    Raises:
        TypeError: ``--hf-overrides`` is no JSON object.
        ValueError: An option would undo the compression, or must be spelled out.
    """
    rest, read = _take(list(options))
    arguments: dict[str, Any] = {name.replace("-", "_"): value for name, value in read.items()}
    own = arguments.pop("hf_overrides", None)
    check_arguments(arguments)
    overrides = plan.overrides(None if own is None else _json_object(own))
    words = [program(), "serve", plan.model, "--hf-overrides", json.dumps(overrides)]
    given = {_name(word).replace("-", "_"): True for word in rest if word.startswith("--")}
    for name, value in default_arguments(given).items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    if request_budgets and "trust_request_mm_kwargs" not in given:
        words.append("--trust-request-mm-kwargs")
    return words + rest


def _take(options: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Options to pass on, and the values of those that are read here (which are passed on, too,
    but for ``--hf-overrides``)."""
    rest: list[str] = []
    read: dict[str, Any] = {}
    while options:
        word = options.pop(0)
        name = _name(word) if word.startswith("--") else ""
        _check_spelling(word, name)
        if name not in _READ:
            rest.append(word)
            continue
        if name in _SWITCHES:
            read[name] = True
        elif "=" in word:
            read[name] = word.partition("=")[2]
        elif options:
            read[name] = options.pop(0)
        else:
            raise ValueError(f"option {word} needs a value")
        if name != "hf-overrides":
            rest += [f"--{name}"] if name in _SWITCHES else [f"--{name}", read[name]]
    return rest, read


def _name(word: str) -> str:
    """An option's name as vLLM's parser takes it: dashes or underscores, up to ``=`` or ``.``."""
    return word[2:].partition("=")[0].partition(".")[0].replace("_", "-")


def _check_spelling(word: str, name: str) -> None:
    if not name:
        return
    if name in _REFUSED:
        raise ValueError(f"option {word.partition('=')[0]} cannot be used: {_REFUSED[name]}")
    if name == "hf-overrides" and "." in word.partition("=")[0]:
        raise ValueError(
            f"write {word} as JSON, --hf-overrides '{{...}}': vLLM would take it in place of the "
            "compression's settings"
        )
    # vLLM's parser takes any unambiguous beginning of a name.
    whole = [known for known in (*_READ, *_REFUSED) if known.startswith(name) and known != name]
    if whole and name not in (*_READ, *_REFUSED):
        raise ValueError(f"write option {word} in full: --{' or --'.join(whole)}")


def _json_object(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--hf-overrides is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"--hf-overrides must be a JSON object, got {text}")
    return value
