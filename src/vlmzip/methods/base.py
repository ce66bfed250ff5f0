"""What every compression method shares: its budget, its settings dict, the guards round it."""

from abc import ABC, abstractmethod
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, ClassVar, Literal, Self, TypeVar, get_args

import torch
from torch import Tensor

from vlmzip.budget import Budget, check_count
from vlmzip.merging import Order, ZipOutput, check_choice

Kind = Literal["encoder", "input", "llm"]
Grid = tuple[int, int]

REGISTRY: "dict[str, type[Method]]" = {}
MethodType = TypeVar("MethodType", bound="type[Method]")


def register(cls: MethodType) -> MethodType:
    """Class decorator: make a method known by its ``name``."""
    if cls.name in REGISTRY:
        raise ValueError(f"two methods are called {cls.name!r}")
    REGISTRY[cls.name] = cls
    return cls


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Settings of a method, and the pure function that they parametrise.

    Attributes:
        tokens: Tokens that a view (image, crop or frame) keeps.
        keep: Share of each view's tokens, in (0, 1].
        total_tokens: Tokens of a whole image, for families that cut images into crops.
        order: "grouped", "raster", or None for the model family's own.
        send_cls: Send the vision tower's CLS token on, as one of the kept tokens.
        max_visual_tokens: The most tokens a view that a request to a server may ask for; it changes
            nothing under transformers. None: requests cannot ask.

    Raises:
        ValueError: A setting is out of range, or not exactly one budget is given.
    """

    tokens: int | None = None
    keep: float | None = None
    total_tokens: int | None = None
    order: Order | None = None
    send_cls: bool = True
    max_visual_tokens: int | None = None

    name: ClassVar[str]
    kind: ClassVar[Kind] = "encoder"

    def __post_init__(self) -> None:
        for field, value in vars(self.budget).items():
            if getattr(self, field, None) is not None:
                object.__setattr__(self, field, value)  # numpy numbers become plain ones
        if self.order is not None:
            check_choice("order", self.order, get_args(Order))
        if not isinstance(self.send_cls, bool):
            raise ValueError(f"send_cls must be True or False, got {self.send_cls!r}")
        if self.max_visual_tokens is not None:
            most = check_count("max_visual_tokens", self.max_visual_tokens, 1)
            object.__setattr__(self, "max_visual_tokens", most)

    @property
    def budget(self) -> Budget:
        """How many tokens a view keeps."""
        return Budget(tokens=self.tokens, keep=self.keep, total_tokens=self.total_tokens)

    def with_tokens(self, k: int) -> Self:
        """The same method with a budget of ``k`` tokens a view instead of its own.

        Raises:
            ValueError: ``k`` is not an integer of at least 1.
        """
        given = {name: None for name, value in vars(self.budget).items() if value is not None}
        budget: dict[str, Any] = given | {"tokens": check_count("tokens", k, 1)}
        return replace(self, **budget)

    @classmethod
    def setting_names(cls) -> tuple[str, ...]:
        """Names that a settings dict may hold beside ``method``."""
        return tuple(field.name for field in fields(cls))

    def settings(self) -> dict[str, Any]:
        """The settings dict: the method's name and every setting that is not at its default."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        defaults = {f.name: f.default for f in fields(self) if f.default is not MISSING}
        return {"method": self.name} | {k: v for k, v in values.items() if v != defaults.get(k)}

    def __call__(
        self, hidden: Tensor, scores: Tensor, keys: Tensor, grid: Grid, k: int, cls_token: bool
    ) -> ZipOutput:
        """Compress each view to exactly ``k`` tokens; at k = N the tokens pass untouched.

        Args:
            hidden: [B, N, D] floating, the vision tower's tokens; token 0 is CLS if ``cls_token``.
            scores: [B, N] float32, attention that tokens get.
            keys: [B, N, d] float32, head-mean keys.
            grid: (h, w), rows and columns of the patch tokens, CLS not counted.
            k: Tokens to keep, 1 to N.
            cls_token: Token 0 is a CLS token.

        Raises:
            ValueError: ``k`` is not within 1 to N, or ``grid`` is not the N tokens' grid.
        """
        b, n = hidden.shape[:2]
        if not 1 <= k <= n:
            raise ValueError(f"cannot keep {k} of {n} tokens")
        if grid[0] * grid[1] + cls_token != n:
            raise ValueError(
                f"a grid of {grid[0]} x {grid[1]} patches {'and a CLS token ' * cls_token}"
                f"does not make {n} tokens"
            )
        if k == n:
            every_BN = torch.arange(n, device=hidden.device).expand(b, n)
            return ZipOutput(hidden, every_BN, every_BN[:, :0], every_BN)
        return self.select(hidden, scores, keys, grid, k, cls_token)

    @abstractmethod
    def select(
        self, hidden: Tensor, scores: Tensor, keys: Tensor, grid: Grid, k: int, cls_token: bool
    ) -> ZipOutput:
        """The method itself; arguments as in :meth:`__call__`, with ``k`` < N."""
