"""VisionZip (arXiv 2412.04467): dominant tokens by attention, the rest merged into contextual ones."""

from dataclasses import dataclass
from typing import ClassVar, get_args

from torch import Tensor

from vlmzip.budget import Budget
from vlmzip.merging import Merge, ZipOutput, check_choice, merge_tokens
from vlmzip.methods.base import Grid, Method, register


@register
@dataclass(frozen=True, kw_only=True)
class VisionZip(Method):
    """VisionZip's settings. Give exactly one budget.

    Attributes:
        tokens: Tokens that a view keeps, split in the paper's proportion: 64 is 54 dominant (the CLS
            token among them) and 10 contextual.
        dominant: Dominant tokens a view, CLS among them; goes together with ``contextual``.
        contextual: Contextual tokens a view; may be 0.
        keep: Share of each view's tokens, in (0, 1], for families whose images differ in size.
        total_tokens: Tokens of a whole image, for families that cut images into crops: shared out
            evenly over the most views that the model allows.
        merge: "reference": target + mean(assigned), what the released code does. "average": mean
            over target and assigned, what the paper says.
        order: "grouped": dominant tokens, then contextual ones. "raster": each at its place in the
            image. None: the model family's own.
        send_cls: Send the CLS token on, counted as dominant, as the released code does. False: the
            same method on the patches alone.
        max_visual_tokens: The most tokens a view that a request to a server may ask for; it changes
            nothing under transformers. None: requests cannot ask.

    Raises:
        ValueError: A setting is out of range, or not exactly one budget is given.
    """

    dominant: int | None = None
    contextual: int | None = None
    merge: Merge = "reference"

    name: ClassVar[str] = "visionzip"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("merge", self.merge, get_args(Merge))

    @property
    def budget(self) -> Budget:
        """How many tokens a view keeps, and how they are split."""
        return Budget(
            tokens=self.tokens,
            dominant=self.dominant,
            contextual=self.contextual,
            keep=self.keep,
            total_tokens=self.total_tokens,
        )

    def select(
        self, hidden: Tensor, scores: Tensor, keys: Tensor, grid: Grid, k: int, cls_token: bool
    ) -> ZipOutput:
        """Sections 3.2 and 3.3 of the paper; see :func:`vlmzip.zip_tokens`."""
        dominant, contextual = self.budget.split(k)
        order = self.order or "grouped"
        return merge_tokens(hidden, scores, keys, dominant, contextual, cls_token, self.merge, order)
