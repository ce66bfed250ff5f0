"""Tiny random checkpoints of every family, with a processor: real loading paths, no download."""

import pkgutil
from collections.abc import Callable
from importlib import import_module
from typing import Any

Builder = Callable[[], tuple[Any, Any]]

_FAMILIES = tuple(
    sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in ("__main__", "parts"))
)


def build(family: str) -> tuple[Any, Any]:
    """Make a (model, processor) of a family; weights are random but the same every time.

    Raises:
        ValueError: There is no such family.
    """
    if family not in _FAMILIES:
        raise ValueError(f"unknown family {family!r}; known: {', '.join(_FAMILIES)}")
    builder: Builder = import_module(f"{__name__}.{family}").build
    return builder()
