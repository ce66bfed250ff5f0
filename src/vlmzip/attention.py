"""Scores and keys from one attention layer's q and k, without an attention matrix.

Shapes: B views, H heads, N tokens, d head dimension. All results are float32.
"""

import torch
from torch import Tensor

from vlmzip.budget import check_count


@torch.no_grad()
def cls_attention(q_BHNd: Tensor, k_BHNd: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Attention that the CLS query pays to each token, mean over heads (VisionZip, algorithm 1).

    One row of the softmax, so O(N d) time and memory.

    Args:
        q_BHNd: Queries as the layer's softmax sees them, not yet scaled; token 0 is CLS.
        k_BHNd: Keys of the same layer.
        scale: Factor of q·k, usually d ** -0.5.
        mask: None, boolean (True: may attend) or additive, broadcastable to [B, H, N, N].

    Returns:
        [B, N] float32, without gradient. Entry 0, what CLS pays to itself, means nothing as a score.

    Raises:
        TypeError: The mask is neither boolean nor floating point.
        ValueError: Shapes disagree.
    """
    _check(q_BHNd, k_BHNd, mask)
    row_mask = _rows(mask, slice(0, 1))
    return _attend(q_BHNd[:, :, :1], k_BHNd.float(), scale, row_mask)[0].mean(1)[:, 0]


@torch.no_grad()
def received_attention(
    q_BHNd: Tensor, k_BHNd: Tensor, scale: float, mask: Tensor | None = None, chunk: int = 128
) -> Tensor:
    """Attention that each token receives, mean over heads and queries (VisionZip, appendix A.2).

    The score for towers without a CLS token. Queries go in chunks, so memory is O(chunk N) a head.
    A query that may attend to nothing (padding) is left out of the mean.

    Args:
        q_BHNd: Queries as the layer's softmax sees them, not yet scaled.
        k_BHNd: Keys of the same layer.
        scale: Factor of q·k, usually d ** -0.5.
        mask: None, boolean (True: may attend) or additive, broadcastable to [B, H, N, N].
        chunk: Queries handled at a time.

    Returns:
        [B, N] float32, without gradient; each row sums to 1.

    Raises:
        TypeError: The mask is neither boolean nor floating point.
        ValueError: Shapes disagree, or ``chunk`` is under 1.
    """
    _check(q_BHNd, k_BHNd, mask)
    chunk = check_count("chunk", chunk, 1)
    k = k_BHNd.float()
    received_BN = k.new_zeros(k.shape[0], k.shape[2])
    queries_B1 = k.new_zeros(k.shape[0], 1)
    for start in range(0, q_BHNd.shape[2], chunk):
        rows = slice(start, start + chunk)
        weights_BHcN, live = _attend(q_BHNd[:, :, rows], k, scale, _rows(mask, rows))
        received_BN += weights_BHcN.sum(2).mean(1)
        queries_B1 += live.expand(weights_BHcN.shape[:3]).sum(2).float().mean(1, keepdim=True)
    return received_BN / queries_B1.clamp(min=1)


def mean_keys(k_BHNd: Tensor) -> Tensor:
    """Keys averaged over heads, unnormalised: [B, N, d] float32 (reference code: ``metric``)."""
    return k_BHNd.float().mean(1)


def _attend(q_BHcd: Tensor, k_BHNd: Tensor, scale: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax rows [B, H, c, N], and which of them may attend to anything, broadcastable."""
    with torch.autocast(q_BHcd.device.type, enabled=False):
        logits = q_BHcd.float() @ k_BHNd.transpose(-1, -2) * scale
    if mask is None:
        return logits.softmax(-1), torch.ones(1, 1, 1, dtype=torch.bool, device=logits.device)
    # Additive masks write "never" as -inf or as the dtype's minimum.
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
    if mask.dtype != torch.bool:
        logits = logits + mask.float()
    logits = logits.masked_fill(~allowed, torch.finfo(logits.dtype).min)
    live = allowed.any(-1)
    return logits.softmax(-1) * live.unsqueeze(-1), live


def _check(q_BHNd: Tensor, k_BHNd: Tensor, mask: Tensor | None) -> None:
    q, k = list(q_BHNd.shape), list(k_BHNd.shape)
    if len(q) != 4 or q != k:
        raise ValueError(f"q and k must both be [B, H, N, d], got q {q} and k {k}")
    if mask is None:
        return
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"mask must be boolean or floating point, got {mask.dtype}")
    full = [*q[:3], q[2]]
    shape = [1] * (4 - mask.ndim) + list(mask.shape)
    if len(shape) != 4 or any(side not in (1, whole) for side, whole in zip(shape, full, strict=True)):
        raise ValueError(f"mask must be broadcastable to [B, H, N, N] = {full}, got {list(mask.shape)}")


def _rows(mask: Tensor | None, rows: slice) -> Tensor | None:
    """The mask of some queries; a mask with one row holds for every query."""
    if mask is None or mask.ndim < 2 or mask.shape[-2] == 1:
        return mask
    return mask[..., rows, :]
