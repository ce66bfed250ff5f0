"""The compression methods: one file each, found by themselves."""

import pkgutil
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from vlmzip.methods.base import REGISTRY, Method, register

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    import_module(_module.name)


def methods() -> tuple[str, ...]:
    """Names of the methods, as in a settings dict's ``method``."""
    return tuple(sorted(REGISTRY))


def from_settings(settings: Mapping[str, Any]) -> Method:
    """Build a method from a settings dict such as ``{"method": "visionzip", "tokens": 64}``.

    Raises:
        TypeError: ``settings`` is not a mapping.
        ValueError: The method or a setting is unknown, or a value is out of range.
    """
    if not isinstance(settings, Mapping):
        raise TypeError(f"settings must be a dict, got {type(settings).__name__}")
    rest = dict(settings)
    name = rest.pop("method", None)
    if name not in REGISTRY:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(methods())}")
    cls = REGISTRY[name]
    if unknown := set(rest) - set(cls.setting_names()):
        raise ValueError(
            f"unknown setting {', '.join(sorted(unknown))} for method {name!r}; "
            f"known: {', '.join(cls.setting_names())}"
        )
    return cls(**rest)


__all__ = ["Method", "from_settings", "methods", "register"]
