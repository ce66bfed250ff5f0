"""Changes to objects that can be taken back, in a copy of the object too."""

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

_ABSENT = "vlmzip: no such instance attribute"
_CHANGING = "vlmzip: any value"


class Patches:
    """Instance attributes and hooks that :meth:`undo` takes back, newest first.

    ``copy.deepcopy`` of a patched model copies its Patches along, bound to the copy.
    """

    def __init__(self) -> None:
        self._attributes: list[tuple[Any, str, Any, Any]] = []
        self._hooks: list[RemovableHandle] = []

    def set(self, target: Any, name: str, value: Any) -> None:
        """Set an instance attribute, noting what the instance had."""
        self._attributes.append((target, name, vars(target).get(name, _ABSENT), value))
        object.__setattr__(target, name, value)

    def lend(self, target: Any, name: str) -> None:
        """Note an instance attribute that the instance changes by itself, to give its value back."""
        self._attributes.append((target, name, vars(target).get(name, _ABSENT), _CHANGING))

    def set_method(self, target: Any, name: str, function: Callable[..., Any]) -> None:
        """Set a method on the instance; bound methods survive ``copy.deepcopy``, closures do not."""
        self.set(target, name, MethodType(function, target))

    def set_forward(self, module: nn.Module, function: Callable[..., Any]) -> None:
        """Replace ``module.forward``; the one it had is then ``module._vlmzip_forward``."""
        self.set(module, "_vlmzip_forward", module.forward)
        self.set_method(module, "forward", function)

    def pre_hook(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Register a forward pre-hook."""
        self._hooks.append(module.register_forward_pre_hook(hook))

    def undo(self) -> None:
        """Take everything back that nobody has replaced since."""
        for handle in self._hooks:
            handle.remove()
        for target, name, previous, value in reversed(self._attributes):
            if name == "forward" and _moved_by_accelerate(target):
                target._old_forward = target._vlmzip_forward
            elif value is not _CHANGING and vars(target).get(name, _ABSENT) is not value:
                continue  # accelerate, attached before us, was taken off before us
            elif previous is _ABSENT:
                vars(target).pop(name, None)
            else:
                object.__setattr__(target, name, previous)
        self._hooks.clear()
        self._attributes.clear()


def _moved_by_accelerate(module: Any) -> bool:
    """Whether accelerate, called after us, has wrapped our forward in its own."""
    inner = getattr(vars(module).get("_old_forward"), "__func__", None)
    return inner is not None and getattr(inner, "__module__", "").startswith("vlmzip.")
