"""The token map: which image tokens were kept, and which were merged into which, as a figure."""

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray
from PIL import Image

from vlmzip.attachment import Selection

_INCHES = 4.2  # width of a panel
_PIXELS = 28  # of a token's side, where the model's own pixels cannot be shown
_INK = "#1a1a1a"
_DROPPED = np.array([0.2, 0.2, 0.2])


def seen_views(
    processor: Any, inputs: Any, selection: Selection, image: Image.Image
) -> list[NDArray[np.uint8]]:
    """What the model saw of an image, [h, w, 3] a view: the processor's crops, normalisation undone.

    Where the pixels are packed into patches, the whole image in the proportions of the token grid.
    """
    name = next(name for name in inputs if name.startswith("pixel_values"))
    pixels = np.asarray(inputs[name].detach().float().cpu())
    if pixels.ndim in (4, 5) and pixels.shape[-3] == 3:
        flat = pixels.reshape(-1, *pixels.shape[-3:])[: len(selection.grid)]
        settings = processor.image_processor
        mean = np.asarray(settings.image_mean)[:, None, None] if settings.do_normalize else 0.0
        std = np.asarray(settings.image_std)[:, None, None] if settings.do_normalize else 1.0
        shown = np.clip(flat * std + mean, 0, 1).transpose(0, 2, 3, 1)
        return list(np.round(shown * 255).astype(np.uint8))
    return [np.asarray(image.resize((w * _PIXELS, h * _PIXELS))) for h, w in selection.grid]


def check_name(out: Path) -> None:
    """Refuse to draw to a file of a kind that matplotlib does not write, or in no folder.

    Raises:
        ValueError: The name is of that sort, or a folder's.
    """
    kinds = FigureCanvasBase.get_supported_filetypes()
    if out.suffix[1:].lower() not in kinds:
        raise ValueError(f"cannot write {out}: its name must end in one of .{', .'.join(sorted(kinds))}")
    if not out.parent.is_dir():
        raise ValueError(f"cannot write {out}: there is no folder {out.parent}")
    if out.is_dir():
        raise ValueError(f"cannot write {out}: it is a folder")


def stacked(selections: Sequence[Selection]) -> Selection:
    """Selections of several images of one size, as if they were the views of one."""
    return Selection(
        dominant=torch.cat([one.dominant for one in selections]),
        contextual=torch.cat([one.contextual for one in selections]),
        assignment=torch.cat([one.assignment for one in selections]),
        scores=torch.cat([one.scores for one in selections]),
        grid=tuple(grid for one in selections for grid in one.grid),
    )


def draw(
    selection: Selection,
    views: list[NDArray[np.uint8]],
    settings: dict[str, Any],
    out: Path,
    titles: Sequence[str] | None = None,
) -> None:
    """Draw an image's token map: a row a view with the view, its map and its scores.

    Args:
        selection: What became of the image's tokens.
        views: [h, w, 3] uint8, what the model saw, one a view.
        settings: The method's settings, for the title.
        out: The file; its ending says the format.
        titles: What to write over each view, a line or two. None: that the model saw it.

    Raises:
        OSError: The file cannot be written.
    """
    rows = len(views)
    tallest = max(h / w for h, w in selection.grid)
    height = (_INCHES * min(tallest, 3) + 0.3) * rows + 1.1
    figure = Figure(figsize=(3 * _INCHES + 0.8, height), facecolor="white")
    axes = figure.subplots(rows, 3, squeeze=False)
    if titles is None:
        numbers = [f"view {index + 1} of {rows}: " if rows > 1 else "" for index in range(rows)]
        titles = [f"{number}what the model saw" for number in numbers]
    for index, pixels in enumerate(views):
        _draw_view(figure, axes[index], _Map(selection, index), pixels, titles[index])
    shown = ", ".join(f"{key}={_short(value)}" for key, value in settings.items() if key != "method")
    figure.suptitle(f"{settings['method']}  ({shown})", fontsize=14, y=1 - 0.22 / height, color=_INK)
    figure.legend(
        handles=_legend(_Map(selection, 0)), loc="lower center", ncol=4, frameon=False, fontsize=11
    )
    figure.subplots_adjust(
        left=0.01, right=0.94, bottom=0.5 / height, top=1 - 0.78 / height, wspace=0.05, hspace=0.12
    )
    figure.savefig(out, dpi=110)


class _Map:
    """One view's tokens on its grid: flat indices of patches, the CLS token left out."""

    def __init__(self, selection: Selection, view: int) -> None:
        self.height, self.width = selection.grid[view]
        scores = selection.scores[view].cpu().numpy()
        self.cls = len(scores) - self.height * self.width  # 1 with a CLS token, which is first
        patches = scores[self.cls :].reshape(self.height, self.width)
        self.relative = patches / patches.mean()
        dominant = selection.dominant[view].cpu().numpy()
        targets = selection.contextual[view].cpu().numpy()
        assignment = selection.assignment[view].cpu().numpy()
        self.tokens = len(scores)
        self.kept_dominant, self.kept_contextual = len(dominant), len(targets)
        self.dominant = dominant[dominant >= self.cls] - self.cls
        self.targets = targets - self.cls
        # Which target a patch went into: -1 if it is dominant, -2 if it was dropped.
        group = np.full(len(scores), -2)
        for number, target in enumerate(targets):
            group[assignment == assignment[target]] = number
        group[dominant] = -1
        self.group = group[self.cls :].reshape(self.height, self.width)


def _draw_view(figure: Any, axes: Any, tokens: _Map, pixels: NDArray[np.uint8], title: str) -> None:
    box = (-0.5, tokens.width - 0.5, tokens.height - 0.5, -0.5)  # a patch is a unit square
    axes[0].imshow(pixels, extent=box)
    axes[0].set_title(title, fontsize=11, color=_INK)
    axes[1].imshow(_tint(tokens, pixels), extent=box, interpolation="nearest")
    _outline(axes[1], tokens)
    _mark_targets(axes[1], tokens)
    kept = tokens.kept_dominant + tokens.kept_contextual
    axes[1].set_title(
        f"{tokens.kept_dominant} dominant + {tokens.kept_contextual} contextual = "
        f"{kept} of {tokens.tokens} tokens",
        fontsize=11,
        color=_INK,
    )
    heat = axes[2].imshow(tokens.relative, extent=box, cmap="magma", interpolation="nearest")
    axes[2].set_title("score: attention, 1 = the mean", fontsize=11, color=_INK)
    axes[2].set_aspect("equal")
    corner = axes[2].inset_axes((1.02, 0.0, 0.035, 1.0))
    figure.colorbar(heat, cax=corner, format="%.4g").ax.tick_params(labelsize=8)
    for panel in axes:
        panel.set_xticks([])
        panel.set_yticks([])
        for side in panel.spines.values():
            side.set_visible(False)


def _tint(tokens: _Map, pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The view in its own colours where it is dominant, in its target's colour where it was merged."""
    image = pixels.astype(np.float64) / 255
    grey = image @ np.array([0.299, 0.587, 0.114])
    colours = np.vstack([_palette(len(tokens.targets)), _DROPPED, _DROPPED])  # -1 and -2 end up last
    rows = np.arange(image.shape[0]) * tokens.height // image.shape[0]
    columns = np.arange(image.shape[1]) * tokens.width // image.shape[1]
    group = tokens.group[np.ix_(rows, columns)]
    tinted = 0.62 * colours[group] + 0.38 * grey[..., None]
    return np.where((group == -1)[..., None], image, tinted)


def _outline(panel: Any, tokens: _Map) -> None:
    """Lines where dominant patches end."""
    padded = np.pad(tokens.group == -1, 1)
    lines = []
    for row, column in np.argwhere(padded[:, 1:] != padded[:, :-1]):
        lines.append([(column - 0.5, row - 1.5), (column - 0.5, row - 0.5)])
    for row, column in np.argwhere(padded[1:] != padded[:-1]):
        lines.append([(column - 1.5, row - 0.5), (column - 0.5, row - 0.5)])
    panel.add_collection(LineCollection(lines, colors="white", linewidths=3.0, capstyle="projecting"))
    panel.add_collection(LineCollection(lines, colors=_INK, linewidths=1.4, capstyle="projecting"))


def _mark_targets(panel: Any, tokens: _Map) -> None:
    rows, columns = np.divmod(tokens.targets, tokens.width)
    size = 3.2 * 72 / max(tokens.height, tokens.width)  # points, most of a patch
    panel.scatter(
        columns,
        rows,
        s=min(size, 16) ** 2,
        c=_palette(len(tokens.targets)),
        edgecolors="white",
        linewidths=1.6,
        marker="o",
        zorder=3,
    )


def _palette(count: int) -> NDArray[np.float64]:
    """Colours [count, 3] that differ most between neighbours in the list."""
    golden = 0.6180339887
    hues = [(0.58 + index * golden) % 1 for index in range(count)]
    values = [0.95 if index % 2 == 0 else 0.72 for index in range(count)]
    return np.array([colorsys.hsv_to_rgb(h, 0.78, v) for h, v in zip(hues, values, strict=True)]).reshape(
        -1, 3
    )


def _legend(tokens: _Map) -> list[Any]:
    colour = _palette(1)[0]
    entries: list[Any] = [
        Patch(
            facecolor="white", edgecolor=_INK, linewidth=1.4, label="dominant, in the image's own colours"
        )
    ]
    if len(tokens.targets):
        dot = Line2D([], [], color=colour, label="contextual target", linestyle="none", marker="o")
        dot.set(markersize=9, markeredgecolor="white")
        entries.append(dot)
        entries.append(Patch(facecolor=colour, alpha=0.7, label="merged into the target of that colour"))
    if (tokens.group == -2).any():
        entries.append(Patch(facecolor=_DROPPED, label="dropped"))
    if tokens.cls:
        entries.append(
            Line2D([], [], linestyle="none", label="the CLS token is kept too, and not on the map")
        )
    return entries


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
