"""What compress() hangs on a model: the method, the tap on the tower, and the step from N to K."""

import threading
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from vlmzip.capture import Tap
from vlmzip.merging import ZipOutput
from vlmzip.methods.base import Grid, Method
from vlmzip.patch import Patches


@dataclass(frozen=True)
class Selection:
    """What became of one image's or video's tokens. V is its number of views (crops, frames).

    Attributes:
        dominant: [V, dominant] int64, indices into a view's N tokens, the CLS token counted.
        contextual: [V, contextual] int64, indices of the contextual targets.
        assignment: [V, N] int64, the row of the view's kept tokens that each token went into, or -1.
        scores: [V, N] float32, the attention that the choice was made by.
        grid: Per view (h, w), rows and columns of patch tokens.
    """

    dominant: Tensor
    contextual: Tensor
    assignment: Tensor
    scores: Tensor
    grid: tuple[Grid, ...]


class Attachment:
    """The state of one compressed model; lives on the model, so a copied model has a copy.

    Args:
        family: The model's family, fitted to its config.
        method: Its ``order`` is settled.
        cls_token: The tower has a CLS token, at index 0.
        views: The most views that an image can have.
        dynamic: Views differ in size, so a small one may have fewer tokens than the budget.
    """

    def __init__(
        self, family: Any, method: Method, *, cls_token: bool, views: int, dynamic: bool
    ) -> None:
        self.family = family
        self.method = method
        self.tap = Tap(cls_token)
        self.patches = Patches()
        self.views = views
        self.dynamic = dynamic
        self._history = _History()

    def zip_views(
        self,
        hidden: Tensor,
        scores: Tensor,
        keys: Tensor,
        grid: Grid,
        pooled: bool = False,
        method: Method | None = None,
    ) -> ZipOutput:
        """Compress a batch of equally large views.

        Args:
            hidden: [B, N, D], the tower's tokens, CLS included if it has one.
            scores: [B, N] float32.
            keys: [B, N, d] float32.
            grid: (h, w) of the patches.
            pooled: The tokens are pooled patches; the tower's CLS token, if any, is not among them.
            method: The method with a budget of these views' own; None: the model's.

        Returns:
            The method's output with the scores it was chosen by; without the CLS token, if the
            method does not send it on, so that indices count patches only.

        Raises:
            RuntimeError: A score, key or kept token is NaN or infinite (on a CPU at once, on other
                devices when they synchronise).
        """
        method = method or self.method
        scores, keys = scores.to(hidden.device), keys.to(hidden.device)
        cls_token = self.tap.cls_token and not pooled
        if cls_token and not method.send_cls:
            hidden, scores, keys = hidden[:, 1:], scores[:, 1:], keys[:, 1:]
            cls_token = False
        k = method.budget.count(hidden.shape[1], views=self.views, dynamic=self.dynamic)
        out = method(hidden, scores, keys, grid, k, cls_token)
        finite = scores.isfinite().all() & keys.isfinite().all() & out.tokens.isfinite().all()
        torch._assert_async(
            finite, "the vision tower gave NaN or infinite values; check its weights and dtype"
        )
        return replace(out, scores=scores)

    def record(self, selections: list[Selection], kind: str = "image") -> None:
        """Note what became of the images (or of another kind) of this forward, in prompt order."""
        self._history.record(selections, kind)

    def arrange(self, **placeholders: Tensor) -> None:
        """Put the latest selections of several kinds into prompt order.

        Args:
            placeholders: By kind, the prompt's placeholder tokens, [B, S] bool; an image or video has
                one for each token that it keeps.
        """
        if torch.compiler.is_compiling() or len(latest := self._history.latest) < 2:
            return
        found = []
        for kind, mask_BS in placeholders.items():
            sizes = [entry.dominant.numel() + entry.contextual.numel() for entry in latest.get(kind, ())]
            copies, odd = divmod(int(mask_BS.sum()), max(1, sum(sizes)))  # beams repeat each prompt
            repeats = (
                mask_BS[::copies].repeat_interleave(copies, 0)[: len(mask_BS)] if copies else mask_BS
            )
            if odd or not torch.equal(mask_BS, repeats):
                return  # features of an earlier forward, passed in by the caller
            if copies:
                places = mask_BS[::copies].flatten().nonzero()[:, 0].tolist()
                starts = accumulate(sizes[:-1], initial=0)
                found += [(places[i], entry) for i, entry in zip(starts, latest[kind], strict=True)]
        self._history.last = tuple(entry for _, entry in sorted(found, key=lambda pair: pair[0]))

    def join(self, views: list[list[int]]) -> None:
        """Join the latest forward's views, recorded one by one, into the images of the prompt.

        Args:
            views: For each row of the prompt, how many views each of its images has.
        """
        if torch.compiler.is_compiling():
            return
        latest = self._history.latest.get("image", ())
        copies = max(1, sum(map(sum, views)) // max(1, len(latest)))  # beams repeat each prompt
        counts = [count for row in views[::copies] for count in row]
        if sum(counts) == len(latest):  # else they are of an earlier forward, passed in by the caller
            ends = accumulate(counts)
            self._history.last = tuple(
                _joined(latest[end - count : end]) for end, count in zip(ends, counts, strict=True)
            )

    @property
    def last(self) -> tuple[Selection, ...]:
        """See :attr:`vlmzip.Compressed.last`."""
        return self._history.last


class _History:
    """The calling thread's latest selections."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._compiled = False

    def __reduce__(self) -> tuple[Any, ...]:
        return _History, ()

    def record(self, selections: list[Selection], kind: str) -> None:
        self._compiled = torch.compiler.is_compiling()
        if not self._compiled:
            self.last = tuple(selections)
            self._local.latest = self.latest | {kind: self.last}

    @property
    def latest(self) -> dict[str, tuple[Selection, ...]]:
        """By kind, the latest selections."""
        latest: dict[str, tuple[Selection, ...]] = getattr(self._local, "latest", {})
        return latest

    @property
    def last(self) -> tuple[Selection, ...]:
        if self._compiled:
            raise RuntimeError(
                "the latest forward was compiled and keeps no record; run one without torch.compile "
                "to see which tokens are kept"
            )
        last: tuple[Selection, ...] = getattr(self._local, "last", ())
        return last

    @last.setter
    def last(self, selections: tuple[Selection, ...]) -> None:
        self._local.last = selections


def _joined(views: tuple[Selection, ...]) -> Selection:
    return Selection(
        dominant=torch.cat([view.dominant for view in views]),
        contextual=torch.cat([view.contextual for view in views]),
        assignment=torch.cat([view.assignment for view in views]),
        scores=torch.cat([view.scores for view in views]),
        grid=tuple(grid for view in views for grid in view.grid),
    )


def selections_of(out: ZipOutput | None, grid: Grid, views: list[int]) -> list[Selection]:
    """Cut a batch of equally large views into selections, ``views[i]`` of them for image i."""
    assert out is not None
    assert out.scores is not None
    ends = list(accumulate(views))
    return [
        Selection(
            dominant=out.dominant[end - count : end].detach(),
            contextual=out.contextual[end - count : end].detach(),
            assignment=out.assignment[end - count : end].detach(),
            scores=out.scores[end - count : end].detach(),
            grid=(grid,) * count,
        )
        for end, count in zip(ends, views, strict=True)
    ]
