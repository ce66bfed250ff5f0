"""The model families: one file each, found by themselves; a family's name is its model_type."""

import pkgutil
from importlib import import_module
from typing import Any

import transformers

_OLDEST = (5, 18)
if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < _OLDEST:
    raise ImportError(
        f"vlmzip needs transformers {_OLDEST[0]}.{_OLDEST[1]} or newer (older ones drop images "
        f"silently in some families), found {transformers.__version__}; "
        "run: pip install -U 'transformers>=5.18,<6'"
    )

from vlmzip.errors import UnsupportedModelError  # noqa: E402
from vlmzip.families.base import REGISTRY, Card, Family, register  # noqa: E402

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    import_module(_module.name)


def families() -> tuple[str, ...]:
    """Names of the supported model families: the ``model_type`` of their configs."""
    return tuple(sorted(REGISTRY))


def family_of(config: Any) -> Family:
    """The family of a model's config, fitted to it.

    Raises:
        UnsupportedModelError: The family is unknown, or this configuration of it is not supported.
    """
    name = getattr(config, "model_type", None)
    if name not in REGISTRY:
        raise UnsupportedModelError(
            f"model_type {name!r} is not supported; supported: {', '.join(families())}"
        )
    return REGISTRY[name].from_config(config)


__all__ = ["Card", "Family", "families", "family_of", "register"]
